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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank.compression.architecture import (
    _own_base,
    _restructure,
    _save_config,
    _skeleton,
    _structure,
)
from lowrank.io.hashing import hash_tensors
from lowrank.io.weights import distinct_tensors

FORMAT = "lowrank.compressed/1"
RECORD = "lowrank_record"  # the attribute of a compressed model that tells how it was made
TENSORS, ABOUT = "model.safetensors", "lowrank.json"
FILES = {TENSORS, ABOUT, "config.json", "generation_config.json"}
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


def _share(model: nn.Module, name: str, kept: str) -> None:
    """One parameter under both names."""
    (owner, key), (other, other_key) = (path.rpartition(".")[::2] for path in (name, kept))
    setattr(model.get_submodule(owner), key, getattr(model.get_submodule(other), other_key))


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
