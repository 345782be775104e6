"""Tell whether a layer computes what its class promises from a weight of its own, and if not, why.

A layer can be replaced only if its parent calls it and the call is `x W^T + b`, with W and b the parameters `weight` and `bias`.
Being an instance of `nn.Linear` does not promise that: subclasses scale weights or return tuples, parametrisations compute the
weight anew in every pass, and some parents read a weight themselves.
"""

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lowrank.nn.quantized import QuantizedLinear

PLAIN: tuple[type[Any], ...] = (nn.Linear, nn.Conv2d)  # whose forward passes the library can stand in for


def find_obstacle(module: nn.Module, parent: nn.Module | None = None) -> str | None:
    """Return the first reason why a layer is not computed by the forward pass of its class from its own parameters.

    **Arguments**

    - `module`: an `nn.Linear` or `nn.Conv2d`, or a subclass, or a `QuantizedLinear`; it is not changed.
    - `parent`: the module that holds it. Default None, unknown.

    **Returns** the reason, to follow the name of the layer; None for a plain layer.
    """
    if isinstance(module, QuantizedLinear):
        return "its weight is quantised: quantise last, or `fold` first"
    name = type(module).__name__
    obstacles = {
        "nn.MultiheadAttention reads its weight itself": isinstance(parent, nn.MultiheadAttention),
        "its weight or bias is not a parameter of its own, but computed (by a parametrisation, a norm or a mask)": not (
            has_own_weight(module)
        ),
        "it has no sizes before its first pass": any(map(is_lazy, module.parameters(recurse=False))),
        f"{name} has a forward pass of its own": not _has_plain_forward(module),
        f"{name} holds more than a weight and a bias": len(dict(module.named_parameters())) > 2
        or any(module.children()),
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def has_own_weight(module: nn.Module) -> bool:
    """Return True if `weight` and `bias` are parameters of the module itself, as they are read.

    **Arguments**

    - `module`: a layer with these two attributes.
    """
    own: dict[str, Any] = module._parameters
    return {"weight", "bias"} <= own.keys() and all(getattr(module, key) is own[key] for key in ("weight", "bias"))


def _has_plain_forward(module: nn.Module) -> bool:
    """Return True if a call runs the forward pass of a plain class; accelerate's hooks only move what it works on."""
    plain = next(kind for kind in PLAIN if isinstance(module, kind))
    wrapped = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    methods = ("__call__", "forward", "_conv_forward")
    return not wrapped and all(getattr(type(module), key, None) is getattr(plain, key, None) for key in methods)
