"""Statistics in one safetensors file, with the hash of the model that they belong to; and their own hash."""

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import NonNegativeInt, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank.factorization.moments import MOMENTS, SIZES, LayerStatistics
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.files import open_safetensors, writing
from lowrank.io.hashing import hash_model, hash_tensors
from lowrank.io.schemas import Schema, one_of, parse_json
from lowrank.io.tensor_places import tensor_place
from lowrank.nn.targets import find_linears

FORMAT = "lowrank.statistics/3"


class _StoredLayer(Schema):
    """Hold the number of tokens of a layer, and the tensor that each of its moments is stored as."""

    tokens: NonNegativeInt
    moments: dict[Annotated[str, one_of(MOMENTS)], str]

    @model_validator(mode="after")
    def _check_mean(self) -> "_StoredLayer":
        if "mean" not in self.moments:
            raise ValueError("have a tensor for the moment 'mean'")
        return self


def hash_statistics(statistics: LayerStatistics) -> str:
    """Hash all fields that are present, 32 hex digits: equal statistics give equal hashes."""
    return hash_tensors(statistics.moments() | {"tokens": torch.tensor(statistics.tokens)})


@check_arguments
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


@check_arguments
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
      does not have; a moment of another shape or dtype.
    """
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    _check_metadata(path, metadata, model, data)
    layers = parse_json(metadata["layers"], "path", path, dict[str, _StoredLayer])
    linears = find_linears(model, layers) if layers else {}
    statistics: dict[str, LayerStatistics] = {}
    for name, layer in layers.items():
        keys: dict[str, str] = layer["moments"]
        lacking = sorted(key for key in keys.values() if key not in tensors)
        require(not lacking, "path", f"hold the tensors that it names for {name!r} ({str(path)!r})", lacking)
        stored = {"gram": None} | {field: tensors[key] for field, key in keys.items()}
        statistics[name] = LayerStatistics(tokens=layer["tokens"], **stored)  # pyright: ignore[reportArgumentType]
        _check_sizes(statistics[name], linears[name].weight, name)
    return statistics


def _check_sizes(statistics: LayerStatistics, weight: Tensor, name: str) -> None:
    for field, value in statistics.moments().items():
        size = weight.shape[SIZES[MOMENTS[field]["of"]]] + MOMENTS[field]["random"]
        if value.dim() and value.shape[-1] != size:
            raise ValueError(
                f"`model` must fit the statistics: {name!r} takes {MOMENTS[field]['label']} of size {size}, got "
                f"{value.shape[-1]}."
            )


def _check_metadata(path: Path | str, metadata: Mapping[str, str], model: nn.Module, data: str | None) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"`path` must have format {FORMAT!r}, got {metadata.get('format')!r} in {str(path)!r}.")
    for key in ("model", "data", "layers"):
        require(key in metadata, "path", f"have the metadata {key!r}", str(path))
    weights = hash_model(model, len(metadata["model"]))
    if metadata["model"] != weights:
        raise ValueError(f"`model` must be the one of {str(path)!r} (weights {metadata['model']}), got {weights}.")
    if data is not None and metadata["data"] != data:
        raise ValueError(f"`data` must be that of {str(path)!r} ({metadata['data']!r}), got {data!r}.")
