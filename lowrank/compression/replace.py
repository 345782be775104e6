"""Replace linear layers by factored ones at given ranks, and multiply factors out again."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.storage import hash_statistics
from lowrank.compression.architecture import LAYER_KINDS
from lowrank.compression.checks import Statistics, check_factors, check_layers, check_statistics, find_layers
from lowrank.compression.configuration import Configuration
from lowrank.compression.pretrained import set_record
from lowrank.compression.result import dense_row
from lowrank.compression.stored_state import RECORD
from lowrank.factorization.factorize import (
    Factors,
    factorize,
    measured_norm,
    weighted_norm,
    weighted_spectrum,
)
from lowrank.factorization.gram import wide_product
from lowrank.factorization.methods import METHODS
from lowrank.factorization.moments import LayerStatistics, centre_moments
from lowrank.factorization.precision import with_float64
from lowrank.factorization.rank_allocation import kept_parameters
from lowrank.factorization.storages import STORAGES
from lowrank.factorization.weighting import Weighting
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.hashing import hash_model
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.nn.offloaded import check_not_offloaded
from lowrank.nn.quantized import QuantizedLinear
from lowrank.nn.surgery import PackedLinear, as_linear, copy_mode, replace_module
from lowrank.nn.targets import BLOCKS, find_linears, refuse_root
from lowrank.nn.usv import USV_LAYERS

_MERGED = tuple(USV_LAYERS.values())  # which have a way back of their own
_FOLDED = (*LAYER_KINDS.values(), *_MERGED, PackedLinear, QuantizedLinear)


@check_arguments
def decompose(
    model: nn.Module,
    method: str = "whitened",
    statistics: Statistics | None = None,
    layers: Iterable[str] = BLOCKS,
    *,
    centre: bool = False,
) -> dict[str, Factors]:
    """Return the factors of every layer at full rank in float64; the model stays as it is.

    `Factors.truncate` gives every smaller rank, `Factors.spectrum` feeds `allocate_ranks`, and
    `replace_layers(..., factors=...)` builds a model without decomposing again. The factors of all layers are in memory at once.

    **Arguments**

    - `model`: any PyTorch module.
    - `method`: a key of `METHODS`.
    - `statistics`: layer name -> `LayerStatistics`; `svd` needs none.
    - `layers`: names or patterns of layers.
    - `centre`: truncate in the norm of the centred inputs, for layers with a bias.

    **Returns** layer name -> `Factors`.

    **Raises**

    - `ValueError`: as for `replace_layers`.
    """
    linears = find_linears(model, layers)
    check_layers(model, linears, dict.fromkeys(linears, 1))
    check_statistics(linears, method, "factors", statistics, centre)
    return {
        name: factorize(
            layer.weight, min(layer.weight.shape), _weigh(layer, name, method, moments), dtype=torch.float64
        )
        for name, layer in linears.items()
        for moments in [_moments(layer, name, statistics, centre)]
    }


def spectrum_of(layer: nn.Linear, name: str, method: str, statistics: Statistics | None, centre: bool) -> Tensor:
    """Return every singular value of the matrix that a method truncates, descending.

    **Arguments**

    - `layer`: the layer.
    - `name`: its name in `statistics`.
    - `method`: a key of `METHODS`.
    - `statistics`: layer name -> `LayerStatistics`; `svd` needs none.
    - `centre`: in the norm of the centred inputs, for layers with a bias.

    **Returns** `(min(out, in),)`, float64, on the CPU.
    """
    weighting = _weigh(layer, name, method, _moments(layer, name, statistics, centre))
    return weighted_spectrum(layer.weight, weighting).cpu()


@torch.inference_mode(False)  # the new parameters may be trained
@check_arguments
def replace_layers(
    model: nn.Module,
    ranks: Mapping[str, int],
    configuration: Configuration | str = "whitened",
    statistics: Statistics | None = None,
    *,
    factors: Mapping[str, Factors] | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Replace linear layers by factored ones at given ranks, in place, one layer at a time.

    This is the strict step inside `compress`. A layer whose factors would hold as many parameters as its weight stays as it is,
    bit for bit. Each dense weight is freed as soon as its factors exist: peak extra memory is one layer plus the statistics. For
    a weight (m, n) at rank r that is about 40 min(m, n)^2 bytes while it is decomposed, then 8 r (m + n), and 32 m r while
    pivots are chosen. Statistics of `OnDemand` take 8 min(m, n)^2 for each layer of one block, once for those that share an
    input, and as much again for the largest while they are collected. The last layer is replaced first, so that statistics on
    demand see the inputs of the dense model. Output gradients pass through layers that are already replaced: collect them
    beforehand.

    **Arguments**

    - `model`: any PyTorch module.
    - `ranks`: layer name -> int in [1, min(out, in)], for example from `allocate_ranks`.
    - `configuration`: method, storage and centring; a method's name stands for `Configuration(method)`. Its allocation is not
      used.
    - `statistics`: layer name -> `LayerStatistics`; `svd` needs none.
    - `factors`: from `decompose` with the same method, statistics and centring.
    - `progress`: show a bar over the layers.

    **Returns** one row per layer, in the order of the model: `layer`, `out`, `in`, `rank`, `storage` ('dense' if the layer
    was left), `method`, `centre`, `parameters` of the weight as stored, `indices` beside them, `dense_parameters`, `keep`;
    `predicted_error` and `measured_error`, the norm of the difference in the method's own norm, from the spectrum and from the
    stored layer, relative to the norm of W; `measured_on`, 'moments', or 'sketch' if what storing changes was seen on a sketch
    of the inputs; `statistics`, their hash.

    **Raises**

    - `ValueError`, before anything is changed: no layer, unknown layers, method or storage; a rank out of range; a weight that
      is not finite or that another module shares; statistics or factors that are missing or of other layers.

    **Reference** see the methods in `lowrank.factorization.methods`.
    """
    if isinstance(configuration, str):
        configuration = Configuration(configuration)
    rule = "be None for layers that are replaced on their own: see `retarget_layers`"
    require(configuration.retarget is None, "configuration.retarget", rule, configuration.retarget)
    layers = find_layers(model, ranks)
    check_layers(model, layers, ranks)
    check_statistics(layers, configuration.method, configuration.storage, statistics, configuration.centre)
    check_factors(layers, ranks, factors)
    record: dict[str, Any] = getattr(model, RECORD, None) or {"model": hash_model(model), "layers": {}}
    rows: dict[str, dict[str, Any]] = {}
    order = list(layers)
    for name in tqdm(order[::-1], "factorize", unit="layer", leave=False, disable=not progress):
        layer = layers.pop(name)  # the only other reference to the dense weight
        truncated = None if factors is None else factors[name].truncate(ranks[name])
        moments = None if statistics is None else statistics[name]  # may be collected only now, on the dense inputs
        module, rows[name] = build_replacement(
            name, layer, int(ranks[name]), configuration, Target(layer.weight.detach(), moments), truncated
        )
        replace_module(model, name, module)
    set_record(model, record | {"layers": record["layers"] | rows})
    return [rows[name] for name in order]


