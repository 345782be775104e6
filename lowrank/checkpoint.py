"""Compressed models on disk: `model.safetensors`, the base model's configuration, and `lowrank.json`.

Loading builds the base architecture without weights, puts the recorded layers in their places and reads the tensors, all of
them by name and shape. No weight of the dense model is needed, and nothing is unpickled.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank.fingerprint import hash_tensors
from lowrank.modules import FACTORED, PackedLinear, replace_module
from lowrank.usv import USVLinear

FORMAT = "lowrank.compressed/1"
RECORD = "lowrank_record"  # the attribute of a compressed model that tells how it was made
TENSORS, ABOUT = "model.safetensors", "lowrank.json"
FILES = {TENSORS, ABOUT, "config.json", "generation_config.json"}
KINDS: dict[str, type[Any]] = {**FACTORED, USVLinear.storage: USVLinear}
KEYS = {"base", "model", "layers", "tensors", "tied"}


def save_compressed(model: nn.Module, folder: Path | str, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes a compressed model to a folder, whole or not at all.

    **Arguments:** `folder`: new, empty, or with a compressed model that is replaced. `base`: how to build the architecture
    where the model does not know it itself: `{"timm": name, "options": {...}}`, the name of a timm model or model class and
    what it is built with. Models of transformers and of `timm.create_model` know it; for a model of neither library, pass the
    dense architecture to `load_compressed`.

    **Returns:** what `lowrank.json` holds: `base`; `model`, the hash of the dense weights; `layers`: name -> kind, sizes,
    and the row that `compress` gave; `parameters` and `indices`, the numbers of elements stored; `tensors`, their hash;
    `tied`, the names that share another's tensor.

    **Raises:** `ValueError`: a folder with other content; an architecture that `base` does not rebuild.
    """
    folder = Path(folder)
    other = {path.name for path in folder.iterdir()} - FILES if folder.exists() else set()
    if other:
        raise ValueError(
            f"`folder` must be new, empty or with nothing but a compressed model to replace, got {sorted(other)[0]!r} in "
            f"{str(folder)!r}."
        )
    tensors, tied = distinct_tensors(model)
    record: dict[str, Any] = getattr(model, RECORD, {})
    about = {
        "format": FORMAT,
        "base": dict(base) if base is not None else _own_base(model),
        "model": record.get("model"),
        "layers": {},
        "parameters": sum(t.numel() for t in tensors.values() if t.is_floating_point()),
        "indices": sum(t.numel() for name, t in tensors.items() if name.endswith(".pivots")),
        "tensors": hash_tensors(tensors),
        "tied": tied,
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _save_config(model, partial)
        about["layers"] = _structure(model, _skeleton(about["base"], partial), record.get("layers", {}))
        if (built := _skeleton(about["base"], partial)) is not None:
            _restructure(built, about["layers"])
            _compare({name: t.shape for name, t in built.state_dict().items()}, _all_shapes(tensors, tied), "`base`")
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf8")
    except BaseException:
        shutil.rmtree(partial)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return about


def load_compressed(
    folder: Path | str, device: torch.device | str = "cpu", architecture: nn.Module | None = None
) -> nn.Module:
    """Reads a compressed model back, in evaluation mode, with the dtypes it was saved in.

    **Arguments:** `architecture`: for a model of neither transformers nor timm: the dense model, whose weights do not matter;
    it is changed in place and returned.

    **Raises:** `FileNotFoundError`: no such folder or file. `ValueError`: a damaged file, another format, or a tensor that is
    missing, left over or of another shape, by name.
    """
    folder = Path(folder)
    if missing := [name for name in (ABOUT, TENSORS) if not (folder / name).exists()]:
        raise FileNotFoundError(
            f"`folder` must hold a model written by save_compressed, got {str(folder)!r} without {missing}."
        )
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`folder` must hold a whole {ABOUT}, got {str(folder)!r}: {error}.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else about
        raise ValueError(f"`folder` must have format {FORMAT!r}, got {found!r} in {str(folder)!r}.")
    if lacking := sorted(KEYS - about.keys()):
        raise ValueError(f"`folder` must hold a whole {ABOUT}, got {str(folder)!r} without {lacking}.")
    try:  # copies, for what is read stands in the file until it is touched
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS, device=str(device)).items()}
    except SafetensorError as error:
        raise ValueError(f"`folder` must hold a whole {TENSORS}, got {str(folder)!r}: {error}.") from error
    model = architecture if architecture is not None else _skeleton(about["base"], folder)
    if model is None:
        raise ValueError("`architecture` must be the dense model, for one of neither transformers nor timm, got None.")
    _restructure(model, about["layers"])
    everything = tensors | {name: tensors[kept] for name, kept in about["tied"].items() if kept in tensors}
    _compare(
        {n: t.shape for n, t in model.state_dict().items()}, {n: t.shape for n, t in everything.items()}, "`folder`"
    )
    if hash_tensors(tensors) != about["tensors"]:
        raise ValueError(f"`folder` must hold the tensors that {ABOUT} was written for, got others in {str(folder)!r}.")
    model.load_state_dict(everything, strict=True, assign=True)
    for name, kept in about["tied"].items():
        _share(model, name, kept)
    layers = {name: row for name, row in about["layers"].items() if "method" in row}
    setattr(model, RECORD, {"model": about["model"], "layers": layers})
    return model.to(device).eval()


def distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state without repeats, contiguous on the CPU; and the repeats: name -> the name that is stored."""
    distinct: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in model.state_dict().items():
        stored = first.setdefault((tensor.data_ptr(), tensor.shape), name) if tensor.numel() else name
        if stored == name:
            distinct[name] = tensor.detach().cpu().contiguous()
        else:
            tied[name] = stored
    return distinct, tied


def _share(model: nn.Module, name: str, kept: str) -> None:
    """One parameter under both names."""
    (owner, key), (other, other_key) = (path.rpartition(".")[::2] for path in (name, kept))
    setattr(model.get_submodule(owner), key, getattr(model.get_submodule(other), other_key))


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


def _all_shapes(tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()} | {
        n: tensors[kept].shape for n, kept in tied.items()
    }


def _compare(wanted: Mapping[str, torch.Size], given: Mapping[str, torch.Size], what: str) -> None:
    """Every tensor that is missing, left over or of another shape is an error, by name."""
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is left over" for name in given if name not in wanted]
    problems += [
        f"{name} has shape {tuple(given[name])} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{what} must fit the model's tensors, got: {'; '.join(problems[:5])}{more}.")
