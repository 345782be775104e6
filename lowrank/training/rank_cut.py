"""The rule by which OIALR lowers the rank of a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.io.checks import require


def cut_rank(singular_values: Tensor | Sequence[float], rank: int, sigma_cutoff: float | int, minimum: int) -> int:
    """Return the next rank: the number of values >= `sigma_cutoff` times the largest.

    The result is at least half of `rank`, and at least `minimum`.

    **Arguments**

    - `singular_values`: `(rank,)`, any order, compared in their dtype.
    - `rank`: the rank now, >= 1.
    - `sigma_cutoff`: beta in [0, 1); 0 cuts nothing.
    - `minimum`: >= 0; no cut goes below it.

    **Returns** an int in [1, rank].

    **Raises**

    - `ValueError`: a number out of its range; another number of values; values that are negative or not finite.

    **Reference** Coquelin et al., arXiv:2401.08505, section 4; the halving is from the published code.
    """
    values = torch.as_tensor(singular_values)
    values = values if values.is_floating_point() else values.double()
    require(rank >= 1, "rank", "be >= 1", rank)
    require(0 <= sigma_cutoff < 1, "sigma_cutoff", "be in [0, 1)", sigma_cutoff)
    require(minimum >= 0, "minimum", "be >= 0", minimum)
    require(values.shape == (rank,), "singular_values", f"be of shape ({rank},)", tuple(values.shape))
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("`singular_values` must be finite and >= 0, got NaN, infinity or a negative value.")
    suggested = int((values >= sigma_cutoff * values.max()).sum())
    if suggested < rank / 2 and rank / 2 > minimum:
        return rank // 2
    return min(rank, max(suggested, minimum))
