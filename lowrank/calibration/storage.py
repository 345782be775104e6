"""Statistics on disk: one safetensors file, under the hash of the model that they were made for."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank.factorization.moments import LayerStatistics
from lowrank.io.hashing import hash_model
from lowrank.nn.targets import find_linears

FORMAT = "lowrank.statistics/2"
SHARED, OWN = ("gram", "mean", "abs_mean"), ("gradient_gram", "row_fisher")  # by layers with one input; by one layer


def save_statistics(path: Path | str, statistics: Mapping[str, LayerStatistics], model: nn.Module, data: str) -> None:
    """Writes statistics to one safetensors file, under the hash of the model they were made for.

    Shared moments are written once. The file appears whole or not at all.

    **Arguments:** `data`: says which data they come from; `load_statistics` compares it.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, object]] = {}
    stored: dict[int, str] = {}
    for name, layer in statistics.items():
        leader = stored.setdefault(layer.gram.data_ptr(), name)
        layers[name] = {"leader": leader, "tokens": layer.tokens}
        if leader == name:
            tensors |= {f"{name}/{field}": getattr(layer, field) for field in SHARED}
        tensors |= {f"{name}/{field}": value for field in OWN if (value := getattr(layer, field)) is not None}
    about = {"format": FORMAT, "model": hash_model(model), "data": data, "layers": json.dumps(layers)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, partial, metadata=about)
    partial.replace(path)


def load_statistics(path: Path | str, model: nn.Module, data: str | None = None) -> dict[str, LayerStatistics]:
    """Reads statistics back, on the CPU, for the model they were made for.

    **Raises:** `ValueError`: the file is damaged or not of this format, was made for other weights or, where `data` is
    given, from other data, or names a layer that the model does not have. `FileNotFoundError`: no such file.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"`path` must be a file written by save_statistics, and {str(path)!r} does not exist.")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"`path` must be a whole safetensors file, got {str(path)!r}: {error}.") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"`path` must have format {FORMAT!r}, got {about.get('format')!r} in {str(path)!r}.")
    if about["model"] != hash_model(model):
        raise ValueError(
            f"`model` must be the one of {str(path)!r} (weights {about['model']}), got {hash_model(model)}."
        )
    if data is not None and about["data"] != data:
        raise ValueError(f"`data` must be that of {str(path)!r} ({about['data']!r}), got {data!r}.")
    layers = json.loads(about["layers"])
    linears = find_linears(model, layers)
    done: dict[str, LayerStatistics] = {}
    for name, layer in layers.items():
        leader = layer["leader"]
        gram, mean, abs_mean = (tensors[f"{leader}/{field}"] for field in SHARED)
        if len(gram) != linears[name].in_features:
            raise ValueError(f"`model` must have {len(gram)} inputs at {name!r}, got {linears[name].in_features}.")
        gradient_gram, row_fisher = (tensors.get(f"{name}/{field}") for field in OWN)
        done[name] = LayerStatistics(gram, layer["tokens"], mean, abs_mean, gradient_gram, row_fisher)
    return done
