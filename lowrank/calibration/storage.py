"""Statistics in one safetensors file, with the hash of the model that they belong to; and their own hash."""

import json
from collections.abc import Hashable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank.factorization.moments import LayerStatistics
from lowrank.io.files import open_safetensors, writing
from lowrank.io.hashing import hash_model, hash_tensors
from lowrank.io.tensor_places import tensor_place
from lowrank.nn.targets import find_linears

FORMAT = "lowrank.statistics/3"


def hash_statistics(statistics: LayerStatistics) -> str:
    """Hash all fields that are present, 16 hex digits: equal statistics give equal hashes."""
    return hash_tensors(statistics.moments() | {"tokens": torch.tensor(statistics.tokens)})


def save_statistics(path: Path | str, statistics: Mapping[str, LayerStatistics], model: nn.Module, data: str) -> None:
    """Write statistics to one safetensors file, with the hash of the model that they belong to.

    Shared moments are written once, and the side of each layer beside them. The file appears whole or not at all.

    **Arguments**

    - `path`: the file to write.
    - `statistics`: layer name -> `LayerStatistics`.
    - `model`: the model that they were collected from.
    - `data`: names the data that they were collected from; `load_statistics` compares it.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, object]] = {}
    keys: dict[Hashable, str] = {}  # a tensor that layers share is stored under its first name
    for name, layer in statistics.items():
        names = {
            field: keys.setdefault(tensor_place(value), f"{name}/{field}") for field, value in layer.moments().items()
        }
        layers[name] = {"tokens": layer.tokens, "side": layer.side, "moments": names}
        tensors |= {names[field]: value.contiguous().cpu() for field, value in layer.moments().items()}
    metadata = {"format": FORMAT, "model": hash_model(model), "data": data, "layers": json.dumps(layers)}
    with writing(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def load_statistics(path: Path | str, model: nn.Module, data: str | None = None) -> dict[str, LayerStatistics]:
    """Read statistics from a file, for the model that they belong to.

    **Arguments**

    - `path`: a file written by `save_statistics`.
    - `model`: the model that they were collected from.
    - `data`: the name of the data that they must be from. Default None, any.

    **Returns** layer name -> `LayerStatistics`, on the CPU. Layers that share an input share its tensors.

    **Raises**

    - `FileNotFoundError`: no such file.
    - `ValueError`: a file that is damaged or of another format, for other weights or other data, or with a layer that the model
      does not have.
    """
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    _check_metadata(path, metadata, model, data)
    layers = json.loads(metadata["layers"])
    linears = find_linears(model, layers)
    statistics: dict[str, LayerStatistics] = {}
    for name, layer in layers.items():
        stored = {"gram": None} | {field: tensors[key] for field, key in layer["moments"].items()}
        statistics[name] = LayerStatistics(tokens=layer["tokens"], **stored)  # pyright: ignore[reportArgumentType]
        inputs = len(statistics[name].mean)
        if inputs != linears[name].in_features:
            raise ValueError(f"`model` must have {inputs} inputs at {name!r}, got {linears[name].in_features}.")
    return statistics


def _check_metadata(path: Path | str, metadata: Mapping[str, str], model: nn.Module, data: str | None) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"`path` must have format {FORMAT!r}, got {metadata.get('format')!r} in {str(path)!r}.")
    weights = hash_model(model)
    if metadata["model"] != weights:
        raise ValueError(f"`model` must be the one of {str(path)!r} (weights {metadata['model']}), got {weights}.")
    if data is not None and metadata["data"] != data:
        raise ValueError(f"`data` must be that of {str(path)!r} ({metadata['data']!r}), got {data!r}.")
