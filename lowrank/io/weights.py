"""Read the tensors of a checkpoint by name, one at a time.

A checkpoint is a folder with `model.safetensors` or its shards, a single such file, a Hub name, or a model in memory.
"""

import hashlib
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lowrank.io.checks import require
from lowrank.io.files import open_safetensors, path_inside
from lowrank.io.hashing import check_in_memory, hash_model, hash_options
from lowrank.io.hub import load_or_explain
from lowrank.io.patterns import matches
from lowrank.io.schemas import Schema, read_json
from lowrank.io.tensor_places import byte_range, tensor_place

Source = Path | str | nn.Module
SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


class _ShardIndex(Schema):
    weight_map: dict[str, str] = Field(min_length=1)


class ModelConfig(Schema):
    """Hold what is read of a `config.json`.

    **Arguments**

    - `model_type`: the architecture, None if it is not named.
    - `architectures`: names of classes, None if they are not named.
    """

    model_type: str | None = None
    architectures: list[str] | None = None


@dataclass(frozen=True)
class OpenWeights:
    """Hold the names and shapes of a checkpoint, and read a tensor on request.

    **Arguments**

    - `shapes`: tensor name -> shape.
    - `read`: function from a tensor name to the tensor.
    - `architecture`: `model_type` of the configuration, None if it has none.
    - `files`: the safetensors files, empty for a model in memory.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    architecture: str | None
    files: list[Path]


@contextmanager
def open_weights(source: Source, name: str) -> Iterator[OpenWeights]:
    """Open a checkpoint without reading a tensor.

    **Arguments**

    - `source`: a folder, a safetensors file, a Hub name or a model.
    - `name`: the argument to name in errors.

    **Raises**

    - `FileNotFoundError`: no such checkpoint, or a shard of its index is missing.
    - `ValueError`: a file is damaged; the index names a file outside of the folder; a tensor that is read is on the meta device.
    """
    if isinstance(source, nn.Module):
        state = source.state_dict()
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}

        def read_state(key: str) -> Tensor:
            check_in_memory({key: state[key]})
            return state[key]

        yield OpenWeights(shapes, read_state, _architecture(getattr(source, "config", None)), [])
        return
    file_of: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    files = _find_files(source, name)
    for path in files:
        with open_safetensors(path, name) as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                file_of[key], shapes[key] = path, tuple(file.get_slice(key).get_shape())

    def read(key: str) -> Tensor:
        with open_safetensors(file_of[key], name) as file:  # a file that stays open stays in memory once read
            return file.get_tensor(key)

    config_file = files[0].parent / CONFIG
    config = read_json(config_file, name, ModelConfig) if config_file.exists() else None
    yield OpenWeights(shapes, read, _architecture(config), files)


def _architecture(config: Any) -> str | None:
    return (config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)) or None


def _find_files(source: Path | str, name: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        path = _download(source, name)
    if (index := path / INDEX).exists():
        names = sorted(set(read_json(index, name, _ShardIndex)["weight_map"].values()))
        root = path.parents[1] if path.parent.name == "snapshots" else path  # in the Hub's cache all files are links
        shards = [path_inside(path, shard, name, root) for shard in names]
        if missing := [shard.name for shard in shards if not shard.exists()]:
            raise FileNotFoundError(
                f"`{name}` must hold every shard of its index, got {str(path)!r} without {missing[0]!r}."
            )
        return shards
    if (single := path / SINGLE).exists():
        return [single]
    raise FileNotFoundError(f"`{name}` must be a folder with {SINGLE} or {INDEX}, got {str(path)!r} with neither.")


def _download(source: Path | str, name: str) -> Path:
    if Path(source).is_absolute() or str(source).count("/") > 1 or str(source).startswith("."):
        raise FileNotFoundError(f"`{name}` must be a folder, a safetensors file or a Hub name, got {str(source)!r}.")
    import huggingface_hub  # noqa: PLC0415

    patterns = ["*.safetensors", "*.safetensors.index.json", CONFIG]
    load = lambda: huggingface_hub.snapshot_download(str(source), allow_patterns=patterns)  # noqa: E731
    return Path(load_or_explain("checkpoint", str(source), load))


def read_tensors(source: Source, modules: Iterable[str]) -> dict[str, Tensor]:
    """Read the parameters of some modules and nothing else of a checkpoint.

    **Arguments**

    - `source`: a folder, a safetensors file, a Hub name or a model.
    - `modules`: dotted names of modules; all their parameters are read.

    **Returns** tensor name -> tensor.

    **Raises**

    - `FileNotFoundError`: see `open_weights`.
    - `ValueError`: a module has no parameters in `source`, or a file is damaged.
    """
    with open_weights(source, "source") as weights:
        tensors = {}
        for module in modules:
            names = [name for name in weights.shapes if name.startswith(f"{module}.")]
            require(bool(names), "modules", "have parameters in `source`", module)
            tensors |= {name: weights.read(name) for name in names}
        return tensors


def hash_source(source: Source) -> str:
    """Hash the bytes of a checkpoint's files, or the tensors of a model in memory."""
    if isinstance(source, nn.Module):
        return hash_model(source)
    with open_weights(source, "source") as weights:
        files = weights.files
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "blake2b").hexdigest())
    return hash_options(sorted(digests))


