"""Choose independent rows of a low-rank matrix so that all other rows are small combinations of them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SLAB = 384  # rows that are solved for at once
MAX_COEFFICIENT = 1.25  # bound on the coefficients; closer to 1 needs more exchanges


def find_pivot_rows(left: Float[Tensor, "out rank"]) -> tuple[Int[Tensor, " rank"], Float[Tensor, "rest rank"]]:
    """Choose `rank` rows P of a matrix, and express the other rows by them: left[~P] = C left[P] with |C| <= 1.25.

    LU with partial pivoting gives independent rows. While an entry of C is larger than `MAX_COEFFICIENT`, its row and its pivot
    are exchanged. Each exchange multiplies the volume of the pivot rows by that entry, so the search ends (maxvol).

    **Arguments**

    - `left`: `(out, rank)` with rank < out, float64. Its columns may be dependent.

    **Returns** the pivots P, `(rank,)`, int64; the coefficients C, `(out - rank, rank)`, with the other rows in ascending order.
    """
    basis = torch.linalg.qr(left).Q  # the same column space, well conditioned
    rank = basis.shape[1]
    packed, permutation = _permuted_lu(basis)
    for rows in packed[rank:].split(SLAB):  # in place, as all that has the size of the matrix
        rows.copy_(torch.linalg.solve_triangular(packed[:rank], rows, upper=False, left=False, unitriangular=True))
    pivots, others = permutation[:rank].clone(), permutation[rank:].clone()
    _exchange_rows(packed[rank:], pivots, others)
    del packed  # the coefficients are computed anew, without the rounding of the exchanges
    others = others.sort().values
    square, coefficients = torch.linalg.lu_factor(basis[pivots]), basis.new_empty(len(others), rank)
    for rows, places in zip(coefficients.split(SLAB), others.split(SLAB), strict=True):
        rows.copy_(torch.linalg.lu_solve(*square, basis[places], left=False))
    return pivots, coefficients


def _exchange_rows(coefficients: Tensor, pivots: Tensor, others: Tensor) -> None:
    """Exchange pivots for other rows, in place, until no coefficient is larger than `MAX_COEFFICIENT`."""
    while coefficients.numel():
        low, high = (divmod(int(place), len(pivots)) for place in (coefficients.argmin(), coefficients.argmax()))
        row, column = low if coefficients[low].abs() > coefficients[high].abs() else high
        pivot = coefficients[row, column].clone()
        if pivot.abs() <= MAX_COEFFICIENT:
            break
        new_row, old_column = coefficients[row] / pivot, coefficients[:, column].clone()
        coefficients.addr_(old_column, new_row, alpha=-1)
        coefficients[:, column] = old_column / pivot
        coefficients[row] = -new_row
        coefficients[row, column] = 1 / pivot
        pivots[column], others[row] = others[row].clone(), pivots[column].clone()


def _permuted_lu(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return both triangular factors in one matrix, `(out, rank)`, and the order of the rows in it."""
    packed, swaps = torch.linalg.lu_factor(basis)
    order = list(range(len(basis)))  # swapped on the CPU: an accelerator would wait for each of them
    for row, other in enumerate(swaps.tolist()):
        order[row], order[other - 1] = order[other - 1], order[row]
    return packed, torch.tensor(order, device=basis.device)
