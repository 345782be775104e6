"""Rank-r factors of a weight: one function per method, all with one signature.

A method is `(weight, rank, statistics) -> Factors`, so a comparison is a dict of functions and a loop. Every method here
minimises ||H (W - W') S||_F over the weights W' of a rank; they differ in what the outputs (H) and the inputs (S) count for:

| method | H | S |
|---|---|---|
| `svd` | I | I |
| `asvd` | I | diag(mean abs x)^alpha |
| `fwsvd` | diag(row Fisher)^(1/2) | I |
| `whitened` | I | S S^T = G |
| `two_sided` | H^T H = E[g g^T], with a ridge | S S^T = G |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.factorization.moments import LayerStatistics, all_finite, checked_gram, output_norm

ALPHA = 0.5  # exponent of ASVD's channel scales
RIDGE = 0.03  # of two_sided, relative to the mean eigenvalue of E[g g^T]


@dataclass(frozen=True, eq=False)
class Factors:
    """W ~ left @ right, with the spectrum that says what was given up.

    `left`: `(out, rank)`; `right`: `(rank, in)`. `spectrum`: every singular value, descending, float64, of the matrix that
    the method truncates, H W S: its tail is the error in the method's own norm.
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
    if not all_finite(weight):
        raise ValueError("`weight` must be finite, got NaN or infinity.")
    return weight.detach().double()


def _leading(matrix: Tensor, rank: int, weighted: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The `rank` leading eigenvectors of M G M^T and the square roots of all its eigenvalues, descending.

    Directions that G does not excite are ordered by the plain SVD of what the others leave of M, so that at full rank the
    projection gives M back.

    **Arguments:** `weighted`: M -> M G.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    reflectors = torch.geqrf(matrix) if tall else None  # M = Q R: work on the cheaper side, never form Q
    core = reflectors[0][: matrix.shape[1]].triu() if reflectors else matrix
    product = weighted(core) @ core.T
    product = (product + product.T).div_(2)  # two of them alive, not three
    values, basis = torch.linalg.eigh(product)
    values, basis = values.flip(0).clamp_min(0.0), basis.flip(1)
    excited = int((values > values[0] * torch.finfo(values.dtype).eps * len(values)).sum())
    values[excited:] = 0.0  # rounding, not energy
    if excited < rank:
        basis = _filled(core, basis[:, :excited])
    basis = basis[:, :rank]
    if reflectors:
        basis = torch.ormqr(*reflectors, nn.functional.pad(basis, (0, 0, 0, matrix.shape[0] - matrix.shape[1])))
    return basis, values.sqrt()


def _filled(core: Tensor, basis: Tensor) -> Tensor:
    """The basis completed to a square one, by the left singular vectors of what it leaves of the matrix."""
    complement = torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]
    u = torch.linalg.svd(complement.T @ core, full_matrices=False).U
    return torch.cat([basis, complement @ u], dim=1)


def _fitting(values: Tensor | None, size: int, what: str, weight: Tensor) -> Tensor:
    """One part of the statistics, once it is known to be there, of the weight's size and finite."""
    if values is None:
        raise ValueError(f"`statistics` must hold {what}: pass `loss` to collect_statistics.")
    if len(values) != size:
        raise ValueError(
            f"`statistics` must have {what} of size {size} for a weight of shape {tuple(weight.shape)}, got {len(values)}."
        )
    if not all_finite(values):
        raise ValueError(f"`statistics` must be finite, got NaN or infinity in the {what}.")
    return values.double().to(weight.device)


def _gram(statistics: LayerStatistics, weight: Tensor) -> Tensor:
    return _fitting(checked_gram(statistics), weight.shape[1], "second moments of the inputs", weight)


def _channel_scales(statistics: LayerStatistics, weight: Tensor) -> Tensor:
    return _fitting(statistics.abs_mean, weight.shape[1], "mean |x|", weight) ** ALPHA


def _row_fisher(statistics: LayerStatistics, weight: Tensor) -> Tensor:
    return _fitting(statistics.row_fisher, weight.shape[0], "row Fisher information", weight)


def _output_moment(statistics: LayerStatistics, weight: Tensor) -> Tensor:
    """E[g g^T] with its ridge, positive definite; the identity where no gradient reaches the layer."""
    gram = _fitting(statistics.gradient_gram, weight.shape[0], "second moments of the output gradients", weight)
    mean = gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (gram + RIDGE * mean * eye) / statistics.tokens if mean > 0 else eye


def svd(weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics | None = None) -> Factors:
    """Best rank-`rank` factors of a weight in the Frobenius norm, blind to the data.

    **Arguments:** `weight`: W, `(out, in)`, any floating dtype. `rank`: in `[1, min(out, in)]`. `statistics`: not used.

    **Returns:** `Factors` in the dtype and on the device of `weight`; `error` is ||W - B A||_F.

    **Raises:** `ValueError`: a rank out of range, a weight that is not a finite matrix.

    **Reference:** Eckart and Young, Psychometrika 1936.
    """
    w = _checked(weight, rank)
    u, sigma, _ = torch.linalg.svd(w, full_matrices=False)
    return Factors(u[:, :rank].to(weight.dtype), (u[:, :rank].T @ w).to(weight.dtype), sigma)


def asvd(weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics) -> Factors:
    """Factors with each input channel weighted by the square root of its mean magnitude.

    The truncation of W diag(s), s_j = (mean |x_j|)^alpha with alpha = 0.5, with the scaling undone. In projector form no s_j
    is divided by, so dead channels need no constant. A diagonal stand-in for G: it cannot see correlations.

    **Arguments:** as for `svd`; `statistics`: of these `abs_mean`, `(in,)`.

    **Returns:** `Factors`; `error` is ||(W - B A) diag(s)||_F.

    **Raises:** `ValueError`: as for `svd`; statistics of another size or not finite.

    **Reference:** Yuan et al., ASVD, arXiv:2312.05821, section 3.2.
    """
    w = _checked(weight, rank)
    scales = _channel_scales(statistics, w)
    basis, spectrum = _leading(w, rank, lambda core: core * scales**2)
    return Factors(basis.to(weight.dtype), (basis.T @ w).to(weight.dtype), spectrum)


