"""Truncate a weight to a rank in a weighted norm: the only file with matrix decompositions of weights.

Minimise ||H (W - W') S||_F over the weights W' of a rank. A `Weighting` says what H and S are, see
`lowrank.factorization.methods`. Nothing is inverted but H: the inputs enter through G = S S^T alone, and W' is a projection of
W, so that a G without full rank needs no care.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.factorization.moments import all_finite, gram_norm
from lowrank.io.checks import require


class Weighting(NamedTuple):
    """Hold how much each output and each input of a weight counts, as second moments.

    The norm of a difference D of two weights is ||H D S||_F. Each side is None (all count alike), a diagonal `(size,)` or a
    matrix `(size, size)`; float64, on the device of the weight.

    **Arguments**

    - `outputs`: H^T H, `(out,)` >= 0 or `(out, out)` positive definite.
    - `inputs`: S S^T, `(in,)` >= 0 or `(in, in)` positive semidefinite.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None


ALIKE = Weighting()  # every output and every input counts the same


ALIKE = Weighting()  # the Frobenius norm


@dataclass(frozen=True, eq=False)
class Factors:
    """Hold the factors W ~ left @ right, and the spectrum that tells their error.

    **Arguments**

    - `left`: B, `(out, rank)`.
    - `right`: A, `(rank, in)`.
    - `spectrum`: all singular values of H W S, descending, float64, `(min(out, in),)`.
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]
    spectrum: Float[Tensor, " full"]

    @property
    def rank(self) -> int:
        """Return the number of rows of `right`."""
        return self.right.shape[0]

    @property
    def error(self) -> float:
        """Return ||H (W - B A) S||_F as the discarded singular values predict it."""
        return self.spectrum[self.rank :].norm().item()

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
        return Factors(self.left[:, :rank], self.right[:rank], self.spectrum)


def factorize(weight: Float[Tensor, "out in"], rank: int, weighting: Weighting = ALIKE) -> Factors:
    """Return the factors of a rank that minimise ||H (W - B A) S||_F.

    With U the leading left singular vectors of H W S, B = H^-1 U and A = U^T H W. If no input weighs more than another and H is
    diagonal, then B = W V and A = V^T with V the leading right singular vectors of H W, so that H may have zeros. Directions that
    do not count at all are ordered by the plain SVD of what the others leave of W: full rank gives W back.

    **Arguments**

    - `weight`: W, `(out, in)`, any floating dtype.
    - `rank`: int in [1, min(out, in)].
    - `weighting`: what outputs and inputs count for; by default all count alike, which is the plain SVD.

    **Returns** `Factors` in the dtype and on the device of `weight`, with the spectrum of H W S.

    **Raises**

    - `ValueError`: a rank out of range; a weight that is not a finite matrix; a weighting of another size; outputs that do not
      count at all, if their H has to be inverted.
    """
    w = _check_weight(weight, rank)
    outputs, inputs = _check_sides(weighting, w)
    if outputs is None and inputs is None:
        u, spectrum, _ = torch.linalg.svd(w, full_matrices=False)
        left, right = u[:, :rank], u[:, :rank].T @ w
    elif outputs is None:
        left, spectrum = _leading(w, rank, lambda core: _multiply(core, inputs))
        right = left.T @ w
    elif inputs is None and outputs.dim() == 1:
        basis, spectrum = _leading(w.T.contiguous(), rank, lambda core: core * outputs)
        left, right = w @ basis, basis.T
    else:
        root = _root(outputs)
        matrix = root @ w if root.dim() == 2 else root[:, None] * w
        basis, spectrum = _leading(matrix, rank, lambda core: _multiply(core, inputs))
        left = torch.linalg.solve_triangular(root, basis, upper=True) if root.dim() == 2 else basis / root[:, None]
        right = basis.T @ matrix
    return Factors(left.to(weight.dtype), right.to(weight.dtype), spectrum)


def weighted_norm(difference: Float[Tensor, "out in"], weighting: Weighting = ALIKE) -> float:
    """Return ||H D S||_F in float64, the norm that `Factors.error` predicts.

    **Arguments**

    - `difference`: D, `(out, in)`, any floating dtype.
    - `weighting`: what outputs and inputs count for.

    **Raises**

    - `ValueError`: a weighting of another size.
    """
    d = difference.detach().double()
    outputs, inputs = _check_sides(weighting, d)
    if inputs is not None and inputs.dim() == 1:
        d, inputs = d * inputs.sqrt(), None
    if outputs is not None and outputs.dim() == 1:
        d, outputs = d * outputs.sqrt()[:, None], None
    if outputs is not None:
        return (_multiply(outputs @ d, inputs) * d).sum().clamp_min(0.0).sqrt().item()
    return d.norm().item() if inputs is None else gram_norm(d, inputs)


def _check_weight(weight: Tensor, rank: int) -> Tensor:
    """Return the weight in float64."""
    if weight.dim() != 2:
        raise ValueError(f"`weight` must have two dimensions, got shape {tuple(weight.shape)}.")
    rule = f"be in [1, {min(weight.shape)}] for a weight of shape {tuple(weight.shape)}"
    require(1 <= rank <= min(weight.shape), "rank", rule, rank)
    if not all_finite(weight):
        raise ValueError("`weight` must be finite, got NaN or infinity.")
    return weight.detach().double()


def _check_sides(weighting: Weighting, weight: Tensor) -> Weighting:
    """Return the weighting on the device of the weight, in float64."""
    for name, side, size in zip(Weighting._fields, weighting, weight.shape, strict=True):
        if side is not None and tuple(side.shape) not in ((size,), (size, size)):
            raise ValueError(f"`weighting.{name}` must be of size {size}, got shape {tuple(side.shape)}.")
    return Weighting(*(side if side is None else side.to(weight) for side in weighting))


def _multiply(matrix: Tensor, inputs: Tensor | None) -> Tensor:
    if inputs is None:
        return matrix
    return matrix * inputs if inputs.dim() == 1 else matrix @ inputs


def _root(outputs: Tensor) -> Tensor:
    """Return H with H^T H = outputs: the roots of a diagonal, or an upper triangular matrix."""
    if outputs.dim() == 1:
        if not bool((outputs > 0).all()):
            raise ValueError("`weighting.outputs` must be > 0 if inputs are weighted too, got a value <= 0.")
        return outputs.sqrt()
    root, failed = torch.linalg.cholesky_ex(outputs)
    if bool(failed):
        raise ValueError("`weighting.outputs` must be positive definite, got a matrix without Cholesky factor.")
    return root.T


def _leading(matrix: Tensor, rank: int, weighted: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the `rank` leading eigenvectors of M G M^T and the square roots of all its eigenvalues, descending.

    `weighted` maps M to M G. Directions that G does not excite are ordered by the plain SVD of what the others leave of M.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    reflectors = torch.geqrf(matrix) if tall else None  # M = Q R: work on the cheaper side, never form Q
    core = reflectors[0][: matrix.shape[1]].triu() if reflectors else matrix
    product = weighted(core) @ core.T
    product = (product + product.T).div_(2)  # two of them in memory, not three
    values, basis = torch.linalg.eigh(product)
    values, basis = values.flip(0).clamp_min(0.0), basis.flip(1)
    excited = int((values > values[0] * torch.finfo(values.dtype).eps * len(values)).sum())
    values[excited:] = 0.0  # rounding, not energy
    if excited < rank:
        basis = _fill(core, basis[:, :excited])
    basis = basis[:, :rank]
    if reflectors:
        basis = torch.ormqr(*reflectors, nn.functional.pad(basis, (0, 0, 0, matrix.shape[0] - matrix.shape[1])))
    return basis, values.sqrt()


def _fill(core: Tensor, basis: Tensor) -> Tensor:
    """Complete the basis to a square one, by the left singular vectors of what it leaves of the matrix."""
    complement = torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]
    u = torch.linalg.svd(complement.T @ core, full_matrices=False).U
    return torch.cat([basis, complement @ u], dim=1)
