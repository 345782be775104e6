"""Save and load compressed models: a folder with `model.safetensors`, the configuration of the base model, and `lowrank.json`.

Loading builds the base architecture without weights, inserts the recorded layers and reads the tensors. Every tensor is checked
by name and shape. No weight of the dense model is needed, and nothing is unpickled.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank.compression.architecture import (
    build_skeleton,
    describe_base,
    describe_layers,
    insert_layers,
    save_config,
)
from lowrank.compression.record_schema import CompressedRecord
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.files import open_safetensors, writing
from lowrank.io.hashing import hash_tensors
from lowrank.io.records import read_record
from lowrank.io.weights import distinct_tensors

FORMAT = "lowrank.compressed/1"
RECORD = "lowrank_record"  # attribute of a compressed model: the hash of its dense weights, and the table of its layers
TENSORS, METADATA = "model.safetensors", "lowrank.json"
FILES = {TENSORS, METADATA, "config.json", "generation_config.json"}


@check_arguments
def save_compressed(model: nn.Module, folder: Path | str, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write a compressed model to a folder, whole or not at all.

    **Arguments**

    - `model`: a model that `compress` has changed, or any other with layers of this library; it is not changed.
    - `folder`: a new or empty folder, or one with a compressed model, which is replaced.
    - `base`: how to build the base architecture, `{"timm": name, "options": {...}}` with the name of a timm model or model class
      and its keyword arguments. Models of transformers and of `timm.create_model` need none. For a model of neither library,
      pass the dense architecture to `load_compressed`.

    **Returns** the content of `lowrank.json`:

    - `format`: "lowrank.compressed/1".
    - `base`: the description of the base architecture, or None.
    - `model`: the hash of the dense weights, or None for a model that `compress` has not changed.
    - `layers`: layer -> its row in the table of `compress`, with its kind and sizes.
    - `parameters`, `indices`: numbers of stored elements.
    - `tensors`: the hash of the stored tensors.
    - `tied`: name -> the name that its tensor is stored under, for tied weights.

    **Raises**

    - `ValueError`: a folder with other content; a base that does not fit the model. The folder stays as it was.
    """
    folder = Path(folder)
    _check_content(folder)
    tensors, tied = distinct_tensors(model)
    record: dict[str, Any] = getattr(model, RECORD, {})
    metadata = {
        "format": FORMAT,
        "base": dict(base) if base is not None else describe_base(model),
        "model": record.get("model"),
        "layers": {},
        "parameters": sum(t.numel() for t in tensors.values() if t.is_floating_point()),
        "indices": sum(t.numel() for name, t in tensors.items() if name.endswith(".pivots")),
        "tensors": hash_tensors(tensors),
        "tied": tied,
    }
    with writing(folder) as partial:
        partial.mkdir()
        save_config(model, partial)
        skeleton = build_skeleton(metadata["base"], partial)
        metadata["layers"] = describe_layers(model, skeleton, record.get("layers", {}))
        _check_rebuild(metadata, partial, tensors)
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        (partial / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf8")
    return metadata


@check_arguments
def load_compressed(
    folder: Path | str, device: torch.device | str = "cpu", architecture: nn.Module | None = None
) -> nn.Module:
    """Load a compressed model, in evaluation mode and in the dtypes it was saved in.

    **Arguments**

    - `folder`: a folder that `save_compressed` wrote.
    - `device`: where the tensors go; default: the CPU.
    - `architecture`: for a model of neither transformers nor timm, the dense model. It is changed in place and returned; its
      weights do not matter.

    **Returns** the model.

    **Raises**

    - `FileNotFoundError`: no such folder, or a missing file.
    - `ValueError`: a damaged file; another format; a tensor that is missing, left over, or of another shape.
    """
    folder = Path(folder)
    if missing := [name for name in (METADATA, TENSORS) if not (folder / name).exists()]:
        raise FileNotFoundError(
            f"`folder` must contain a model written by save_compressed, got {str(folder)!r} without {missing}."
        )
    metadata = read_record(folder / METADATA, FORMAT, CompressedRecord, "save_compressed", "folder")
    with open_safetensors(
        folder / TENSORS, "folder", str(device)
    ) as file:  # copies: a tensor as read stays mapped to the file
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    model = architecture if architecture is not None else build_skeleton(metadata["base"], folder)
    if model is None:
        raise ValueError("`architecture` must be the dense model, for one of neither transformers nor timm, got None.")
    insert_layers(model, metadata["layers"])
    for name, stored in metadata["tied"].items():
        require(stored in tensors, "folder", f"hold the tensor that {name!r} is tied to", stored)
    state = _untie(tensors, metadata["tied"])
    _compare_shapes(_shapes(model.state_dict()), _shapes(state), "folder")
    if hash_tensors(tensors) != metadata["tensors"]:
        raise ValueError(
            f"`folder` must contain the tensors that {METADATA} was written for, got others in {str(folder)!r}."
        )
    model.load_state_dict(state, strict=True, assign=True)
    for name, stored in metadata["tied"].items():
        _tie_parameter(model, name, stored)
    layers = {name: row for name, row in metadata["layers"].items() if "method" in row}
    setattr(model, RECORD, {"model": metadata["model"], "layers": layers})
    return model.to(device).eval()


def _check_content(folder: Path) -> None:
    """Refuse to replace a folder that is not a compressed model."""
    other = {path.name for path in folder.iterdir()} - FILES if folder.exists() else set()
    if other:
        raise ValueError(
            f"`folder` must be new, empty or contain only a compressed model to replace, got {sorted(other)[0]!r} in "
            f"{str(folder)!r}."
        )


def _check_rebuild(metadata: Mapping[str, Any], folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Rebuild the architecture as `load_compressed` will, and check that every tensor fits."""
    if (model := build_skeleton(metadata["base"], folder)) is not None:
        insert_layers(model, metadata["layers"])
        _compare_shapes(_shapes(model.state_dict()), _shapes(_untie(tensors, metadata["tied"])), "base")


def _tie_parameter(model: nn.Module, name: str, stored: str) -> None:
    """Put the parameter called `stored` under a second name too."""
    (owner, key), (other_owner, other_key) = (path.rpartition(".")[::2] for path in (name, stored))
    setattr(model.get_submodule(owner), key, getattr(model.get_submodule(other_owner), other_key))


def _untie(tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the whole state: the stored tensors, and the same tensors under their tied names."""
    return {**tensors, **{name: tensors[stored] for name, stored in tied.items() if stored in tensors}}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _compare_shapes(expected: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size], argument: str) -> None:
    """Raise an error that names tensors that are missing, left over or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} is left over" for name in shapes if name not in expected]
    problems += [
        f"{name} has shape {tuple(shapes[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"`{argument}` must fit the model's tensors, got: {'; '.join(problems[:5])}{more}.")
