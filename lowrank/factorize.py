"""Rank-r factors of a weight: one function per method, all with one signature.

A method is `(weight, rank, statistics) -> Factors`, so a comparison is a dict of functions and a loop.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.statistics import LayerStatistics, checked_gram


@dataclass(frozen=True, eq=False)
class Factors:
    """W ~ left @ right, with the spectrum that says what was given up.

    `left`: `(out, rank)`, orthonormal columns; `right`: `(rank, in)`. `spectrum`: every singular value, descending,
    float64, of the matrix that the method truncates: its tail is the error in the method's own norm.
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]
    spectrum: Float[Tensor, " full"]

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def error(self) -> float:
        """The norm of what was given up: sqrt of the sum of the squared discarded singular values."""
        return self.spectrum[self.rank :].norm().item()

    def dense(self) -> Float[Tensor, "out in"]:
        """left @ right, formed in float64 and rounded once to the factors' dtype."""
        return (self.left.double() @ self.right.double()).to(self.left.dtype)

    def truncate(self, rank: int) -> "Factors":
        """The factors at a smaller rank. They are nested, so one decomposition serves every rank."""
        if not 1 <= rank <= self.rank:
            raise ValueError(f"`rank` must be in [1, {self.rank}], got {rank}.")
        return Factors(self.left[:, :rank], self.right[:rank], self.spectrum)


def _checked(weight: Tensor, rank: int) -> Tensor:
    """The weight in float64."""
    if weight.dim() != 2:
        raise ValueError(f"`weight` must have two dimensions, got shape {tuple(weight.shape)}.")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"`rank` must be in [1, {min(weight.shape)}] for a weight of shape {tuple(weight.shape)}, got {rank}."
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("`weight` must be finite, got NaN or infinity.")
    return weight.detach().double()


def _projected(weight: Tensor, basis: Tensor, spectrum: Tensor, dtype: torch.dtype) -> Factors:
    """Factors of the projection of W onto the columns of an orthonormal basis."""
    return Factors(basis.to(dtype), (basis.T @ weight).to(dtype), spectrum)


def svd(weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics | None = None) -> Factors:
    """Best rank-`rank` factors of a weight in the Frobenius norm, blind to the data.

    **Arguments:** `weight`: W, `(out, in)`, any floating dtype. `rank`: in `[1, min(out, in)]`. `statistics`: not used.

    **Returns:** `Factors` in the dtype and on the device of `weight`; `error` is ||W - B A||_F.

    **Raises:** `ValueError`: a rank out of range, a weight that is not a finite matrix.

    **Reference:** Eckart and Young, Psychometrika 1936.
    """
    w = _checked(weight, rank)
    u, sigma, _ = torch.linalg.svd(w, full_matrices=False)
    return _projected(w, u[:, :rank], sigma, weight.dtype)


def whitened(weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics) -> Factors:
    """Best rank-`rank` factors of a weight in the norm of its calibration inputs.

    Minimises ||(W - B A) X||_F. The optimum is W projected onto the `rank` leading eigenvectors U of W G W^T, so B = U
    and A = U^T W: no Cholesky factor and no inverse, and a rank-deficient G needs no care. Directions that no input
    excites are ordered by the plain SVD of what the others leave of W, so that full rank gives W back.

    **Arguments:** `weight`: W, `(out, in)`, any floating dtype. `rank`: in `[1, min(out, in)]`. `statistics`: second
    moment G of the inputs, `(in, in)`, float64.

    **Returns:** `Factors`: `left` `(out, rank)` and `right` `(rank, in)` in the dtype and on the device of `weight`;
    `error`, the norm above as the discarded singular values of W S sqrt(N) predict it.

    **Raises:** `ValueError`: "`rank` must be in [1, 4] for a weight of shape (6, 4), got 9."; statistics of another
    size, without tokens, or not finite.

    **Reference:** Chen et al., DRONE, NeurIPS 2021; Wang et al., SVD-LLM, ICLR 2025, arXiv:2403.07378.
    """
    w = _checked(weight, rank)
    if len(statistics.gram) != w.shape[1]:
        raise ValueError(
            f"`statistics` must be of {w.shape[1]} inputs for a weight of shape {tuple(w.shape)}, "
            f"got {len(statistics.gram)}."
        )
    gram = checked_gram(statistics).to(w.device)
    tall = w.shape[0] > w.shape[1]
    reflectors = torch.geqrf(w) if tall else None  # W = Q R: work on the cheaper side, never form Q
    core = reflectors[0][: w.shape[1]].triu() if reflectors else w
    product = core @ gram @ core.T
    values, basis = torch.linalg.eigh((product + product.T) / 2)
    values, basis = values.flip(0).clamp_min(0.0), basis.flip(1)
    excited = int((values > values[0] * torch.finfo(values.dtype).eps * len(values)).sum())
    values[excited:] = 0.0  # rounding, not energy
    if excited < rank:
        basis = _filled(core, basis[:, :excited])
    basis = basis[:, :rank]
    if reflectors:
        basis = torch.ormqr(*reflectors, nn.functional.pad(basis, (0, 0, 0, w.shape[0] - w.shape[1])))
    return _projected(w, basis, values.sqrt(), weight.dtype)


def _filled(core: Tensor, basis: Tensor) -> Tensor:
    """The basis completed to a square one, by the left singular vectors of what it leaves of the matrix."""
    complement = torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]
    u = torch.linalg.svd(complement.T @ core, full_matrices=False).U
    return torch.cat([basis, complement @ u], dim=1)


Method = Callable[[Tensor, int, LayerStatistics], Factors]

METHODS: dict[str, Method] = {"svd": svd, "whitened": whitened}
