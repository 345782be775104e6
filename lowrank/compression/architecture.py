"""Rebuild the architecture of a compressed model: the base model without weights, and the layers that replace its layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from lowrank.io.checks import require
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.nn.surgery import PackedLinear, replace_module
from lowrank.nn.usv import USVConv2d, USVLinear

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
LAYER_KINDS: dict[str, type[Any]] = {**FACTORED_LAYERS, USVLinear.storage: USVLinear}


def describe_base(model: Any) -> dict[str, Any] | None:
    """Describe how to build the architecture of a model, from what the model knows about itself.

    **Returns** `{"transformers": class}`, or `{"timm": name, "options": {...}}`, or None for a model of neither library.
    """
    if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
        return {"transformers": type(model).__name__}
    settings = getattr(model, "pretrained_cfg", None) or {}
    if settings.get("architecture"):
        return {"timm": settings["architecture"], "options": {"num_classes": model.num_classes}}
    return None


def save_config(model: Any, folder: Path) -> None:
    """Write the configuration files of a transformers model; other models have none.

    **Arguments**

    - `model`: any PyTorch module.
    - `folder`: an existing folder; it gets `config.json`, and `generation_config.json` for models that generate.
    """
    for part in ("config", "generation_config"):
        if hasattr(getattr(model, part, None), "save_pretrained"):
            getattr(model, part).save_pretrained(folder)


def build_skeleton(base: Mapping[str, Any] | None, folder: Path) -> nn.Module | None:
    """Build the base architecture with parameters on the meta device, so that it takes no memory.

    **Arguments**

    - `base`: the description, see `describe_base`.
    - `folder`: the folder with the `config.json` of a transformers model.

    **Returns** the model, or None if `base` is None.

    **Raises**

    - `FileNotFoundError`: no `config.json`.
    - `ValueError`: an unknown library or model; a `config.json` of another model.
    """
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

    model_class = getattr(transformers, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(f"`base` must name a model class of transformers, got {name!r}.")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"`folder` must contain the config.json of the base model, got {str(folder)!r} without it."
        )
    try:
        model = model_class(transformers.AutoConfig.from_pretrained(folder))
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"`folder` must contain a config.json of {name}, got one of another model: {error}."
        ) from error
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _build_timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    import timm  # noqa: PLC0415

    if timm.is_model(name):
        return timm.create_model(name, pretrained=False, **options)
    model_class = getattr(timm.models, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise ValueError(f"`base` must name a model or a model class of timm, got {name!r}.")
    return model_class(**options)


def describe_layers(
    model: nn.Module, skeleton: nn.Module | None, rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Describe every layer of a model that differs from its base architecture.

    **Arguments**

    - `model`: the compressed model; it is not changed.
    - `skeleton`: its base architecture; None if unknown, and then every linear layer is described.
    - `rows`: layer -> row of the table that `compress` returned; layers that stayed dense have one too.

    **Returns** layer -> its row, if it has one, with `kind`, `in`, `out`, `rank` and `bias`, or `kind` and `parts` for a packed
    projection. Packed projections come before their parts. Layers that stayed as they are have no `kind`. A layer of `OIALR`
    has the `dtype` of its dense weight too.

    **Raises**

    - `ValueError`: a converted convolution, which has no form in the files.
    """
    if other := next((name for name, module in model.named_modules() if isinstance(module, USVConv2d)), None):
        raise ValueError(
            f"`model` must have linear or factored layers, got {other!r}, a USVConv2d: call OIALR.merge() or fold(model) first."
        )
    layers: dict[str, dict[str, Any]] = {}
    before = {} if skeleton is None else dict(skeleton.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, tuple(LAYER_KINDS.values())):
            sizes = {"in": module.in_features, "out": module.out_features, "rank": module.rank}
            kind = {"kind": module.storage, **sizes, "bias": module.bias is not None}
            if isinstance(module, USVLinear):
                kind["dtype"] = str(module.like.dtype).removeprefix("torch.")
            layers[name] = {**rows.get(name, {}), **kind}
        elif isinstance(module, PackedLinear):
            layers[name] = {"kind": "packed", "parts": [part for part, _ in module.named_children()]}
        elif isinstance(module, nn.Linear) and _is_new(name, module, before, layers):
            sizes = {"in": module.in_features, "out": module.out_features}
            layers[name] = {**rows.get(name, {}), "kind": "linear", **sizes, "bias": module.bias is not None}
        elif name in rows:
            layers[name] = dict(rows[name])
    return layers


def _is_new(name: str, module: nn.Module, before: Mapping[str, nn.Module], layers: Mapping[str, Any]) -> bool:
    """Return True if the base has no such linear layer: it is a part of a packed one, was a Conv1D, or no base is known."""
    parent_kind = layers.get(name.rpartition(".")[0], {}).get("kind")
    if parent_kind in LAYER_KINDS:
        return False
    return parent_kind == "packed" or not before or (name in before and type(before[name]) is not type(module))


def insert_layers(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace layers of a base architecture by layers of the recorded kinds, in place, with parameters on the meta device.

    **Arguments**

    - `model`: the base architecture; it is changed.
    - `layers`: layer -> description, see `describe_layers`.

    **Raises**

    - `ValueError`: an unknown kind; a layer that the base does not have.
    """
    with init_empty_weights(include_buffers=False):
        for name, layer in layers.items():
            if (kind := layer.get("kind")) is None:
                continue
            rule = f"have kinds among {sorted({*LAYER_KINDS, 'packed', 'linear'})} (layer {name!r})"
            require(kind in {*LAYER_KINDS, "packed", "linear"}, "layers", rule, kind)
            if not _has_module(model, name) and name.rpartition(".")[0] not in layers:
                raise ValueError(f"`base` must have a layer {name!r}, as the compressed model has, got none.")
            replace_module(model, name, _build_layer(layer))


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _build_layer(layer: Mapping[str, Any]) -> nn.Module:
    if layer["kind"] == "packed":
        return PackedLinear([nn.Linear(1, 1) for _ in layer["parts"]], layer["parts"])
    if layer["kind"] == "linear":
        return nn.Linear(layer["in"], layer["out"], bias=layer["bias"])
    made = LAYER_KINDS[layer["kind"]](layer["in"], layer["out"], layer["rank"], bias=layer["bias"])
    if isinstance(made, USVLinear) and "dtype" in layer:  # files of older versions have none
        require(layer["dtype"] in DTYPES, "layers", f"have a dtype among {sorted(DTYPES)}", layer["dtype"])
        made.like = made.like.to(DTYPES[layer["dtype"]])
    return made