class Target(NamedTuple):
    """Hold what is truncated in place of a layer's weight.

    **Arguments**

    - `weight`: T, `(out, in)`, any floating dtype; for a layer that sees the inputs of the dense model, W itself.
    - `moments`: statistics of the inputs that the layer will see, not centred; None for a method that needs none.
    - `shift`: what to add to the bias where inputs are centred, `(out,)`, float64, because T and W differ; None for nothing.
    """

    weight: Tensor
    moments: LayerStatistics | None
    shift: Tensor | None = None


def build_replacement(
    name: str,
    layer: nn.Linear,
    rank: int,
    configuration: Configuration,
    target: Target,
    factors: Factors | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the factored layer that takes the place of a dense one, and its row in the table.

    **Arguments**

    - `name`: of the layer, for the row and for errors.
    - `layer`: the dense layer; it is not changed.
    - `rank`: int in [1, min(out, in)].
    - `configuration`: method, storage and centring.
    - `target`: the weight to truncate, and its statistics.
    - `factors`: of the target at this rank, if they are known. Default None.

    **Returns** the new layer and its row; the dense layer itself where factors would hold as many parameters.

    **Raises**

    - `ValueError`: statistics that the method refuses.
    """
    row = dense_row(name, layer, configuration.method)
    parameters = kept_parameters((row["out"], row["in"]), rank, configuration.storage)
    if parameters == row["parameters"]:
        return layer, row
    centre = configuration.centre and layer.bias is not None
    moments = centre_moments(target.moments) if centre and target.moments is not None else target.moments
    weighting = _weigh(layer, name, configuration.method, moments)
    weight = with_float64(target.weight)
    factors = factors or factorize(weight, rank, weighting, spectrum=False, dtype=torch.float64)
    bias = None if layer.bias is None else layer.bias.detach().to(weight.device)
    dtypes = layer.weight.dtype, None if bias is None else bias.dtype
    replacement = FACTORED_LAYERS[configuration.storage].from_factors(factors, bias, *dtypes)
    if centre and bias is not None and moments is not None:
        mean = moments.mean.to(weight.device, torch.float64)[:, None]
        bias = bias.double() + (wide_product(weight, mean) - replacement.multiply(mean))[:, 0]
        replacement.set_bias(bias if target.shift is None else bias + target.shift)
    measured = _measure(weight, factors, replacement, weighting)
    return copy_mode(replacement.to(layer.weight.device), layer), row | {
        "rank": rank,
        "storage": configuration.storage,
        "centre": centre,
        "parameters": parameters,
        "indices": STORAGES[configuration.storage].indices(rank),
        "keep": parameters / row["parameters"],
        "predicted_error": factors.error / (factors.norm or 1.0),
        **measured,
        "statistics": None if target.moments is None else hash_statistics(target.moments),
    }


def _measure(weight: Tensor, factors: Factors, replacement: Any, weighting: Weighting) -> dict[str, Any]:
    """Return the relative error of a stored layer, and on what it was measured."""
    if weighting.inputs_sketch is None:
        error, measured_on = weighted_norm(weight.double() - replacement.dense(), weighting), "moments"
    else:
        error, measured_on = measured_norm(weight, factors, replacement.multiply, weighting), "sketch"
    return {"measured_error": error / (factors.norm or 1.0), "measured_on": measured_on}


def _moments(layer: nn.Linear, name: str, statistics: Statistics | None, centre: bool) -> LayerStatistics | None:
    if statistics is None:
        return None
    return centre_moments(statistics[name]) if centre and layer.bias is not None else statistics[name]


def _weigh(layer: nn.Linear, name: str, method: str, moments: LayerStatistics | None) -> Weighting:
    try:
        return METHODS[method](moments, with_float64(layer.weight))
    except ValueError as error:
        raise ValueError(f"{error} (method {method!r}, layer {name!r})") from error


@torch.inference_mode(False)
@check_arguments
def fold(model: nn.Module) -> nn.Module:
    """Multiply every factored layer out to a dense one, and quantised weights too, and join the parts of packed ones, in place.

    **Arguments**

    - `model`: a compressed model, or one that `OIALR` trains.

    **Returns** the model, with the layout and the dtypes of the dense one and weights of low rank.

    **Raises**

    - `ValueError`, before anything is changed: offloaded weights; a model that is such a layer itself.
    """
    check_not_offloaded(model)
    refuse_root(model, _FOLDED)
    factored: list[tuple[str, Any]] = [
        (name, part) for name, part in model.named_modules() if isinstance(part, _FOLDED)
    ]
    for name, module in reversed(factored):  # parts before the module that joins them
        replace_module(model, name, module.merge() if isinstance(module, _MERGED) else _multiply_out(module))
    set_record(model, None)
    return model


def _multiply_out(module: Any) -> nn.Linear:
    """Build the dense layer of a factored, packed or quantised one: dtypes and flags are those of its weights and biases."""
    parameters = dict(module.named_parameters())
    biases = [parameter for name, parameter in parameters.items() if name.endswith("bias")]
    weights = [parameter for name, parameter in parameters.items() if not name.endswith("bias")]
    like = (*weights, module.weight)[0]  # quantised weights are no parameters
    layer = as_linear(module.dense().to(like.dtype).to(like.device), module.bias)
    layer.weight.requires_grad_(any(parameter.requires_grad for parameter in weights))
    if layer.bias is not None:
        layer.bias.requires_grad_(any(parameter.requires_grad for parameter in biases))
    return layer.train(module.training)
