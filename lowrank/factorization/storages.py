"""Forms of storing a weight of low rank, and what a rank costs in each."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any


@dataclass(frozen=True)
class Storage:
    """Describe a form of storing an (out, in) weight of rank r.

    **Arguments**

    - `name`: its key in `STORAGES`.
    - `parameters`: function of (out, in, rank), the number of parameters; `rank` may be an int array.
    - `largest_rank`: function of (out, in, budget), the largest rank with at most `budget` parameters; `budget` is an int
      below out * in.
    - `indices`: function of rank, the number of integers stored beside the parameters.
    """

    name: str
    parameters: Callable[[int, int, Any], Any]
    largest_rank: Callable[[int, int, int], int]
    indices: Callable[[int], int]


def _pivoted_parameters(out: int, inputs: int, rank: Any) -> Any:
    return rank * (out + inputs - rank)


def _largest_pivoted_rank(out: int, inputs: int, budget: int) -> int:
    root = isqrt((out + inputs) ** 2 - 4 * budget)  # of r (out + in - r) = budget; the smaller solution
    rank = (out + inputs - root) // 2
    return rank - (_pivoted_parameters(out, inputs, rank) > budget)  # isqrt rounds down, the rank up


# 'factors': B and A. 'pivoted': r rows of the product, and the combinations of them that give the others (Zhao et al., PIFA,
# arXiv:2501.19090, section 3); never more parameters than the dense weight.
FACTORS = Storage(
    name="factors",
    parameters=lambda out, inputs, rank: rank * (out + inputs),
    largest_rank=lambda out, inputs, budget: budget // (out + inputs),
    indices=lambda rank: 0,
)
PIVOTED = Storage(
    name="pivoted",
    parameters=_pivoted_parameters,
    largest_rank=_largest_pivoted_rank,
    indices=lambda rank: rank,
)
STORAGES: dict[str, Storage] = {storage.name: storage for storage in (FACTORS, PIVOTED)}
