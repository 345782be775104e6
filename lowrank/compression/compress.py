"""Models whose linear layers are stored as factors: really smaller, really faster where the hardware lets them.

`compress` replaces layers one at a time, `fold` multiplies them out again, `save_compressed` and `load_compressed` keep them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lowrank.compression.architecture import KINDS
from lowrank.compression.checkpoint import RECORD
from lowrank.compression.checks import _check, _named
from lowrank.factorization.methods import METHODS, NORMS, Factors
from lowrank.factorization.moments import LayerStatistics, centred
from lowrank.factorization.rank_allocation import kept_parameters
from lowrank.io.hashing import hash_model, hash_tensors
from lowrank.nn.low_rank import FACTORED
from lowrank.nn.surgery import PackedLinear, as_linear, replace_module
from lowrank.nn.targets import BLOCKS, find_linears


def decompose(
    model: nn.Module,
    method: str = "whitened",
    statistics: Mapping[str, LayerStatistics] | None = None,
    layers: Iterable[str] = BLOCKS,
    *,
    centre: bool = False,
) -> dict[str, Factors]:
    """The factors of every layer at full rank, float64: `truncate` gives every smaller rank, `spectrum` feeds
    `allocate_ranks`, and `compress(..., factors=...)` builds a model from them without decomposing again.

    For sweeps over models that are small enough: the factors of all layers are held at once.

    **Arguments:** as for `compress`.
    """
    linears = find_linears(model, layers)
    _check(model, linears, dict.fromkeys(linears, 1), method, statistics, "factors", centre)
    return {
        name: METHODS[method](
            layer.weight.detach().double(), min(layer.weight.shape), _moments(layer, name, statistics, centre)
        )
        for name, layer in linears.items()
    }


def compress(
    model: nn.Module,
    ranks: Mapping[str, int],
    method: str = "whitened",
    statistics: Mapping[str, LayerStatistics] | None = None,
    storage: str = "factors",
    *,
    centre: bool = False,
    factors: Mapping[str, Factors] | None = None,
) -> list[dict[str, Any]]:
    """Replaces linear layers by factored ones, in place, one layer at a time.

    A layer whose factors would hold as many parameters as its weight stays as it is, bit for bit. Each dense weight goes as
    its factors come, so that beyond the model memory is that of one layer and of the statistics held: for a weight (m, n)
    about 40 m n bytes in float64, and 16 m^2 more for `two_sided`; with `lowrank.calibration.on_demand.OnDemand`, 8 n^2 for each
    distinct input of one block, and as much again for the widest while they are collected. The last layer comes first, so
    that statistics on demand see the inputs of the dense model. Gradients come through the layers behind, which are
    compressed by then: collect them beforehand.

    **Arguments:** `ranks`: layer -> rank, in [1, min(out, in)], for instance from `allocate_ranks`. `method`: a key of
    `METHODS`. `statistics`: layer -> `LayerStatistics`; `svd` needs none. `storage`: 'factors' (`LowRankLinear`) or
    'pivoted' (`PivotedLinear`). `centre`: for layers with a bias, truncate in the norm of the centred inputs and let the
    bias take up what that does to the mean output, b + (W - W') mu. `factors`: from `decompose` with the same method,
    statistics and `centre`, for sweeps.

    **Returns:** the table of layers, one row each in the order of the model: `layer`, `out`, `in`, `rank`, `storage` ('dense'
    where the layer was left), `method`, `parameters` of the weight as stored, `indices` beside them, `dense_parameters`,
    `keep`; `predicted_error`, `measured_error`: what was given up in the method's own norm, as its spectrum says and as the
    stored layer shows, relative to the norm of W; `statistics`: their hash.

    **Raises:** `ValueError`, before anything is changed: no layer, unknown layers, method or storage, a rank out of range,
    a weight that is not finite or that another module shares, statistics missing or of other layers.

    **Reference:** see the methods in `lowrank.factorization.methods`.
    """
    linears = _named(model, ranks)
    _check(model, linears, ranks, method, statistics, storage, centre)
    for name, given in ({} if factors is None else {name: factors.get(name) for name in linears}).items():
        sizes = None if given is None else (given.left.shape[0], given.right.shape[1], given.rank)
        if sizes is None or sizes[:2] != tuple(linears[name].weight.shape) or sizes[2] < ranks[name]:
            raise ValueError(
                f"`factors` must fit layer {name!r} of shape {tuple(linears[name].weight.shape)} at rank {ranks[name]}, "
                f"got {'none' if sizes is None else f'shape {sizes[:2]}, rank {sizes[2]}'}."
            )
    record: dict[str, Any] = getattr(model, RECORD, None) or {"model": hash_model(model), "layers": {}}
    rows: dict[str, dict[str, Any]] = {}
    order = list(linears)
    for name in reversed(order):
        layer = linears.pop(name)  # each dense weight goes as its factors come
        given = None if factors is None else factors[name].truncate(ranks[name])
        rows[name] = _compress_layer(model, name, layer, ranks[name], method, statistics, storage, centre, given)
    setattr(model, RECORD, record | {"layers": record["layers"] | rows})
    return [rows[name] for name in order]


def _compress_layer(
    model: nn.Module,
    name: str,
    layer: nn.Linear,
    rank: int,
    method: str,
    statistics: Mapping[str, LayerStatistics] | None,
    storage: str,
    centre: bool,
    factors: Factors | None,
) -> dict[str, Any]:
    out, inputs = layer.weight.shape
    dense, parameters = out * inputs, kept_parameters((out, inputs), rank, storage)
    row: dict[str, Any] = {"layer": name, "out": out, "in": inputs, "rank": min(out, inputs), "storage": "dense"}
    row |= {
        "method": method,
        "centre": False,
        "parameters": dense,
        "indices": 0,
        "dense_parameters": dense,
        "keep": 1.0,
    }
    row |= {"predicted_error": 0.0, "measured_error": 0.0, "statistics": None}
    if parameters == dense:
        return row
    moments = _moments(layer, name, statistics, centre)  # may be collected only now: hold nothing else meanwhile
    weight = layer.weight.detach().double()
    factors = factors or METHODS[method](weight, rank, moments)
    bias = None if layer.bias is None else layer.bias.detach()
    made = FACTORED[storage].from_factors(factors, bias, layer.weight.dtype)
    difference = weight - made.dense()
    centre = centre and bias is not None
    if centre and bias is not None:
        made.set_bias(bias.double() + difference @ moments.mean.to(difference.device))
    made.requires_grad_(layer.weight.requires_grad).train(layer.training)
    replace_module(model, name, made)
    whole = factors.spectrum.norm().item() or 1.0
    return row | {
        "rank": rank,
        "storage": storage,
        "centre": centre,
        "parameters": parameters,
        "indices": rank if storage == "pivoted" else 0,
        "keep": parameters / dense,
        "predicted_error": factors.error / whole,
        "measured_error": NORMS[method](difference, moments) / whole,
        "statistics": None if statistics is None else _hash(moments),
    }


def _moments(
    layer: nn.Linear, name: str, statistics: Mapping[str, LayerStatistics] | None, centre: bool
) -> Any:  # LayerStatistics, or None where the method needs none
    if statistics is None:
        return None
    return centred(statistics[name]) if centre and layer.bias is not None else statistics[name]


def _hash(statistics: LayerStatistics) -> str:
    parts = {"gram": statistics.gram, "mean": statistics.mean, "gradient_gram": statistics.gradient_gram}
    return hash_tensors({name: part for name, part in parts.items() if part is not None})


def fold(model: nn.Module) -> nn.Module:
    """Multiplies every factored layer out to an `nn.Linear`, and joins the parts of packed ones, in place.

    **Returns:** the model: the layout of the dense one, with weights of low rank.
    """
    kinds = (*KINDS.values(), PackedLinear)
    found: list[tuple[str, Any]] = [(name, part) for name, part in model.named_modules() if isinstance(part, kinds)]
    for name, module in reversed(found):  # the parts before what they are parts of
        own = next(module.parameters())
        layer = as_linear(module.dense().to(own.dtype), module.bias)
        replace_module(model, name, layer.requires_grad_(own.requires_grad).train(module.training))
    if hasattr(model, RECORD):
        delattr(model, RECORD)
    return model


def parameter_counts(model: nn.Module, dense: nn.Module, layers: Iterable[str]) -> dict[str, int | float]:
    """How much of a dense model its compressed form stores: `targeted` weights of the layers named, of the dense model and of
    this one, biases left out; `model`: all parameters; the two shares kept."""
    names = list(find_linears(dense, layers))
    own = [model.get_submodule(name) for name in names]
    targeted = sum(p.numel() for module in own for key, p in module.named_parameters() if not key.endswith("bias"))
    before = sum(layer.weight.numel() for layer in find_linears(dense, names).values())
    whole, whole_before = (sum(p.numel() for p in side.parameters()) for side in (model, dense))
    return {
        "targeted_parameters": targeted,
        "keep_targeted": targeted / before,
        "model_parameters": whole,
        "keep_model": whole / whole_before,
    }
