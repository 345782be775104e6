"""Describe the layers of a compressed model that differ from those of its dense architecture, and put them into one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lowrank.io.checks import require
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.nn.nested import NestedLinear
from lowrank.nn.quantized import QuantizedLinear
from lowrank.nn.surgery import PackedLinear, replace_module
from lowrank.nn.usv import USV_LAYERS, USVConv2d, USVLinear

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
LAYER_KINDS: dict[str, type[Any]] = {
    **FACTORED_LAYERS,
    NestedLinear.storage: NestedLinear,
    USVLinear.storage: USVLinear,
}
CONVOLUTION = "usv_conv2d"  # takes stride, padding and dilation from the convolution of the base


def describe_layers(
    model: nn.Module, skeleton: nn.Module | None, rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Describe every layer of a model that differs from its base architecture.

    **Arguments**

    - `model`: the compressed model; it is not changed.
    - `skeleton`: its base architecture; None if unknown, and then every linear layer is described.
    - `rows`: layer -> row of the table that `compress` returned; layers that stayed dense have one too.

    **Returns** layer -> its row, if it has one, with `kind`, `in`, `out`, `rank` and `bias`, or `kind` and `parts` for a packed
    projection. Packed projections come before their parts. Layers that stayed as they are have no `kind`. A layer of `OIALR`
    has the `dtype` of its dense weight too, a quantised one `bits` and `group`.
    """
    layers: dict[str, dict[str, Any]] = {}
    before = {} if skeleton is None else dict(skeleton.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, tuple(LAYER_KINDS.values())):
            sizes = {"in": module.in_features, "out": module.out_features, "rank": module.rank}
            layers[name] = {**rows.get(name, {}), "kind": module.storage, **sizes, "bias": module.bias is not None}
        elif isinstance(module, QuantizedLinear):
            sizes = {key: getattr(module, key) for key in ("bits", "group")}
            sizes |= {"in": module.in_features, "out": module.out_features, "bias": module.bias is not None}
            layers[name] = {**rows.get(name, {}), "kind": module.kind, **sizes}
        elif isinstance(module, USVConv2d):
            layers[name] = {**rows.get(name, {}), "kind": CONVOLUTION, "rank": module.rank}
        elif isinstance(module, PackedLinear):
            layers[name] = {"kind": "packed", "parts": [part for part, _ in module.named_children()]}
        elif isinstance(module, nn.Linear) and _is_new(name, module, before, layers):
            sizes = {"in": module.in_features, "out": module.out_features}
            layers[name] = {**rows.get(name, {}), "kind": "linear", **sizes, "bias": module.bias is not None}
        elif name in rows:
            layers[name] = dict(rows[name])
        if isinstance(module, tuple(USV_LAYERS.values())):
            layers[name]["dtype"] = str(module.like.dtype).removeprefix("torch.")
    return layers


def _is_new(name: str, module: nn.Module, before: Mapping[str, nn.Module], layers: Mapping[str, Any]) -> bool:
    """Return True if the base has no such linear layer: it is a part of a packed one, was a Conv1D, or no base is known."""
    parent_kind = layers.get(name.rpartition(".")[0], {}).get("kind")
    if parent_kind in LAYER_KINDS:
        return False
    return parent_kind == "packed" or not before or (name in before and type(before[name]) is not type(module))


def insert_layers(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace layers of a base architecture by layers of the recorded kinds, in place, with all their tensors on the meta device.

    **Arguments**

    - `model`: the base architecture; it is changed.
    - `layers`: layer -> description, see `describe_layers`.

    **Raises**

    - `ValueError`: an unknown kind; a layer that the base does not have, or has as another kind of layer.
    """
    known = {*LAYER_KINDS, CONVOLUTION, QuantizedLinear.kind, "packed", "linear"}
    for name, layer in layers.items():
        if (kind := layer.get("kind")) is None:
            continue
        require(kind in known, "layers", f"have kinds among {sorted(known)} (layer {name!r})", kind)
        if not has_module(model, name) and name.rpartition(".")[0] not in layers:
            raise ValueError(f"`base` must have a layer {name!r}, as the compressed model has, got none.")
        with torch.device("meta"):
            made: Any = _build_convolution(model, name, layer["rank"]) if kind == CONVOLUTION else _build_layer(layer)
            if isinstance(made, tuple(USV_LAYERS.values())) and "dtype" in layer:  # files of older versions have none
                require(layer["dtype"] in DTYPES, "layers", f"have a dtype among {sorted(DTYPES)}", layer["dtype"])
                made.like = made.like.to(DTYPES[layer["dtype"]])
            replace_module(model, name, made)


def has_module(model: nn.Module, name: str) -> bool:
    """Return True if a model has a submodule with a dotted name.

    **Arguments**

    - `model`: any PyTorch module.
    - `name`: the dotted name.
    """
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _build_convolution(model: nn.Module, name: str, rank: int) -> nn.Module:
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Conv2d):
        raise ValueError(
            f"`base` must have a convolution {name!r}, as the compressed model has, got {type(layer).__name__}."
        )
    return USVConv2d(layer, rank)


def _build_layer(layer: Mapping[str, Any]) -> nn.Module:
    if layer["kind"] == "packed":
        return PackedLinear([nn.Linear(1, 1) for _ in layer["parts"]], layer["parts"])
    if layer["kind"] == "linear":
        return nn.Linear(layer["in"], layer["out"], bias=layer["bias"])
    if layer["kind"] == QuantizedLinear.kind:
        return QuantizedLinear(layer["in"], layer["out"], layer["bits"], layer["group"], bias=layer["bias"])
    return LAYER_KINDS[layer["kind"]](layer["in"], layer["out"], layer["rank"], bias=layer["bias"])
