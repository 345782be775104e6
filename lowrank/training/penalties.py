"""Rank penalties: differentiable functions of the singular values of a matrix A, computed from its singular vectors.

The left singular vectors u_i are constants, and sigma_i = ||u_i^T A||. The derivative u_i v_i^T is exact, because a change of
u_i changes sigma_i in second order only. A basis that is some steps old still gives a fair value; `tail` and `nuclear` are then
never below the true one. So one decomposition serves several steps of training. A tall matrix uses its right singular vectors,
which are fewer. Every penalty of a zero matrix is finite and has a finite gradient.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank.io.checks import require

TARGET_KEEP = 0.3  # default share of parameters to keep; `tail` penalises the energy beyond the rank of this share
SMOOTHING = 1e-9  # of `nuclear` and `entropy_rank`, in units of the root mean square singular value


def singular_basis(weight: Float[Tensor, "m n"]) -> Float[Tensor, "k k"]:
    """Return the singular vectors of the shorter side, k = min(m, n), by descending singular value, without gradient."""
    matrix = _wide(weight.detach())
    matrix = matrix / _positive(matrix.abs().amax())
    gram = matrix @ matrix.T
    return torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1)


def power_step(weight: Float[Tensor, "m n"], basis: Float[Tensor, "k c"]) -> Float[Tensor, "k c"]:
    """Improve the first vector of a basis by one step of the power iteration; keep the others.

    **Arguments**

    - `weight`: A, `(m, n)`.
    - `basis`: c >= 1 singular vectors of the shorter side, `(k, c)` with k = min(m, n).

    **Returns** the new basis, `(k, c)`.
    """
    matrix = _wide(weight.detach())
    first = matrix @ (matrix.T @ basis[:, :1])
    norm = first.norm()
    return torch.cat([torch.where(norm > 0, first / norm, basis[:, :1]), basis[:, 1:]], dim=1)


def stable_rank_penalty(
    weight: Float[Tensor, "m n"], rank: int | None = None, basis: Float[Tensor, "k c"] | None = None
) -> Float[Tensor, ""]:
    """Return the stable rank ||A||_F^2 / sigma_1^2, in [1, rank of A].

    It is the same for every multiple of A, and 0 for a zero matrix.

    **Arguments**

    - `weight`: A, `(m, n)`, any floating dtype.
    - `rank`: not used.
    - `basis`: `(k, c)`, from `singular_basis` of A as it is or was some steps ago; by default of A as it is. The first vector
      is used.

    **Returns** a scalar.

    **Reference** Qin et al., Low-Rank Prehab, arXiv:2512.01980, for BERT.
    """
    matrix = _wide(weight)
    first = (singular_basis(weight) if basis is None else basis)[:, :1]
    return _energy(matrix) / _positive(_energy(first.T @ matrix))


def nuclear_penalty(
    weight: Float[Tensor, "m n"], rank: int | None = None, basis: Float[Tensor, "k c"] | None = None
) -> Float[Tensor, ""]:
    """Return the sum of the singular values, smoothed at 1e-9 of their root mean square.

    It is proportional to the scale of A.

    **Arguments**

    - `weight`: A, `(m, n)`, any floating dtype.
    - `rank`: not used.
    - `basis`: `(k, k)`, from `singular_basis` of A as it is or was some steps ago; by default of A as it is. All vectors are
      used.

    **Returns** a scalar >= 0.

    **Reference** Qin et al., Low-Rank Prehab, arXiv:2512.01980, for ViT.
    """
    return _singular_values(weight, basis).sum()


def entropy_rank_penalty(
    weight: Float[Tensor, "m n"], rank: int | None = None, basis: Float[Tensor, "k c"] | None = None
) -> Float[Tensor, ""]:
    """Return exp of the entropy of p = sigma / sum sigma, in [1, rank of A].

    It is the same for every multiple of A, and 0 for a zero matrix.

    **Arguments**

    - `weight`: A, `(m, n)`, any floating dtype.
    - `rank`: not used.
    - `basis`: `(k, k)`, from `singular_basis` of A as it is or was some steps ago; by default of A as it is. All vectors are
      used.

    **Returns** a scalar.

    **Reference** Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    values = _singular_values(weight, basis)
    total = values.sum()
    p = (values / _positive(total)).clamp_min(torch.finfo(values.dtype).tiny)  # the slope of p log p at 0 is infinite
    return torch.special.entr(p).sum().exp() * (total.detach() > 0)


def tail_penalty(
    weight: Float[Tensor, "m n"], rank: int | None = None, basis: Float[Tensor, "k c"] | None = None
) -> Float[Tensor, ""]:
    """Return the share of the energy sum sigma^2 beyond the `rank` largest singular values, in [0, 1].

    It is the same for every multiple of A, and 0 for a zero matrix.

    **Arguments**

    - `weight`: A, `(m, n)`, any floating dtype.
    - `rank`: int in [0, min(m, n)]; by default the rank that keeps 0.3 of the parameters.
    - `basis`: `(k, c)`, from `singular_basis` of A as it is or was some steps ago; by default of A as it is. The first `rank`
      vectors are used.

    **Returns** a scalar.

    **Raises**

    - `ValueError`: a rank out of its range.
    """
    rank = max(1, int(TARGET_KEEP * weight.numel() / sum(weight.shape))) if rank is None else rank
    require(0 <= rank <= min(weight.shape), "rank", f"be in [0, {min(weight.shape)}]", rank)
    matrix = _wide(weight)
    kept = (singular_basis(weight) if basis is None else basis)[:, :rank]
    return _energy(matrix - kept @ (kept.T @ matrix)) / _positive(_energy(matrix))


Penalty = Callable[..., Tensor]

PENALTIES: dict[str, Penalty] = {
    "stable_rank": stable_rank_penalty,
    "nuclear": nuclear_penalty,
    "entropy_rank": entropy_rank_penalty,
    "tail": tail_penalty,
}

# How many vectors a penalty uses, of the `size` vectors of a basis and for a target rank.
COLUMNS: dict[str, Callable[[int, int], int]] = {
    "stable_rank": lambda size, rank: 1,
    "nuclear": lambda size, rank: size,
    "entropy_rank": lambda size, rank: size,
    "tail": lambda size, rank: rank,
}


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.shape[0] <= weight.shape[1] else weight.T


def _energy(matrix: Tensor) -> Tensor:
    """Return the sum of squares in one pass over the matrix, and one back."""
    return torch.linalg.vector_norm(matrix).square()


def _positive(value: Tensor) -> Tensor:
    """Return the value, or 1 if it is zero."""
    return torch.where(value > 0, value, torch.ones_like(value))


def _singular_values(weight: Tensor, basis: Tensor | None) -> Tensor:
    energies = ((singular_basis(weight) if basis is None else basis).T @ _wide(weight)).square().sum(1)
    mean = energies.detach().mean()
    floor = (SMOOTHING**2 * mean).clamp_min(torch.finfo(mean.dtype).tiny)
    return (energies + torch.where(mean > 0, floor, 1.0)).sqrt() * (mean > 0)
