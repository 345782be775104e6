"""Store factors at full rank once, and cut them to any size later, with the ranks that `compress` would have chosen."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lowrank.calibration.storage import hash_statistics
from lowrank.compression.allocation import choose_ranks
from lowrank.compression.allocator import Allocator
from lowrank.compression.checks import Statistics, check_layers, check_statistics, find_layers
from lowrank.compression.configuration import Configuration
from lowrank.compression.pretrained import set_record
from lowrank.compression.replace import decompose, spectrum_of
from lowrank.compression.result import dense_row
from lowrank.compression.stored_state import RECORD
from lowrank.factorization.factorize import Factors
from lowrank.factorization.rank_allocation import kept_parameters
from lowrank.factorization.storages import STORAGES
from lowrank.io.checks import require
from lowrank.io.hashing import hash_model
from lowrank.nn.nested import NestedLinear
from lowrank.nn.surgery import copy_mode, replace_module

ANY = "any"  # the `keep` that stores factors at full rank
LATER = ("storage", "allocation", "multiple")  # fields of a configuration that decide when layers are cut


def check_nestable(configuration: Configuration) -> None:
    """Check that ranks can be chosen later without data or the dense model.

    **Arguments**

    - `configuration`: how to compress.

    **Raises**

    - `ValueError`: retargeting, which depends on ranks; a rule for ranks that measures or reads the spectra of another method.
    """
    text = f"be None for keep={ANY!r}: what layers are aimed at depends on the ranks in front"
    require(configuration.retarget is None, "retarget", text, configuration.retarget)
    read = {"uniform": None, "first_dense": None, "spectrum": "two_sided"}  # rule -> the method whose spectra it needs
    known = [name for name, method in read.items() if method in (None, configuration.method)]
    text = f"be one of {known} for keep={ANY!r} and method {configuration.method!r}, whose ranks are chosen later"
    require(configuration.allocation in known, "allocation", text, configuration.allocation)


@torch.inference_mode(False)  # the new parameters may be trained
def nest_layers(
    model: nn.Module,
    layers: Iterable[str],
    configuration: Configuration,
    statistics: Statistics | None,
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Replace linear layers by their factors at full rank, in place, so that `cut_layers` can cut them to any size.

    Each layer costs two decompositions. A weight (m, n) becomes min(m, n) (m + n) parameters, more than it has.

    **Arguments**

    - `model`: any PyTorch module.
    - `layers`: names of layers.
    - `configuration`: method and centring; storage, allocation and multiple are recorded for the cut.
    - `statistics`: layer name -> `LayerStatistics`; `svd` needs none.
    - `progress`: show a bar over the layers.

    **Returns** one row per layer as `replace_layers` returns them, with storage 'nested', the `measured_error` of rounding the
    weight, relative and not weighted, and `cut`, what decides later.

    **Raises**

    - `ValueError`, before anything is changed: as for `check_nestable` and `replace_layers`.
    """
    check_nestable(configuration)
    ranks = dict.fromkeys(layers, 1)
    linears = find_layers(model, ranks)
    check_layers(model, linears, ranks)
    check_statistics(linears, configuration.method, configuration.storage, statistics, configuration.centre)
    record: dict[str, Any] = getattr(model, RECORD, None) or {"model": hash_model(model), "layers": {}}
    rows: dict[str, dict[str, Any]] = {}
    order = list(linears)
    for name in tqdm(order[::-1], "factorize", unit="layer", leave=False, disable=not progress):
        module, rows[name] = _nest(model, name, linears.pop(name), configuration, statistics)
        replace_module(model, name, module)
    set_record(model, record | {"layers": record["layers"] | rows})
    return [rows[name] for name in order]


