"""What the outputs and the inputs of a weight count for, as second moments, and the check that they fit the weight."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.factorization.moments import all_finite
from lowrank.io.arguments import describe
from lowrank.io.checks import require


class Weighting(NamedTuple):
    """Hold how much each output and each input of a weight counts, as second moments.

    The norm of a difference D of two weights is ||H D S||_F. Each side is None (all count alike), a diagonal `(size,)` or a
    matrix `(size, size)`; float64, on the device of the weight. `image` and `pullback` say the same of one weight W from its
    other side. Sketches measure the norm of a D that those do not reach.

    **Arguments**

    - `outputs`: H^T H, `(out,)` >= 0 or `(out, out)` positive definite.
    - `inputs`: S S^T, `(in,)` >= 0 or `(in, in)` positive semidefinite.
    - `image`: W S S^T W^T, `(out, out)`, in place of `inputs`.
    - `pullback`: W^T H^T H W, `(in, in)`, in place of `outputs`.
    - `outputs_sketch`: rows whose second moment estimates H^T H, `(k, out)`; only read if `outputs` is None.
    - `inputs_sketch`: rows whose second moment estimates S S^T, `(k, in)`.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None
    image: Tensor | None = None
    pullback: Tensor | None = None
    outputs_sketch: Tensor | None = None
    inputs_sketch: Tensor | None = None


ALIKE = Weighting()  # every output and every input counts the same: the Frobenius norm
SIDES = {"outputs": 0, "inputs": 1, "image": 0, "pullback": 1, "outputs_sketch": 0, "inputs_sketch": 1}


def check_sides(weighting: Weighting, weight: Tensor) -> Weighting:
    """Return a weighting on the device of the weight, in float64, once each side is known to fit.

    **Arguments**

    - `weighting`: what outputs and inputs count for.
    - `weight`: W, `(out, in)`.

    **Raises**

    - `ValueError`: a side that is no finite tensor, of another size, or negative; two that exclude each other.
    """
    for name, side in weighting._asdict().items():
        _check_side(name, side)
        size = weight.shape[SIDES[name]]
        shapes = ((size,), (size, size)) if name in ("outputs", "inputs") else ((size, size),)
        if side is not None and (side.shape[-1] != size if "sketch" in name else tuple(side.shape) not in shapes):
            raise ValueError(f"`weighting.{name}` must be of size {size}, got shape {tuple(side.shape)}.")
    for one, other in (("outputs", "pullback"), ("inputs", "image"), ("image", "pullback")):
        if getattr(weighting, one) is not None and getattr(weighting, other) is not None:
            raise ValueError(f"`weighting` must hold `{one}` or `{other}`, got both.")
    return Weighting(*(side if side is None else side.to(weight.device, torch.float64) for side in weighting))


def _check_side(name: str, side: Any) -> None:
    """Check what needs no weight: kind and values."""
    if side is None:
        return
    holds = isinstance(side, Tensor) and side.is_floating_point() and side.numel() > 0
    require(holds, f"weighting.{name}", "be None or a tensor of floating-point numbers", describe(side))
    if not all_finite(side):
        raise ValueError(f"`weighting.{name}` must be finite, got NaN or infinity.")
    least = side.min().item() if side.dim() == 1 else 0.0
    require(least >= 0, f"weighting.{name}", "be >= 0", least)