def match_modules(shapes: Mapping[str, tuple[int, ...]], layers: Iterable[str]) -> set[str]:
    """Find the modules with a weight of two or more dimensions that match an entry of `layers`.

    **Arguments**

    - `shapes`: tensor name -> shape, as in `OpenWeights`.
    - `layers`: module names, or regular expressions that must match a whole name.
    """
    entries = list(layers)
    modules = {name.removesuffix(".weight") for name, s in shapes.items() if name.endswith(".weight") and len(s) >= 2}
    return {name for name in modules if any(matches(name, entry) for entry in entries)}


def match_stacks(shapes: Mapping[str, tuple[int, ...]], layers: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Find the tensors that are stacks of matrices, as experts are stored, and that match an entry of `layers`.

    **Arguments**

    - `shapes`: tensor name -> shape, without the weights of convolutions.
    - `layers`: names of tensors or of their modules, or regular expressions that must match one of the two as a whole.

    **Returns** name -> (matrices, rows, columns).
    """
    entries = list(layers)
    return {
        name: tuple(shape)
        for name, shape in shapes.items()
        if len(shape) == 3 and min(shape) > 1
        for names in [(name, name.rpartition(".")[0])]
        if any(entry in names or any(matches(one, entry) for one in names) for entry in entries)
    }


class LeftOutWarning(UserWarning):
    """Warn that weights which the entries of `layers` match are left out."""


def warn_of_stacks(stacks: Mapping[str, tuple[int, ...]], share: float, stacklevel: int = 3) -> None:
    """Warn of stacks of matrices that are left out, if there are any.

    **Arguments**

    - `stacks`: name -> shape, see `match_stacks`.
    - `share`: of the model's parameters that is in scope, in [0, 1].
    - `stacklevel`: as in `warnings.warn`; default 3, the caller of the caller.
    """
    for name, shape in list(stacks.items())[:1]:
        warnings.warn(
            f"`layers` cover {share:.1%} of the model's parameters: {len(stacks)} stacks of matrices are left as they are, such "
            f"as {name!r} of shape {shape}, since only layers with a weight of their own are handled.",
            LeftOutWarning,
            stacklevel=stacklevel + 1,
        )


def check_weight(weight: Tensor, layer: str, name: str) -> None:
    """Check that a weight holds its numbers as they are, not the bytes of a packed format.

    **Arguments**

    - `weight`: the weight.
    - `layer`: its layer.
    - `name`: the argument to name in errors.

    **Raises**

    - `ValueError`: integers, a floating dtype of 8 bits or fewer, or no number at all.
    """
    plain = weight.is_floating_point() and weight.element_size() > 1
    rule = f"have weights in a floating dtype of 16 bits or more (layer {layer!r}): unpack the weights first"
    require(plain, name, rule, str(weight.dtype))
    require(weight.numel() > 0, name, f"have weights that are not empty (layer {layer!r})", tuple(weight.shape))


def distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split the state of a model into distinct tensors and tied names.

    Tensors that overlap in memory without being one, such as a matrix and its transpose, are stored apart.

    **Returns** name -> tensor, contiguous on the CPU, each tensor once; and name -> the name that its tensor is stored
    under, for every further name of the same tensor.

    **Raises**

    - `ValueError`: a tensor on the meta device.
    """
    distinct: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    ranges: dict[int, list[tuple[int, int]]] = {}  # of each storage, what is in use
    state = model.state_dict()
    check_in_memory(state)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):  # extra state
            continue
        if (stored := first.setdefault(tensor_place(tensor), name)) != name:
            tied[name] = stored
            continue
        storage, start, end = byte_range(tensor)
        overlaps = any(start < other_end and other < end for other, other_end in ranges.get(storage, ()))
        ranges.setdefault(storage, []).append((start, end))
        tensor = tensor.detach().cpu()
        distinct[name] = tensor.clone(memory_format=torch.contiguous_format) if overlaps else tensor.contiguous()
    return distinct, tied
