"""compression.checks"""

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from lowrank.factorization.methods import METHODS, READS
from lowrank.factorization.moments import LayerStatistics, all_finite
from lowrank.factorization.rank_allocation import STORAGES
from lowrank.nn.targets import is_conv1d, shared_weights


def _named(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, nn.Linear]:
    """The layers of `ranks`, in the order of the model."""
    if not ranks:
        raise ValueError("`ranks` must name at least one layer, got none.")
    modules = dict(model.named_modules())
    for name in ranks:
        if is_conv1d(modules.get(name)):
            raise ValueError(
                f"`ranks` must name nn.Linear layers, got {name!r}, a Conv1D: call lowrank.nn.surgery.unify_linears(model) first."
            )
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(f"`ranks` must name nn.Linear layers of the model, not patterns or others, got {name!r}.")
    return {name: module for name, module in modules.items() if name in ranks and isinstance(module, nn.Linear)}


def _check(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    ranks: Mapping[str, int],
    method: str,
    statistics: Mapping[str, LayerStatistics] | None,
    storage: str,
    centre: bool,
) -> None:
    """Everything that can be wrong, found before anything is changed."""
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {sorted(METHODS)}, got {method!r}.")
    if storage not in STORAGES:
        raise ValueError(f"`storage` must be one of {sorted(STORAGES)}, got {storage!r}.")
    if statistics is None and (READS[method] or centre):
        raise ValueError(
            f"`statistics` must be given for method {method!r}{', centred' * centre}: see "
            "lowrank.calibration.collect.collect_statistics."
        )
    shared = shared_weights(model, linears)
    for name, layer in linears.items():
        shape = tuple(layer.weight.shape)
        if not 1 <= ranks[name] <= min(shape):
            raise ValueError(
                f"`ranks` must be in [1, {min(shape)}] for layer {name!r} of shape {shape}, got {ranks[name]}."
            )
        if name in shared:
            raise ValueError(
                f"`ranks` must leave out layer {name!r}: its weight is shared ({', '.join(shared[name])}), and factors of one "
                "copy would be stored beside the other."
            )
        if not all_finite(layer.weight):
            raise ValueError(f"`model` must have finite weights, got NaN or infinity in layer {name!r}.")
        if statistics is not None and name not in statistics:
            raise ValueError(f"`statistics` must hold every layer of `ranks`, got none for layer {name!r}.")
        if isinstance(statistics, dict | MappingProxyType):  # others are made on demand, for this model, at a cost
            _check_statistics(name, layer, method, statistics[name], centre)


def _check_statistics(name: str, layer: nn.Linear, method: str, found: LayerStatistics, centre: bool) -> None:
    out, inputs = layer.weight.shape
    outs = out if found.gradient_gram is None else len(found.gradient_gram)
    if (outs, len(found.gram)) != (out, inputs):
        raise ValueError(
            f"`statistics` must be of this model: layer {name!r} has shape {(out, inputs)}, got moments for "
            f"{(outs, len(found.gram))}."
        )
    try:
        for part in READS[method]:
            part(found, layer.weight)
    except ValueError as error:
        raise ValueError(f"{error} (layer {name!r})") from error
    if centre and not all_finite(found.mean):
        raise ValueError(f"`statistics` must be finite, got NaN or infinity in the mean of layer {name!r}.")
