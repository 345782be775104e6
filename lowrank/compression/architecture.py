"""compression.architecture"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from lowrank.nn.low_rank import FACTORED
from lowrank.nn.surgery import PackedLinear, replace_module
from lowrank.nn.usv import USVLinear

KINDS: dict[str, type[Any]] = {**FACTORED, USVLinear.storage: USVLinear}


def _own_base(model: Any) -> dict[str, Any] | None:
    """How the model says that it can be built: its transformers class, or its timm name."""
    if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
        return {"transformers": type(model).__name__}
    settings = getattr(model, "pretrained_cfg", None) or {}
    if settings.get("architecture"):
        return {"timm": settings["architecture"], "options": {"num_classes": model.num_classes}}
    return None


def _save_config(model: Any, folder: Path) -> None:
    for part in ("config", "generation_config"):
        if hasattr(getattr(model, part, None), "save_pretrained"):
            getattr(model, part).save_pretrained(folder)


def _skeleton(base: Mapping[str, Any] | None, folder: Path) -> nn.Module | None:
    """The base architecture with parameters on the meta device; None where only the caller knows it."""
    if base is None:
        return None
    with init_empty_weights(include_buffers=False):
        if "transformers" in base:
            return _build_transformers(base["transformers"], folder)
        if "timm" in base:
            return _build_timm(base["timm"], base.get("options", {}))
    raise ValueError(f"`base` must have the key 'transformers' or 'timm', got {dict(base)}.")


def _build_transformers(name: str, folder: Path) -> nn.Module:
    import transformers  # noqa: PLC0415

    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"`base` must name a model class of transformers, got {name!r}.")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"`folder` must hold the config.json of the base model, got {str(folder)!r} without it."
        )
    try:
        model = kind(transformers.AutoConfig.from_pretrained(folder))
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"`folder` must hold a config.json of {name}, got one of another model: {error}.") from error
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _build_timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    import timm  # noqa: PLC0415

    if timm.is_model(name):
        return timm.create_model(name, pretrained=False, **options)
    kind = getattr(timm.models, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"`base` must name a model or a model class of timm, got {name!r}.")
    return kind(**options)


def _structure(model: nn.Module, skeleton: nn.Module | None, rows: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What every layer that is not as in the base architecture is now, parents before their parts."""
    found: dict[str, dict[str, Any]] = {}
    before = {} if skeleton is None else dict(skeleton.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, tuple(KINDS.values())):
            sizes = {"in": module.in_features, "out": module.out_features, "rank": module.rank}
            found[name] = rows.get(name, {}) | {"kind": module.storage, **sizes, "bias": module.bias is not None}
        elif isinstance(module, PackedLinear):
            found[name] = {"kind": "packed", "parts": [part for part, _ in module.named_children()]}
        elif isinstance(module, nn.Linear) and _is_new(name, module, before, found):
            sizes = {"in": module.in_features, "out": module.out_features}
            found[name] = rows.get(name, {}) | {"kind": "linear", **sizes, "bias": module.bias is not None}
        elif name in rows:
            found[name] = dict(rows[name])  # left dense; nothing to rebuild
    return found


def _is_new(name: str, module: nn.Module, before: Mapping[str, nn.Module], found: Mapping[str, Any]) -> bool:
    """A linear layer that the base architecture does not have, a part of a packed one or one that was a Conv1D; or may not
    have, where the architecture is not known."""
    parent = name.rpartition(".")[0]
    if found.get(parent, {}).get("kind") in KINDS:
        return False
    packed = found.get(parent, {}).get("kind") == "packed"
    return packed or not before or (name in before and type(before[name]) is not type(module))


def _restructure(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts empty layers of the recorded kinds in the places of those of the base architecture."""
    with init_empty_weights(include_buffers=False):
        for name, layer in layers.items():
            kind = layer.get("kind")
            if kind is None:
                continue
            try:
                model.get_submodule(name)
                known = True
            except AttributeError:
                known = name.rpartition(".")[0] in layers  # a part of a packed layer
            if kind not in {*KINDS, "packed", "linear"}:
                raise ValueError(f"`layers` must be of a known kind, got {kind!r} for layer {name!r}.")
            if not known:
                raise ValueError(f"`base` must have a layer {name!r}, as the compressed model has, got none.")
            if kind == "packed":
                replace_module(model, name, PackedLinear([nn.Linear(1, 1) for _ in layer["parts"]], layer["parts"]))
            elif kind == "linear":
                replace_module(model, name, nn.Linear(layer["in"], layer["out"], bias=layer["bias"]))
            else:
                made = KINDS[kind](layer["in"], layer["out"], layer["rank"], bias=layer["bias"])
                replace_module(model, name, made)
