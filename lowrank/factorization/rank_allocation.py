"""Parameters and ranks: what a rank costs in each way of storing it, and how to spend a budget of parameters.

`keep` is stored parameters over dense parameters of the targeted weights. Biases count in neither; they are the same
before and after.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import isqrt
from typing import Any, NamedTuple

import numpy as np

Shape = Sequence[int]


def _factor_parameters(out: int, inputs: int, rank: Any) -> Any:
    return rank * (out + inputs)


def _pivoted_parameters(out: int, inputs: int, rank: Any) -> Any:
    return rank * (out + inputs - rank)


# What rank r costs for an (out, in) weight. 'factors': B and A. 'pivoted': r rows of the product and what makes the others
# from them (Zhao et al., PIFA, arXiv:2501.19090, section 3), which is never more than dense.
STORAGES: dict[str, Callable[[int, int, Any], Any]] = {"factors": _factor_parameters, "pivoted": _pivoted_parameters}


def _cost(storage: str) -> Callable[[int, int, Any], Any]:
    if storage not in STORAGES:
        raise ValueError(f"`storage` must be one of {sorted(STORAGES)}, got {storage!r}.")
    return STORAGES[storage]


def _check_keep(keep: float | int) -> None:
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"`keep` must be in (0, 1], got {keep}.")


def kept_parameters(shape: Shape, rank: int, storage: str = "factors") -> int:
    """Parameters of a weight stored at a rank: never more than dense, for there the dense weight itself is stored.

    **Arguments:** `shape`: (out, in). `rank`: in [1, min(out, in)]. `storage`: 'factors', r (out + in), or 'pivoted',
    r (out + in) - r^2.

    **Raises:** `ValueError`: a rank out of range, an unknown storage.
    """
    out, inputs = shape
    if not 1 <= rank <= min(out, inputs):
        raise ValueError(
            f"`rank` must be in [1, {min(out, inputs)}] for a weight of shape {(out, inputs)}, got {rank}."
        )
    return min(_cost(storage)(out, inputs, rank), out * inputs)


def rank_for_keep(shape: Shape, keep: float | int, storage: str = "factors", multiple: int = 1) -> int:
    """The largest rank whose parameters are at most `keep` times the dense ones; min(out, in), which is dense, for keep 1.

    **Arguments:** `shape`: (out, in). `keep`: in (0, 1]. `storage`: see `kept_parameters`. `multiple`: the rank is rounded
    down to a multiple of this, which some hardware multiplies faster; not below one multiple.

    **Raises:** `ValueError`: `keep` outside (0, 1], or too small for rank 1 (or for one `multiple`).
    """
    _check_keep(keep)
    out, inputs = shape
    cost, full, budget = _cost(storage), min(out, inputs), int(keep * out * inputs + 1e-9)
    if budget >= out * inputs:
        return full
    if storage == "pivoted":
        rank = (
            out + inputs - isqrt((out + inputs) ** 2 - 4 * budget)
        ) // 2  # the smaller root of r (m + n - r) = budget
        rank -= cost(out, inputs, rank) > budget  # isqrt rounds down, the root up
    else:
        rank = budget // (out + inputs)
    rank = min(rank, full) // multiple * multiple
    if rank < 1:
        raise ValueError(
            f"`keep` must allow rank {multiple} ({cost(out, inputs, multiple)} of {out * inputs} parameters of a weight of "
            f"shape {(out, inputs)}), got {keep}."
        )
    return rank


def allocate_ranks(
    shapes: Mapping[str, Shape],
    keep: float | int,
    spectra: Mapping[str, Any] | None = None,
    *,
    storage: str = "factors",
    weights: Mapping[str, float] | None = None,
    floor: float = 0.5,
) -> dict[str, int]:
    """Ranks that spend one budget of parameters over several layers.

    Minimises sum over layers of w_l times the discarded sigma_l^2. Costs and gains of the ranks of a layer form a curve; the
    segments of its upper concave envelope are taken by gain per parameter until the budget is spent, the last one in part. At
    constant cost per rank that is one threshold on w sigma^2 for all layers, and the optimum but for the last rank. A rank
    that would cost as much as the dense weight becomes full rank, which is stored dense.

    Without `spectra`, every layer keeps the same share of its parameters (uniform), and what flooring leaves over goes to
    the layers that are furthest below.

    **Arguments:** `shapes`: layer -> (out, in). `keep`: of all layers together, in (0, 1]. `spectra`: layer -> singular
    values, descending, `(min(out, in),)`, of one method: those of `two_sided` compare between layers; those of `whitened`
    do not. `weights`: layer -> w_l >= 0, by default 1. `floor`: share of its uniform rank that every layer keeps at least.

    **Returns:** layer -> rank, in the order of `shapes`; together within the budget, and short of it by less than the
    cheapest rank that could be added.

    **Raises:** `ValueError`: `keep` or `floor` outside its range, a budget too small for rank 1 everywhere, spectra or weights
    of other layers or lengths.

    **Reference:** the Lagrange condition of the problem above; floors as in Swift-SVD, arXiv:2604.01609.
    """
    _check_keep(keep)
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"`floor` must be in [0, 1], got {floor}.")
    for what, given in (("spectra", spectra), ("weights", weights)):
        if given is not None and (missing := next((name for name in shapes if name not in given), None)):
            raise ValueError(f"`{what}` must have every layer of `shapes`, got none for {missing!r}.")
    weights = weights or dict.fromkeys(shapes, 1.0)
    if wrong := next((name for name in shapes if not 0.0 <= weights[name] < float("inf")), None):
        raise ValueError(f"`weights` must be finite and >= 0, got {weights[wrong]} for layer {wrong!r}.")
    curves = {name: _curve(name, shape, keep, storage, floor, spectra, weights[name]) for name, shape in shapes.items()}
    left = int(keep * sum(out * inputs for out, inputs in shapes.values()) + 1e-9)
    left -= sum(int(curve.costs[0]) for curve in curves.values())
    if left < 0:
        raise ValueError(f"`keep` must allow the least rank of every layer, got {keep}: {-left} parameters too few.")
    segments = (
        sorted(  # by gain per parameter; of equal ones the lower ranks first, so that equal layers get equal ranks
            ((*segment, name) for name, curve in curves.items() for segment in _envelope(curve)),
            key=lambda segment: (-segment[0], segment[1]),
        )
    )
    position = dict.fromkeys(curves, 0)
    for _, start, end, name in segments:
        if position[name] == start:  # else the layer stopped inside an earlier segment, where the next rank did not fit
            costs = curves[name].costs
            reached = max(start, min(end, int(np.searchsorted(costs, costs[start] + left, side="right")) - 1))
            left -= int(costs[reached] - costs[start])
            position[name] = reached
    return {name: int(curve.ranks[position[name]]) for name, curve in curves.items()}


class _Curve(NamedTuple):
    """What the ranks of one layer cost and gain, from the least one it must have to dense."""

    ranks: np.ndarray
    costs: np.ndarray
    gains: np.ndarray


def _curve(
    name: str,
    shape: Shape,
    keep: float | int,
    storage: str,
    floor: float,
    spectra: Mapping[str, Any] | None,
    weight: float,
) -> _Curve:
    out, inputs = shape
    ranks = np.arange(1, min(shape) + 1)
    costs = _cost(storage)(out, inputs, ranks)
    smaller = costs < out * inputs
    ranks, costs = np.append(ranks[smaller], min(shape)), np.append(costs[smaller], out * inputs)
    least = max(1, int(floor * (costs <= keep * out * inputs + 1e-9).sum() + 1e-9))  # of its uniform rank
    if spectra is None:
        gains = -((1 - costs / (out * inputs)) ** 2) * out * inputs  # the best next parameter: in the emptiest layer
    else:
        values = np.asarray(spectra[name], dtype=np.float64)
        if values.shape != (min(shape),) or not np.isfinite(values).all() or (np.diff(values) > 0).any():
            raise ValueError(
                f"`spectra` must hold {min(shape)} finite values, descending, for layer {name!r}, got {values.shape}."
            )
        gains = weight * (values**2).cumsum()[ranks - 1]
    return _Curve(ranks[least - 1 :], costs[least - 1 :], gains[least - 1 :])


def _envelope(curve: _Curve) -> Iterator[tuple[float, int, int]]:
    """The segments of the upper concave envelope of gain over cost: slope, first and last position; slopes fall."""
    corners: list[int] = []
    for end in range(len(curve.costs)):
        while len(corners) > 1 and _slope(curve, corners[-2], corners[-1]) < _slope(curve, corners[-1], end):
            corners.pop()
        corners.append(end)
    for start, end in pairwise(corners):
        yield _slope(curve, start, end), start, end


def _slope(curve: _Curve, start: int, end: int) -> float:
    return float((curve.gains[end] - curve.gains[start]) / (curve.costs[end] - curve.costs[start]))