def _nest(
    model: nn.Module, name: str, layer: nn.Linear, configuration: Configuration, statistics: Statistics | None
) -> tuple[NestedLinear, dict[str, Any]]:
    method, centre = configuration.method, configuration.centre
    factors = decompose(model, method, statistics, [name], centre=centre)[name]
    spectrum = spectrum_of(layer, name, method, statistics, centre)  # to the last bit what ranks are chosen by
    nested = NestedLinear.from_factors(replace(factors, spectrum=spectrum), layer.bias, layer.weight.dtype)
    centred = centre and layer.bias is not None
    if centred and statistics is not None:
        nested.set_mean(statistics[name].mean)
    weight = layer.weight.detach().to(factors.left.device).double()
    row = dense_row(name, layer, method)
    parameters = sum(part.numel() for part in (factors.left, factors.right))
    return copy_mode(nested.to(layer.weight.device), layer), row | {
        "storage": nested.storage,
        "centre": centred,
        "parameters": parameters,
        "keep": parameters / row["parameters"],
        "measured_error": float((nested.dense().to(weight) - weight).norm() / (weight.norm() or 1.0)),
        "measured_on": "weight",
        "statistics": None if statistics is None else hash_statistics(statistics[name]),
        "cut": {field: getattr(configuration, field) for field in LATER},
    }


@torch.inference_mode(False)
def cut_layers(model: nn.Module, keep: float | int) -> list[dict[str, Any]]:
    """Cut factors at full rank to a budget, in place: to the model that `compress` gives for this `keep`, up to rounding.

    **Arguments**

    - `model`: with layers that `compress(..., keep="any")` has made, or loaded from a folder of such a model.
    - `keep`: share of the targeted weights' parameters to keep, in (0, 1].

    **Returns** one row per layer, as `replace_layers` returns them; `measured_error` is None for layers that are cut, since the
    moments to measure it with are gone.

    **Raises**

    - `ValueError`, before anything is changed: no such layers; a budget too small; layers that were made in different ways.
    """
    nested = {name: module for name, module in model.named_modules() if isinstance(module, NestedLinear)}
    text = f"hold factors at full rank, as `compress(..., keep={ANY!r})` leaves them"
    require(len(nested) > 0, "model", text, "none")
    record: dict[str, Any] = getattr(model, RECORD, {"model": None, "layers": {}})
    rows = {name: record["layers"].get(name, {}) for name in nested}
    configuration = _read_configuration(rows)
    known = Allocator(model, tuple(nested), None)
    known.shapes = {name: (layer.out_features, layer.in_features) for name, layer in nested.items()}
    key = configuration.method, configuration.centre
    known._spectra[key] = {name: layer.spectrum for name, layer in nested.items()}
    ranks = choose_ranks(known, configuration, float(keep))
    for name, layer in nested.items():
        module, rows[name] = _cut(layer, rows[name], ranks[name], configuration.storage)
        replace_module(model, name, module)
    set_record(model, record | {"layers": record["layers"] | rows})
    return list(rows.values())


def _read_configuration(rows: Mapping[str, Mapping[str, Any]]) -> Configuration:
    """Return how layers were made and how they are to be cut, from their rows."""
    known = [{"method": row.get("method"), **row.get("cut", {})} for row in rows.values()]
    whole = all(one.keys() == {"method", *LATER} for one in known)
    require(whole, "model", f"have rows with `method` and `cut` of {list(LATER)} for its nested layers", known[0])
    text = "have nested layers of one call of `compress`, to share a budget"
    require(all(one == known[0] for one in known), "model", text, [one for one in known if one != known[0]][:1])
    configuration = Configuration(**known[0], centre=any(row.get("centre") for row in rows.values()))
    check_nestable(configuration)
    return configuration


def _cut(layer: NestedLinear, row: Mapping[str, Any], rank: int, storage: str) -> tuple[nn.Module, dict[str, Any]]:
    shape = layer.out_features, layer.in_features
    parameters, dense = kept_parameters(shape, rank, storage), shape[0] * shape[1]
    whole = parameters == dense
    kept = Factors(layer.left.weight[:, :rank], layer.right.weight[:rank], layer.spectrum)
    about = {key: value for key, value in row.items() if key not in ("cut", "kind", "bias")}  # as a folder has it
    return layer.cut(rank, "dense" if whole else storage), about | {
        "rank": layer.rank if whole else rank,
        "storage": "dense" if whole else storage,
        "centre": not whole and row["centre"],
        "parameters": parameters,
        "indices": 0 if whole else STORAGES[storage].indices(rank),
        "keep": parameters / dense,
        "predicted_error": 0.0 if whole else kept.error / (kept.norm or 1.0),
        "measured_error": 0.0 if whole else None,
        "measured_on": None,
    }
