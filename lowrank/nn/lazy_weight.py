"""A weight that is a product of stored parts, multiplied out only if somebody computes with it.

Models read `layer.weight` for more than products: T5 asks one for its dtype in every pass. A plain property would multiply
the parts out each time, which costs more than the low rank saves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_FACTS: set[Any] = {  # what is known without the values
    Tensor.dtype.__get__,  # pyright: ignore[reportAttributeAccessIssue] (getters of C)
    Tensor.device.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.shape.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.ndim.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.dim,
    Tensor.numel,
    Tensor.size,
    Tensor.is_floating_point,
    Tensor.__len__,
}


class LazyWeight(Tensor):
    """Hold the place of a tensor that is computed when it is used, and again at each use, with gradients for its parts.

    **Arguments**

    - `like`: a floating-point tensor with its dtype and device.
    - `shape`: its shape.
    - `compute`: function without arguments that returns it.
    """

    compute: Callable[[], Tensor]
    _is_hf_initialized = True  # transformers draws no numbers for it: before indices are loaded it cannot be computed

    @staticmethod
    def __new__(cls, like: Tensor, shape: tuple[int, ...], compute: Callable[[], Tensor]) -> "LazyWeight":
        """Make the tensor without storage."""
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # pyright: ignore
        made.compute = compute
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what is known, and call other functions with the computed tensor in the place of this one."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FACTS:
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map_only(cls, lambda lazy: lazy.compute(), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute the tensor for code that is below `__torch_function__`."""
        args, kwargs = tree_map_only(cls, lambda lazy: lazy.compute(), (args, kwargs or {}))
        return func(*args, **kwargs)


def make_lazy(like: Tensor, shape: tuple[int, ...], compute: Callable[[], Tensor]) -> Tensor:
    """Return a tensor that is computed when it is used; for a compiler, compute it: it drops what is unused.

    **Arguments**

    - `like`, `shape`, `compute`: see `LazyWeight`, which a compiler cannot trace.
    """
    return compute() if torch.compiler.is_compiling() else LazyWeight(like, shape, compute)


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a layer, which a quantised layer keeps packed and returns from a method.

    **Arguments**

    - `layer`: an `nn.Linear`, or what quantisation has put in its place.
    """
    weight: Any = layer.weight
    return weight if isinstance(weight, Tensor) else weight().dequantize()
