"""Ranks within a budget of parameters, for one weight or for all layers of a model.

`keep` is stored parameters over dense parameters of the targeted weights. Biases count in neither: they are the same before and
after.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lowrank.factorization.storages import STORAGES, Storage
from lowrank.io.arguments import check_arguments, describe
from lowrank.io.checks import require, whole_number

Shape = Sequence[int]


def _storage(name: str) -> Storage:
    require(name in STORAGES, "storage", f"be one of {sorted(STORAGES)}", name)
    return STORAGES[name]


def _check_shape(name: str, shape: Shape) -> tuple[int, int]:
    """Return (out, in) as Python integers, whose products do not overflow."""
    require(len(shape) == 2, name, "be (out, in)", tuple(shape))
    return whole_number(shape[0], name), whole_number(shape[1], name)


def kept_parameters(shape: Shape, rank: int, storage: str = "factors") -> int:
    """Return the parameters of a weight stored at a rank; never more than dense, because then the dense weight is stored.

    **Arguments**

    - `shape`: (out, in).
    - `rank`: int in [1, min(out, in)].
    - `storage`: 'factors', r (out + in) parameters, or 'pivoted', r (out + in) - r^2. Default 'factors'.

    **Raises**

    - `ValueError`: a shape that is none, a rank out of range, an unknown storage.
    """
    out, inputs = _check_shape("shape", shape)
    rule = f"be in [1, {min(out, inputs)}] for a weight of shape {(out, inputs)}"
    require(1 <= rank <= min(out, inputs), "rank", rule, rank)
    return min(_storage(storage).parameters(out, inputs, whole_number(rank, "rank")), out * inputs)


def rank_for_keep(shape: Shape, keep: float | int, storage: str = "factors", multiple: int = 1) -> int:
    """Return the largest rank whose parameters are at most `keep` times the dense ones.

    **Arguments**

    - `shape`: (out, in).
    - `keep`: in (0, 1]; 1 gives min(out, in), which is stored dense.
    - `storage`: see `kept_parameters`. Default 'factors'.
    - `multiple`: int >= 1; the rank is rounded down to a multiple of this, which some hardware multiplies faster. Default 1.

    **Raises**

    - `ValueError`: a shape that is none; `keep` outside (0, 1], or too small for rank `multiple`; a `multiple` that is no whole
      number >= 1.
    """
    require(0.0 < keep <= 1.0, "keep", "be in (0, 1]", keep)
    (out, inputs), how, multiple = _check_shape("shape", shape), _storage(storage), whole_number(multiple, "multiple")
    full, budget = min(out, inputs), int(keep * out * inputs + 1e-9)
    if budget >= out * inputs:
        return full
    rank = min(how.largest_rank(out, inputs, budget), full) // multiple * multiple
    rule = (
        f"allow rank {multiple} ({how.parameters(out, inputs, multiple)} of {out * inputs} parameters of a weight of shape "
        f"{(out, inputs)})"
    )
    require(rank >= 1, "keep", rule, keep)
    return rank


@check_arguments
def allocate_ranks(
    shapes: Mapping[str, Shape],
    keep: float | int,
    spectra: Mapping[str, Any] | None = None,
    *,
    storage: str = "factors",
    weights: Mapping[str, float] | None = None,
    floor: float = 0.5,
    multiple: int = 1,
    dense: Collection[str] = (),
) -> dict[str, int]:
    """Choose ranks that spend one budget of parameters over several layers.

    Minimises the sum over layers of w_l times the discarded sigma_l^2. The gains of the ranks of a layer over their costs form a
    curve. The segments of its upper concave envelope are taken by gain per parameter until the budget is spent, the last one
    in part. If every rank costs the same, that is one threshold on w sigma^2 for all layers, and the optimum up to the last
    rank. A rank that would cost as much as the dense weight becomes full rank, which is stored dense.

    Without `spectra`, every layer keeps the same share of its parameters (uniform), and what rounding down leaves over goes to
    the layers that are furthest below.

    Layers that must stay dense are paid first. The others divide what is left, and their uniform ranks are those of the share
    that is left to them.

    **Arguments**

    - `shapes`: layer -> (out, in).
    - `keep`: of all layers together, in (0, 1].
    - `spectra`: layer -> singular values, descending, `(min(out, in),)`, of one method. Those of `two_sided` compare between
      layers; those of `whitened` do not. Default None.
    - `storage`: a key of `STORAGES`. Default 'factors'.
    - `weights`: layer -> w_l >= 0. Default 1 for each layer.
    - `floor`: in [0, 1], the share of its uniform rank that every layer keeps at least. Default 0.5.
    - `multiple`: int >= 1; every rank is a multiple of this, or full, which is stored dense. Default 1.
    - `dense`: layers that keep full rank inside the budget. Default none.

    **Returns** layer -> rank, in the order of `shapes`; together within the budget, and short of it by less than the cheapest
    step that could be added.

    **Raises**

    - `ValueError`: shapes that are none; `keep`, `floor` or `multiple` outside its range; a budget too small for the dense layers
      and the least rank of every other; spectra or weights of other layers or lengths; an unknown layer in `dense`.

    **Reference** the Lagrange condition of the problem above; floors as in Swift-SVD, arXiv:2604.01609.
    """
    require(0.0 < keep <= 1.0, "keep", "be in (0, 1]", keep)
    require(0.0 <= floor <= 1.0, "floor", "be in [0, 1]", floor)
    multiple = whole_number(multiple, "multiple")
    shapes = {name: _check_shape(f"shapes[{name!r}]", shape) for name, shape in shapes.items()}
    unknown = sorted(set(dense) - shapes.keys())
    require(not unknown, "dense", "name layers of `shapes`", unknown)
    weights = _check_layers(shapes, spectra, weights)
    share = _share_left(shapes, keep, dense)
    curves = {}
    for name, shape in shapes.items():
        values = None if spectra is None else _check_spectrum(name, shape, spectra[name])
        curve, uniform = _curve(shape, _storage(storage), values, weights[name]), share * shape[0] * shape[1]
        curves[name] = curve.at([-1]) if name in dense else curve.at_least(floor, uniform, multiple)
    return _spend(curves, keep, int(keep * _dense_parameters(shapes.values()) + 1e-9))


def _dense_parameters(shapes: Iterable[Shape]) -> int:
    return sum(out * inputs for out, inputs in shapes)


def _check_layers(
    shapes: Mapping[str, Shape], spectra: Mapping[str, Any] | None, weights: Mapping[str, float] | None
) -> Mapping[str, float]:
    """Check that every layer has its spectrum and its weight, and return the weights."""
    for argument, values in (("spectra", spectra), ("weights", weights)):
        missing = next((name for name in shapes if values is not None and name not in values), None)
        if missing is not None:
            raise ValueError(f"`{argument}` must have every layer of `shapes`, got none for {missing!r}.")
    weights = weights or dict.fromkeys(shapes, 1.0)
    if wrong := next((name for name in shapes if not 0.0 <= weights[name] < float("inf")), None):
        raise ValueError(f"`weights` must be finite and >= 0, got {weights[wrong]} for layer {wrong!r}.")
    return weights


def _share_left(shapes: Mapping[str, Shape], keep: float | int, dense: Collection[str]) -> float:
    """Return the share of the other layers' parameters that the dense layers leave; exactly `keep` if there are none."""
    fixed = _dense_parameters(shapes[name] for name in dense)
    return keep - (1 - keep) * fixed / max(_dense_parameters(shapes.values()) - fixed, 1)