def fwsvd(weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics) -> Factors:
    """Factors with each row of the weight weighted by its empirical Fisher information.

    The truncation of D W, D^2 = diag of the Fisher information summed over each row, with D undone. In projector form,
    B = W V and A = V^T with V the leading right singular vectors of D W, so rows without gradient need no constant.

    **Arguments:** as for `svd`; `statistics`: of these `row_fisher`, `(out,)`.

    **Returns:** `Factors`; `error` is ||D (W - B A)||_F.

    **Raises:** `ValueError`: as for `svd`; statistics without gradients, of another size or not finite.

    **Reference:** Hsu et al., FWSVD, ICLR 2022, arXiv:2207.00112, equations 4 to 8.
    """
    w = _checked(weight, rank)
    fisher = _row_fisher(statistics, w)
    basis, spectrum = _leading(w.T.contiguous(), rank, lambda core: core * fisher)
    return Factors((w @ basis).to(weight.dtype), basis.T.to(weight.dtype), spectrum)


def whitened(weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics) -> Factors:
    """Best rank-`rank` factors of a weight in the norm of its calibration inputs.

    Minimises ||(W - B A) X||_F. The optimum is W projected onto the `rank` leading eigenvectors U of W G W^T, so B = U
    and A = U^T W: no Cholesky factor and no inverse, and a rank-deficient G needs no care. Directions that no input
    excites are ordered by the plain SVD of what the others leave of W, so that full rank gives W back.

    **Arguments:** `weight`: W, `(out, in)`, any floating dtype. `rank`: in `[1, min(out, in)]`. `statistics`: second
    moment G of the inputs, `(in, in)`, float64.

    **Returns:** `Factors`: `left` `(out, rank)` and `right` `(rank, in)` in the dtype and on the device of `weight`;
    `error`, the norm above as the discarded singular values of W S predict it.

    **Raises:** `ValueError`: "`rank` must be in [1, 4] for a weight of shape (6, 4), got 9."; statistics of another
    size, without tokens, or not finite.

    **Reference:** Chen et al., DRONE, NeurIPS 2021; Wang et al., SVD-LLM, ICLR 2025, arXiv:2403.07378.
    """
    w = _checked(weight, rank)
    gram = _gram(statistics, w)
    basis, spectrum = _leading(w, rank, lambda core: core @ gram)
    return Factors(basis.to(weight.dtype), (basis.T @ w).to(weight.dtype), spectrum)


def two_sided(weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics) -> Factors:
    """Best factors in a Kronecker approximation of the loss: inputs weighted by G, outputs by their gradients.

    Minimises ||H (W - B A) S||_F with H^T H = E[g g^T] + 0.03 x its mean eigenvalue. With U the leading left singular vectors
    of H W S, B = H^-1 U and A = U^T H W: only H, which the ridge keeps well conditioned, is inverted. error^2 approximates
    twice the rise of the loss summed over the calibration data (gradients under labels drawn from the model), so the
    spectra of different layers compare.

    **Arguments:** as for `whitened`; `statistics`: also `gradient_gram`, `(out, out)`.

    **Returns:** `Factors`; `error` is the norm above, as the discarded singular values of H W S predict it.

    **Raises:** `ValueError`: as for `whitened`; statistics without gradients.

    **Reference:** Martens and Grosse, KFAC, ICML 2015, arXiv:1503.05671, section 3, for the weighting.
    """
    w = _checked(weight, rank)
    gram = _gram(statistics, w)
    root = torch.linalg.cholesky(_output_moment(statistics, w)).T  # H, upper triangular: any H with this H^T H will do
    matrix = root @ w
    basis, spectrum = _leading(matrix, rank, lambda core: core @ gram)
    left = torch.linalg.solve_triangular(root, basis, upper=True)
    return Factors(left.to(weight.dtype), (basis.T @ matrix).to(weight.dtype), spectrum)


def _two_sided_norm(difference: Tensor, statistics: LayerStatistics) -> float:
    d = difference.double()
    product = _output_moment(statistics, d) @ d @ _gram(statistics, d)
    return (product * d).sum().clamp_min(0.0).sqrt().item()


Method = Callable[[Tensor, int, LayerStatistics], Factors]

METHODS: dict[str, Method] = {"svd": svd, "asvd": asvd, "fwsvd": fwsvd, "whitened": whitened, "two_sided": two_sided}

# What a method reads of the statistics; each raises ValueError where that is missing, of another size or not finite.
READS: dict[str, tuple[Callable[[LayerStatistics, Tensor], Tensor], ...]] = {
    "svd": (),
    "asvd": (_channel_scales,),
    "fwsvd": (_row_fisher,),
    "whitened": (_gram,),
    "two_sided": (_gram, _output_moment),
}

# The norm ||H D S||_F in which each method is the best, of any difference D of weights: what `Factors.error` predicts.
NORMS: dict[str, Callable[[Tensor, LayerStatistics], float]] = {
    "svd": lambda d, statistics: d.double().norm().item(),
    "asvd": lambda d, statistics: (d.double() * _channel_scales(statistics, d)).norm().item(),
    "fwsvd": lambda d, statistics: (d.double() * _row_fisher(statistics, d).sqrt()[:, None]).norm().item(),
    "whitened": output_norm,
    "two_sided": _two_sided_norm,
}
