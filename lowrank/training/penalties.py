"""Rank penalties: differentiable functions of the singular values of a matrix A, seen through its singular vectors.

With the left singular vectors u_i held constant, sigma_i = ||u_i^T A||: its derivative u_i v_i^T is exact, for a change of
u_i moves it in second order only. A basis that is some steps old still gives a fair value, for `tail` and `nuclear` never
below the true one, so one decomposition serves several steps of training. Of a tall matrix the right singular vectors are
taken, which are fewer. Every penalty is finite, with a finite gradient, for a zero matrix.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

TARGET_KEEP = 0.3  # kept share whose rank `tail` looks beyond, where none is given
SMOOTHING = 1e-9  # of `nuclear` and `entropy_rank`, in units of the root mean square singular value


def basis_of(weight: Float[Tensor, "m n"]) -> Float[Tensor, "k k"]:
    """The singular vectors of the shorter side, k = min(m, n), by descending singular value; no gradient flows through."""
    matrix = _wide(weight.detach())
    matrix = matrix / _positive(matrix.abs().amax())
    gram = matrix @ matrix.T
    return torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1)


def power_step(weight: Float[Tensor, "m n"], basis: Float[Tensor, "k c"]) -> Float[Tensor, "k c"]:
    """One step of the power iteration from the first vector of a basis, which alone is renewed."""
    matrix = _wide(weight.detach())
    first = matrix @ (matrix.T @ basis[:, :1])
    norm = first.norm()
    return torch.cat([torch.where(norm > 0, first / norm, basis[:, :1]), basis[:, 1:]], dim=1)


def stable_rank(
    weight: Float[Tensor, "m n"], rank: int | None = None, basis: Float[Tensor, "k c"] | None = None
) -> Float[Tensor, ""]:
    """||A||_F^2 / sigma_1^2, in [1, rank of A]; the same for every multiple of A; 0 for a zero matrix.

    **Arguments:** `weight`: A. `rank`: not used. `basis`: from `basis_of`, or some steps old; of it the first vector.

    **Reference:** Qin et al., Low-Rank Prehab, arXiv:2512.01980, for BERT.
    """
    matrix = _wide(weight)
    first = (basis_of(weight) if basis is None else basis)[:, :1]
    return _energy(matrix) / _positive(_energy(first.T @ matrix))


def nuclear(
    weight: Float[Tensor, "m n"], rank: int | None = None, basis: Float[Tensor, "k c"] | None = None
) -> Float[Tensor, ""]:
    """The sum of the singular values, smoothed at 1e-9 of their root mean square; grows with A as its scale does.

    **Arguments:** as for `stable_rank`; of `basis` all vectors.

    **Reference:** Qin et al., Low-Rank Prehab, arXiv:2512.01980, for ViT.
    """
    return _singular_values(weight, basis).sum()


def entropy_rank(
    weight: Float[Tensor, "m n"], rank: int | None = None, basis: Float[Tensor, "k c"] | None = None
) -> Float[Tensor, ""]:
    """exp of the entropy of p = sigma / sum sigma, in [1, rank of A]; the same for every multiple of A; 0 for a zero matrix.

    **Arguments:** as for `stable_rank`; of `basis` all vectors.

    **Reference:** Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    values = _singular_values(weight, basis)
    total = values.sum()
    p = (values / _positive(total)).clamp_min(torch.finfo(values.dtype).tiny)  # the slope of p log p at 0 is infinite
    return torch.special.entr(p).sum().exp() * (total.detach() > 0)


def tail(
    weight: Float[Tensor, "m n"], rank: int | None = None, basis: Float[Tensor, "k c"] | None = None
) -> Float[Tensor, ""]:
    """The share of the energy sum sigma^2 beyond the `rank` largest, in [0, 1]; the same for every multiple of A; 0 for a
    zero matrix.

    **Arguments:** as for `stable_rank`; `rank`: in [0, min(m, n)], by default that of keep 0.3; of `basis` the first `rank`.
    """
    rank = max(1, int(TARGET_KEEP * weight.numel() / sum(weight.shape))) if rank is None else rank
    if not 0 <= rank <= min(weight.shape):
        raise ValueError(f"`rank` must be in [0, {min(weight.shape)}], got {rank}.")
    matrix = _wide(weight)
    kept = (basis_of(weight) if basis is None else basis)[:, :rank]
    return _energy(matrix - kept @ (kept.T @ matrix)) / _positive(_energy(matrix))


Penalty = Callable[..., Tensor]

PENALTIES: dict[str, Penalty] = {
    "stable_rank": stable_rank,
    "nuclear": nuclear,
    "entropy_rank": entropy_rank,
    "tail": tail,
}

# How many vectors of the basis a penalty looks at, of `size` at a target rank.
COLUMNS: dict[str, Callable[[int, int], int]] = {
    "stable_rank": lambda size, rank: 1,
    "nuclear": lambda size, rank: size,
    "entropy_rank": lambda size, rank: size,
    "tail": lambda size, rank: rank,
}


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.shape[0] <= weight.shape[1] else weight.T


def _energy(matrix: Tensor) -> Tensor:
    """The sum of squares; one pass over the matrix, and one back."""
    return torch.linalg.vector_norm(matrix).square()


def _positive(value: Tensor) -> Tensor:
    """The value, or 1 where it is zero."""
    return torch.where(value > 0, value, torch.ones_like(value))


def _singular_values(weight: Tensor, basis: Tensor | None) -> Tensor:
    energies = ((basis_of(weight) if basis is None else basis).T @ _wide(weight)).square().sum(1)
    mean = energies.detach().mean()
    floor = (SMOOTHING**2 * mean).clamp_min(torch.finfo(mean.dtype).tiny)
    return (energies + torch.where(mean > 0, floor, 1.0)).sqrt() * (mean > 0)
