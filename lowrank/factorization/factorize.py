"""Truncate a weight to a rank in a weighted norm.

Minimise ||H (W - W') S||_F over the weights W' of a rank. A `Weighting` says what H and S are, see
`lowrank.factorization.methods`. Nothing is inverted but H: the inputs enter through G = S S^T alone, and W' is a projection of
W, so that a G without full rank needs no care.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank.factorization.block_sums import outer_sum
from lowrank.factorization.decompositions import (
    apply,
    leading,
    leading_by_pullback,
    leading_of,
    leading_plain,
    multiply,
    root_of,
    solve,
)
from lowrank.factorization.gram import gram_norm, wide_product
from lowrank.factorization.moments import all_finite
from lowrank.factorization.precision import with_float64
from lowrank.factorization.weighting import ALIKE, Weighting, check_sides
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require


@dataclass(frozen=True, eq=False)
class Factors:
    """Hold the factors W ~ left @ right, and the spectrum that tells their error.

    **Arguments**

    - `left`: B, `(out, rank)`.
    - `right`: A, `(rank, in)`.
    - `spectrum`: all singular values of H W S, descending, float64, `(min(out, in),)`; or the leading ones alone.
    - `rest`: sum of the squares of the singular values that `spectrum` leaves out. Default 0.
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]
    spectrum: Float[Tensor, " values"]
    rest: float = 0.0

    @property
    def rank(self) -> int:
        """Return the number of rows of `right`."""
        return self.right.shape[0]

    @property
    def error(self) -> float:
        """Return ||H (W - B A) S||_F as the discarded singular values predict it."""
        return (self.spectrum[self.rank :].square().sum().item() + self.rest) ** 0.5

    @property
    def norm(self) -> float:
        """Return ||H W S||_F."""
        return (self.spectrum.square().sum().item() + self.rest) ** 0.5

    def dense(self) -> Float[Tensor, "out in"]:
        """Return left @ right, multiplied in float64 and rounded once to the dtype of the factors."""
        return (self.left.double() @ self.right.double()).to(self.left.dtype)

    def truncate(self, rank: int) -> "Factors":
        """Return the best factors at a smaller rank. They are nested: one decomposition serves every rank.

        **Arguments**

        - `rank`: int in [1, `self.rank`].

        **Raises**

        - `ValueError`: a rank out of range.
        """
        require(1 <= rank <= self.rank, "rank", f"be in [1, {self.rank}]", rank)
        return replace(self, left=self.left[:, :rank], right=self.right[:rank])


@check_arguments
def factorize(
    weight: Float[Tensor, "out in"],
    rank: int,
    weighting: Weighting = ALIKE,
    *,
    spectrum: bool = True,
    dtype: torch.dtype | None = None,
) -> Factors:
    """Return the factors of a rank that minimise ||H (W - B A) S||_F.

    With U the leading left singular vectors of H W S, B = H^-1 U and A = U^T H W. If no input weighs more than another and H is
    diagonal, then B = W V and A = V^T with V the leading right singular vectors of H W, so that H may have zeros. Directions that
    do not count at all are ordered by the plain SVD of what the others leave of W: full rank gives W back.

    **Arguments**

    - `weight`: W, `(out, in)`, any floating dtype.
    - `rank`: int in [1, min(out, in)].
    - `weighting`: what outputs and inputs count for; by default all count alike, which is the plain SVD.
    - `spectrum`: compute all singular values. False computes no more than the factors need, which is faster. Default True.
    - `dtype`: of the factors; they are computed in float64. Default None, that of the weight.

    **Returns** `Factors` on the device of `weight`, with the spectrum of H W S. In less than float64 the terms are
    balanced, see `balance`: small gradients give a large H^-1, which half precision does not hold.

    **Raises**

    - `ValueError`: a rank out of range; a weight that is not a finite matrix; a weighting of another size; outputs that do not
      count at all, if their H has to be inverted.
    """
    rule = f"be in [1, {min(weight.shape)}] for a weight of shape {tuple(weight.shape)}"
    _check_weight(weight)
    require(1 <= rank <= min(weight.shape), "rank", rule, rank)
    return _factorize(weight, rank, weighting, None if spectrum else rank, dtype or weight.dtype)


def weighted_spectrum(weight: Float[Tensor, "out in"], weighting: Weighting = ALIKE) -> Float[Tensor, " full"]:
    """Return all singular values of H W S, descending, without the factors: about a third of the time.

    **Arguments**

    - `weight`: W, `(out, in)`, any floating dtype.
    - `weighting`: what outputs and inputs count for.

    **Returns** `(min(out, in),)`, float64.

    **Raises**

    - `ValueError`: as for `factorize`.
    """
    _check_weight(weight)
    return _factorize(weight, 0, weighting, 0, weight.dtype).spectrum


