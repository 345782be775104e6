"""Find everything that can be wrong with a compression before anything is changed."""

import operator
from collections.abc import Mapping
from typing import Any

from torch import nn

from lowrank.calibration.on_demand import OnDemand
from lowrank.factorization.factorize import Factors
from lowrank.factorization.methods import METHODS
from lowrank.factorization.moments import MOMENTS, SIZES, LayerStatistics, all_finite
from lowrank.factorization.sides import check_reads
from lowrank.factorization.storages import STORAGES
from lowrank.io.checks import require
from lowrank.io.hashing import check_in_memory
from lowrank.nn.plain import find_obstacle
from lowrank.nn.quantized import QuantizedLinear
from lowrank.nn.targets import find_shared_weights, is_conv1d, refuse_root

Statistics = Mapping[str, LayerStatistics]


def find_layers(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, nn.Linear]:
    """Return the layers that `ranks` names, in the order of the model.

    **Arguments**

    - `model`: any PyTorch module.
    - `ranks`: layer name -> rank; patterns are not allowed.

    **Raises**

    - `ValueError`: no name, or a name that is no plain `nn.Linear` inside the model, see `lowrank.nn.plain.find_obstacle`.
    """
    require(len(ranks) > 0, "ranks", "name at least one layer", dict(ranks))
    refuse_root(model, nn.Linear)
    modules = dict(model.named_modules())
    for name in ranks:
        if is_conv1d(modules.get(name)):
            raise ValueError(
                f"`ranks` must name nn.Linear layers, got {name!r}, a Conv1D: call lowrank.unify_linears(model) first."
            )
        rule = "name nn.Linear layers of the model, not patterns or others"
        require(isinstance(modules.get(name), nn.Linear | QuantizedLinear), "ranks", rule, name)
        if reason := find_obstacle(modules[name], modules[name.rpartition(".")[0]]):
            raise ValueError(f"`ranks` must name plain linear layers: of {name!r}, {reason}.")
    return {name: module for name, module in modules.items() if name in ranks and isinstance(module, nn.Linear)}


def check_layers(model: nn.Module, layers: Mapping[str, nn.Linear], ranks: Mapping[str, int]) -> None:
    """Check that every layer can be replaced at its rank.

    **Arguments**

    - `model`: the model that holds the layers.
    - `layers`: layer name -> layer.
    - `ranks`: layer name -> rank.

    **Raises**

    - `ValueError`: weights that are not in memory; a rank that is no whole number in [1, min(out, in)]; a weight that another
      module shares or that is not finite; a layer with hooks on its forward pass.
    """
    weights = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    check_in_memory(weights | model.state_dict())
    shared = find_shared_weights(model, layers)
    for name, layer in layers.items():
        shape = tuple(layer.weight.shape)
        rule = f"be an int in [1, {min(shape)}] for layer {name!r} of shape {shape}"
        require(_is_whole(ranks[name]) and 1 <= ranks[name] <= min(shape), "ranks", rule, ranks[name])
        if name in shared:
            raise ValueError(
                f"`ranks` must leave out layer {name!r}: its weight is shared ({', '.join(shared[name])}), and factors of one "
                "copy would be stored beside the other."
            )
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise ValueError(
                f"`model` must have no forward hooks on layer {name!r}, which would be lost with it: remove them first."
            )
        if not all_finite(layer.weight):
            raise ValueError(f"`model` must have finite weights, got NaN or infinity in layer {name!r}.")


def _is_whole(rank: Any) -> bool:
    try:
        operator.index(rank)
    except TypeError:
        return False
    return True


def check_statistics(
    layers: Mapping[str, nn.Linear], method: str, storage: str, statistics: Statistics | None, centre: bool
) -> None:
    """Check method, storage and the statistics of every layer.

    Statistics that are collected on demand are of this model and cost a pass each: they are checked when they are used.

    **Arguments**

    - `layers`: layer name -> layer.
    - `method`: a key of `METHODS`.
    - `storage`: a key of `STORAGES`.
    - `statistics`: layer name -> `LayerStatistics`, or None.
    - `centre`: whether the means are needed too.

    **Raises**

    - `ValueError`: an unknown method or storage; statistics that are missing, of another model or not finite.
    """
    require(method in METHODS, "method", f"be one of {sorted(METHODS)}", method)
    require(storage in STORAGES, "storage", f"be one of {sorted(STORAGES)}", storage)
    for name, layer in layers.items():
        if statistics is not None and name not in statistics:
            raise ValueError(f"`statistics` must hold every layer of `ranks`, got none for layer {name!r}.")
        if isinstance(statistics, OnDemand):
            continue
        if statistics is not None:
            _check_sizes(name, layer, statistics[name])
        elif centre:
            raise ValueError("`statistics` must be given to centre inputs, got None: see collect_statistics.")
        try:
            check_reads(None if statistics is None else statistics[name], method, layer.weight)
        except ValueError as error:
            raise ValueError(f"{error} (method {method!r}, layer {name!r})") from error
        if centre and statistics is not None and not all_finite(statistics[name].mean):
            raise ValueError(f"`statistics` must be finite, got NaN or infinity in the mean of layer {name!r}.")


def _check_sizes(name: str, layer: nn.Linear, moments: LayerStatistics) -> None:
    for field, value in moments.moments().items():
        size = layer.weight.shape[SIZES[MOMENTS[field]["of"]]]
        if value.dim() and value.shape[-1] != size + MOMENTS[field]["random"]:
            shape = tuple(layer.weight.shape)
            raise ValueError(
                f"`statistics` must be of this model: layer {name!r} has shape {shape}, got {MOMENTS[field]['label']} of size "
                f"{value.shape[-1]}."
            )


def check_factors(
    layers: Mapping[str, nn.Linear], ranks: Mapping[str, int], factors: Mapping[str, Factors] | None
) -> None:
    """Check that factors made before fit the layers and reach their ranks.

    **Arguments**

    - `layers`: layer name -> layer.
    - `ranks`: layer name -> rank.
    - `factors`: layer name -> `Factors`, or None.

    **Raises**

    - `ValueError`: no factors for a layer, or of another shape, or of a smaller rank.
    """
    for name, layer in layers.items() if factors is not None else ():
        weights = None if factors is None else factors.get(name)
        sizes = None if weights is None else (weights.left.shape[0], weights.right.shape[1], weights.rank)
        shape = tuple(layer.weight.shape)
        if sizes is None or sizes[:2] != shape or sizes[2] < ranks[name]:
            passed = "none" if sizes is None else f"shape {sizes[:2]}, rank {sizes[2]}"
            raise ValueError(f"`factors` must fit layer {name!r} of shape {shape} at rank {ranks[name]}, got {passed}.")
