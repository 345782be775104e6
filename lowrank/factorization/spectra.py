"""Functions of singular values: ranks, energies, the nuclear norm.

Each takes the singular values of one matrix, `(k,)`, or of several of the same size, `(..., k)`, >= 0, in any order and any
floating dtype, and computes in float64. A zero matrix has rank 0 by every definition, and keeps all of its energy.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowrank.factorization.precision import with_float64
from lowrank.io.checks import require


def _sort(singular_values: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """Return the values descending and in float64."""
    values = torch.as_tensor(
        np.asarray(singular_values) if isinstance(singular_values, list | tuple) else singular_values
    )
    if values.dim() == 0 or values.shape[-1] == 0:
        raise ValueError(f"`singular_values` must have shape (..., k) with k >= 1, got {tuple(values.shape)}.")
    if values.is_complex() or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("`singular_values` must be finite, real and >= 0.")
    return with_float64(values).to(torch.float64).sort(dim=-1, descending=True).values


def _ratio(part: Tensor, whole: Tensor, empty: float) -> Tensor:
    """Return part / whole, and `empty` if whole is zero; differentiable in both cases."""
    zero = whole == 0
    return torch.where(zero, torch.full_like(whole, empty), part / torch.where(zero, torch.ones_like(whole), whole))


def _energy(singular_values: Tensor) -> Tensor:
    """Return the squares, scaled by the largest value so that they neither overflow nor vanish."""
    return _ratio(singular_values, singular_values[..., :1].expand_as(singular_values), empty=0.0).square()


def stable_rank(singular_values: Float[Tensor, "... k"]) -> Float[Tensor, "..."]:
    """Return the stable rank ||W||_F^2 / ||W||_2^2 = sum of sigma^2 / sigma_1^2, in [1, rank]; 0 for a zero matrix."""
    return _energy(_sort(singular_values)).sum(-1)


def effective_rank(singular_values: Float[Tensor, "... k"]) -> Float[Tensor, "..."]:
    """Return exp of the entropy of p = sigma / sum sigma, in [1, rank]; 0 for a zero matrix.

    **Reference** Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    values = _sort(singular_values)
    total = values.sum(-1)
    p = _ratio(values, total.unsqueeze(-1).expand_as(values), empty=0.0)
    rank = torch.special.entr(p).sum(-1).exp()
    return torch.where(total == 0, torch.zeros_like(rank), rank)


def nuclear_norm(singular_values: Float[Tensor, "... k"]) -> Float[Tensor, "..."]:
    """Return the sum of the singular values."""
    return _sort(singular_values).sum(-1)


def retained_energy(singular_values: Float[Tensor, "... k"], rank: int) -> Float[Tensor, "..."]:
    """Return the share of sum sigma^2 in the largest values, in [0, 1]; 1 for a zero matrix.

    **Arguments**

    - `singular_values`: `(..., k)`.
    - `rank`: int in [0, k], the number of values that count.
    """
    return 1.0 - tail_energy(singular_values, rank)


def tail_energy(singular_values: Float[Tensor, "... k"], rank: int) -> Float[Tensor, "..."]:
    """Return the share of sum sigma^2 beyond the largest values, in [0, 1]; 0 for a zero matrix.

    **Arguments**

    - `singular_values`: `(..., k)`.
    - `rank`: int in [0, k], the number of values that do not count.

    **Raises**

    - `ValueError`: a rank out of range.
    """
    values = _sort(singular_values)
    require(0 <= rank <= values.shape[-1], "rank", f"be in [0, {values.shape[-1]}]", rank)
    energy = _energy(values)
    return _ratio(energy[..., rank:].sum(-1), energy.sum(-1), empty=0.0)


def rank_for_energy(singular_values: Float[Tensor, "... k"], threshold: float) -> Int[Tensor, "..."] | int:
    """Return the smallest rank whose retained energy reaches a threshold; 0 for a zero matrix.

    **Arguments**

    - `singular_values`: `(..., k)`.
    - `threshold`: in (0, 1].

    **Returns** an int for one matrix, an int64 tensor `(...)` for several.
    """
    require(0.0 < threshold <= 1.0, "threshold", "be in (0, 1]", threshold)
    reached = _energy(_sort(singular_values)).cumsum(-1)
    total = reached[..., -1:]
    ranks = torch.where(total[..., 0] == 0, 0, (reached < threshold * total).sum(-1) + 1)
    return int(ranks) if ranks.dim() == 0 else ranks