def _factorize(weight: Tensor, rank: int, weighting: Weighting, pairs: int | None, dtype: torch.dtype) -> Factors:
    """Return the factors of a rank, from `pairs` eigenpairs at least (None for all); at rank 0 the spectrum alone."""
    w = with_float64(weight.detach())  # widened as a whole only where a decomposition needs that
    sides = check_sides(weighting, w)
    quick = None
    whitened = sides.inputs is not None and sides.inputs.dim() == 2 and sides.outputs is sides.pullback is None
    if pairs and whitened and len(w) > len(w.T):
        quick = leading_by_pullback(
            w, rank, outer_sum(w.double()), sides.inputs, pairs
        )  # no decomposition of the tall W
    if quick and bool(quick[2][rank - 1] > 0):  # else some directions are not excited
        left, right, spectrum, energy = quick
    elif sides.pullback is not None:
        left, right, spectrum, energy = leading_by_pullback(w, rank, sides.pullback, sides.inputs, pairs)
    elif sides.outputs is None and sides.inputs is None and sides.image is None:
        left, right, spectrum = leading_plain(w.double(), rank)
        energy = spectrum.square().sum()
    elif sides.inputs is None and sides.image is None and sides.outputs is not None and sides.outputs.dim() == 1:
        basis, spectrum, energy = leading(w.double().T.contiguous(), rank, sides.outputs, pairs)
        left, right = wide_product(w, basis), basis.T
    else:
        root = None if sides.outputs is None else root_of(sides.outputs)
        if sides.image is None:
            basis, spectrum, energy = leading(apply(root, w.double()), rank, sides.inputs, pairs)
        else:
            image = sides.image if root is None else apply(root, apply(root, sides.image).T)
            whole, own = lambda: apply(root, w.double()), root is not None
            basis, spectrum, energy = leading_of(image, rank, pairs, whole, overwrite=own)
            del image
        left, right = solve(root, basis), wide_product(multiply(basis.T, root), w)
    spectrum = spectrum[: min(weight.shape)]
    rest = (energy - spectrum.square().sum()).clamp_min(0.0).item() if len(spectrum) < min(weight.shape) else 0.0
    if dtype != torch.float64:
        left, right = balance(left, right)
    home = w.device if dtype == torch.float64 else weight.device
    return Factors(left.to(home, dtype), right.to(home, dtype), spectrum, rest)


def balance(
    left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"]
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Scale factors so that each of the terms of their product has the same norm in both; a term that is zero stays.

    **Arguments**

    - `left`: B, `(out, rank)`, float64.
    - `right`: A, `(rank, in)`, float64.

    **Returns** new factors of the same product.
    """
    scale = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
    return left * scale, right / scale[:, None]


def weighted_norm(difference: Float[Tensor, "out in"], weighting: Weighting = ALIKE) -> float:
    """Return ||H D S||_F in float64, the norm that `Factors.error` predicts.

    **Arguments**

    - `difference`: D, `(out, in)`, any floating dtype.
    - `weighting`: what outputs and inputs count for, as `outputs` and `inputs`.

    **Raises**

    - `ValueError`: a weighting of another size, or with `image` or `pullback`, which know one weight only: see
      `measured_norm`.
    """
    d = with_float64(difference.detach()).double()
    outputs, inputs, image, pullback, *_ = check_sides(weighting, d)
    other = next((name for name, side in (("image", image), ("pullback", pullback)) if side is not None), None)
    require(other is None, "weighting", "hold `outputs` and `inputs`: see `measured_norm`", other)
    if inputs is not None and inputs.dim() == 1:
        d, inputs = d * inputs.sqrt(), None
    if outputs is not None and outputs.dim() == 1:
        d, outputs = d * outputs.sqrt()[:, None], None
    if outputs is not None:
        return (multiply(outputs @ d, inputs) * d).sum().clamp_min(0.0).sqrt().item()
    return d.norm().item() if inputs is None else gram_norm(d, inputs)


def measured_norm(
    weight: Float[Tensor, "out in"],
    factors: Factors,
    stored: Callable[[Tensor], Tensor],
    weighting: Weighting,
) -> float:
    """Return ||H (W - W') S||_F of the weight W' that is stored for some factors, without a product of the size of G.

    The error of B A is exact: the energy of H W S less the energy that B A captures. What storing B A changes is seen on the
    sketch: the difference of two norms on it, so that their common error cancels.

    **Arguments**

    - `weight`: W, `(out, in)`, any floating dtype.
    - `factors`: B and A in float64, of `factorize` with this weighting.
    - `stored`: `(in, k) -> (out, k)`, multiplies columns by W' in float64.
    - `weighting`: the weighting, with `inputs_sketch`, and `outputs_sketch` if it has a `pullback`.
    """
    sides = check_sides(weighting, weight)
    left, right = factors.left, factors.right
    if sides.inputs is not None:
        captured = (multiply(right, sides.inputs) * right).sum()
    else:
        columns = left if sides.outputs is None else multiply(left.T, sides.outputs).T
        captured = (multiply(columns.T, sides.image).T * columns).sum()
    exact = factors.norm**2 - captured
    if sides.inputs_sketch is None:
        raise ValueError("`weighting` must have `inputs_sketch`, got None: see collect_statistics with side='smaller'.")
    columns = sides.inputs_sketch.T
    change = wide_product(weight, columns)
    rounded = _square(change - stored(columns), sides) - _square(change - left @ (right @ columns), sides)
    return (exact + rounded).clamp_min(0.0).sqrt().item()


def _square(columns: Tensor, sides: Weighting) -> Tensor:
    """Return ||H Y||^2 of some columns Y."""
    if sides.outputs is not None:
        return (multiply(columns.T, sides.outputs).T * columns).sum()
    return (columns if sides.outputs_sketch is None else sides.outputs_sketch @ columns).square().sum()


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"`weight` must have two dimensions, got shape {tuple(weight.shape)}.")
    require(weight.numel() > 0, "weight", "have at least one element", tuple(weight.shape))
    if not all_finite(weight):
        raise ValueError("`weight` must be finite, got NaN or infinity.")
