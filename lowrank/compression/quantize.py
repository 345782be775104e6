"""Quantise linear and factored layers of a model: weights of 8 or 4 bits instead of floating point."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowrank.factorization.moments import all_finite
from lowrank.factorization.precision import with_float64
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.hashing import check_in_memory
from lowrank.io.patterns import matches
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.nn.nested import NestedLinear
from lowrank.nn.offloaded import check_not_offloaded
from lowrank.nn.plain import find_obstacle
from lowrank.nn.quantized import LARGEST, QuantizedLinear
from lowrank.nn.surgery import replace_module
from lowrank.nn.targets import BLOCKS, find_shared_weights, list_entries, refuse_root


@torch.inference_mode(False)  # biases may be trained
@check_arguments
def quantize(
    model: nn.Module, bits: int = 8, layers: Iterable[str] = BLOCKS, *, group: int | None = None
) -> list[dict[str, Any]]:
    """Round the weights of linear and factored layers to whole numbers with scales, in place.

    With 8 bits, each row has one scale; with 4 bits, each group of 128 weights in a row. Codes are symmetric: no weight changes
    by more than half its scale, and zeros stay zeros. Both factors of a factored layer are rounded. Passes multiply in the dtype
    of the model. `save_compressed` stores the codes, `fold` gives dense layers back. Compress, retarget and train first.

    **Arguments**

    - `model`: any PyTorch module, compressed or not.
    - `bits`: 8 or 4. Default 8.
    - `layers`: names or patterns; a factored layer stands for its factors. By default all layers inside numbered blocks.
    - `group`: int >= 1, weights of a row that share a scale. Default: the row with 8 bits, 128 with 4.

    **Returns** one row per weight: `layer`, `out`, `in`, `bits`, `group`; `bytes` of codes and scales, `bytes_before`; `error`,
    the norm of the change relative to that of the weight.

    **Raises**

    - `ValueError`, before anything is changed: other bits; a group below 1; an entry that matches no such layer; nested,
      shared, offloaded, hooked or non-finite weights, by the name of the layer.
    """
    require(bits in LARGEST, "bits", f"be one of {sorted(LARGEST)}", bits)
    require(group is None or group >= 1, "group", "be at least 1", group)
    layers = list_entries("layers", layers)
    refuse_root(model, (nn.Linear, *FACTORED_LAYERS.values()))
    check_not_offloaded(model)
    linears: dict[str, nn.Linear] = {}
    for entry in layers:
        linears |= _find_weights(model, entry)
    linears = {name: linears[name] for name, _ in model.named_modules() if name in linears}
    _check_weights(model, linears)
    rows = []
    for name in list(linears):
        layer = linears.pop(name)  # the only other reference to the weight
        quantised = QuantizedLinear.from_linear(layer, bits, group)
        rows.append(_describe(name, layer, quantised))
        replace_module(model, name, quantised)
    return rows


def _find_weights(model: nn.Module, entry: str) -> dict[str, nn.Linear]:
    """Return the plain linear layers that an entry matches, and the parts of factored layers that it matches."""
    modules: dict[str, Any] = {name: module for name, module in model.named_modules() if name}
    matched = [entry] if entry in modules else [name for name in modules if matches(name, entry)]
    nested = next((name for name in matched if isinstance(modules[name], NestedLinear)), None)
    require(nested is None, "layers", "be cut to their size before they are quantised: see `load_compressed`", nested)
    factored = [name for name in matched if isinstance(modules[name], tuple(FACTORED_LAYERS.values()))]
    names = [*matched, *(f"{name}.{part}" for name in factored for part in ("right", "left"))]
    reasons = {
        name: find_obstacle(modules[name], modules.get(name.rpartition(".")[0]))
        for name in names
        if isinstance(modules[name], nn.Linear | QuantizedLinear)
    }
    found = {name: modules[name] for name, reason in reasons.items() if reason is None}
    other = next(iter(reasons.items()), None) or next(((n, f"a {type(modules[n]).__name__}") for n in matched), entry)
    require(len(found) > 0, "layers", "match linear or factored layers of the model", other)
    return found


def _check_weights(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    check_in_memory({f"{name}.weight": layer.weight for name, layer in linears.items()})
    shared = find_shared_weights(model, linears)
    for name, layer in linears.items():
        require(name not in shared, "layers", f"leave out {name!r}, whose weight is shared", shared.get(name))
        hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
        require(not hooked, "model", f"have no forward hooks on layer {name!r}, which would be lost with it", "hooks")
        floating = layer.weight.is_floating_point() and layer.weight.element_size() > 1
        text = f"have weights in a floating dtype of 16 bits or more (layer {name!r})"
        require(floating, "model", text, str(layer.weight.dtype))
        text = f"have finite weights (layer {name!r})"
        require(all_finite(layer.weight), "model", text, "NaN or infinity")


def _describe(name: str, layer: nn.Linear, quantised: QuantizedLinear) -> dict[str, Any]:
    weight = with_float64(layer.weight.detach()).double()
    change = quantised.dense() - weight
    return {
        "layer": name,
        "out": layer.out_features,
        "in": layer.in_features,
        "bits": quantised.bits,
        "group": quantised.group,
        "bytes": quantised.codes.nbytes + quantised.scale.nbytes,
        "bytes_before": layer.weight.nbytes,
        "error": float(change.norm() / (weight.norm() or 1.0)),
    }