class _Curve(NamedTuple):
    """Costs and gains of the ranks that one layer may have, the last one dense."""

    ranks: np.ndarray
    costs: np.ndarray
    gains: np.ndarray

    def at(self, positions: Any) -> "_Curve":
        return _Curve(self.ranks[positions], self.costs[positions], self.gains[positions])

    def at_least(self, floor: float, uniform: float, multiple: int) -> "_Curve":
        """Return the multiples and dense, from a share of the rank that the parameters of a uniform share buy."""
        curve = self.at((self.ranks % multiple == 0) | (self.costs == self.costs[-1]))
        least = max(1, int(floor * (curve.costs <= uniform + 1e-9).sum() + 1e-9))
        return curve.at(slice(least - 1, None))


def _check_spectrum(name: str, shape: Shape, spectrum: Any) -> np.ndarray:
    rule = f"hold {min(shape)} finite values >= 0, descending, for layer {name!r}"
    try:
        values = np.asarray(spectrum, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`spectra` must {rule}, got {describe(spectrum)}.") from error
    holds = values.shape == (min(shape),) and np.isfinite(values).all() and (np.diff(values) <= 0).all()
    require(bool(holds and values[-1] >= 0), "spectra", rule, values.shape)
    return values


def _curve(shape: Shape, storage: Storage, spectrum: np.ndarray | None, weight: float) -> _Curve:
    out, inputs = shape
    ranks = np.arange(1, min(shape) + 1)
    costs = storage.parameters(out, inputs, ranks)
    smaller = costs < out * inputs
    ranks, costs = np.append(ranks[smaller], min(shape)), np.append(costs[smaller], out * inputs)
    if spectrum is None:
        gains = -((1 - costs / (out * inputs)) ** 2) * out * inputs  # the best next parameter: in the emptiest layer
    else:
        gains = weight * (spectrum**2).cumsum()[ranks - 1]
    return _Curve(ranks, costs, gains)


def _spend(curves: Mapping[str, _Curve], keep: float | int, budget: int) -> dict[str, int]:
    """Give every layer its least rank, and what remains of the budget to the best segments."""
    left = budget - sum(int(curve.costs[0]) for curve in curves.values())
    if left < 0:
        raise ValueError(f"`keep` must allow the least rank of every layer, got {keep}: {-left} parameters too few.")
    # by gain per parameter; of equal ones the lower ranks first, so that equal layers get equal ranks
    segments = sorted(
        ((*segment, name) for name, curve in curves.items() for segment in _envelope(curve)),
        key=lambda segment: (-segment[0], segment[1]),
    )
    position = dict.fromkeys(curves, 0)
    for _, start, end, name in segments:
        if position[name] == start:  # else the layer stopped inside an earlier segment: its next rank did not fit
            costs = curves[name].costs
            reached = max(start, min(end, int(np.searchsorted(costs, costs[start] + left, side="right")) - 1))
            left -= int(costs[reached] - costs[start])
            position[name] = reached
    return {name: int(curve.ranks[position[name]]) for name, curve in curves.items()}


def _envelope(curve: _Curve) -> Iterator[tuple[float, int, int]]:
    """Yield the segments of the upper concave envelope of gain over cost: slope, first and last position; slopes fall."""
    corners: list[int] = []
    for end in range(len(curve.costs)):
        while len(corners) > 1 and _slope(curve, corners[-2], corners[-1]) < _slope(curve, corners[-1], end):
            corners.pop()
        corners.append(end)
    for start, end in pairwise(corners):
        yield _slope(curve, start, end), start, end


def _slope(curve: _Curve, start: int, end: int) -> float:
    return float((curve.gains[end] - curve.gains[start]) / (curve.costs[end] - curve.costs[start]))
