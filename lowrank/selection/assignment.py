"""Budgeted contiguous assignment: every verifier takes one run of neighbouring layers that it can pay, no layer twice, the total
value as large as can be.

For values >= 0 the longest affordable run that ends at a layer is never worse than a shorter one, so one look back per layer
suffices: with V the prefix sums of values and l_k(i) the first layer of the longest run of verifier k that ends before i,

    F[S][i] = max(F[S][i-1], F[S - k][i], F[S - k][l_k(i)] + V[i] - V[l_k(i)] for k in S)

is exact for every set S of verifiers. In a fixed order the sets are a chain; in free order verifiers of equal budgets are
counted, not told apart. Costs are Python integers of any size; values are integers, or are rounded to 2^-44 of the largest.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any

import numpy as np

LIMIT = 2**25  # numbers in the table of the free order: 256 MB
BITS = 44  # of a value that is no integer
Interval = tuple[int, int] | None


@dataclass(frozen=True)
class Assignment:
    """`total`: the value of all layers taken. `intervals`: for each verifier, in the order of the budgets, the first and the last
    layer that it takes, 0-based, or None. `optimal`: whether nothing better exists, beyond the limit to 1e-9 of the total.
    `gap`: by how much of the bound the optimum may be better, 0.0 where it is optimal."""

    total: int | float
    intervals: list[Interval]
    optimal: bool = True
    gap: float = 0.0


def assign_layers(
    values: Sequence[int | float],
    costs: Sequence[int | float],
    budgets: Sequence[int | float],
    order: str = "free",
    *,
    limit: int = LIMIT,
    seconds: float | int = 60.0,
) -> Assignment:
    """The runs of layers of the largest total value.

    **Arguments:** `values`: >= 0, one for each layer. `costs`: integers >= 1, one for each layer. `budgets`: >= 0, one for each
    verifier; a fraction of a unit pays nothing. `order`: 'free', or 'fixed': verifier k left of verifier k + 1. `limit`: of the
    numbers in the table of the free order, product of (verifiers with that budget + 1) over the distinct budgets, times layers +
    1; beyond it a mixed-integer program is given `seconds`, and `gap` certifies what it reached.

    **Returns:** `Assignment`. Among equal totals: the run of the last layers is decided first; it ends as early as it can and is
    the longest that can be paid, the verifier that comes first takes it, and of equal verifiers the first takes the first run.
    Then runs are cut, so that none starts or ends with a layer of value 0.

    **Raises:** `ValueError`: an empty list, lengths that differ, a number out of its range.
    """
    worth, prices, funds = _checked(values, costs, budgets, order)
    before = list(accumulate(prices, initial=0))
    starts = [[bisect_left(before, before[i] - fund) for i in range(len(before))] for fund in funds]
    if order == "fixed":
        runs = _in_order(worth, starts)
    elif _states(funds) * len(before) <= limit:
        runs = _any_order(worth, funds, starts)
    else:
        return _bounded(values, worth, funds, starts, seconds)
    intervals = [_trimmed(worth, run) for run in runs]
    return Assignment(total_value(values, intervals), intervals)


def total_value(values: Sequence[int | float], intervals: Sequence[Interval]) -> int | float:
    """The value of all layers in the intervals: an integer for integers, else the correctly rounded sum."""
    taken = [values[i] for run in intervals if run for i in range(run[0], run[1] + 1)]
    return sum(taken) if all(isinstance(value, int | np.integer) for value in taken) else math.fsum(taken)


def _checked(values: Any, costs: Any, budgets: Any, order: str) -> tuple[list[int], list[int], list[int]]:
    """Values as integers that are in proportion, costs and budgets as integers."""
    if order not in ("free", "fixed"):
        raise ValueError(f"`order` must be 'free' or 'fixed', got {order!r}.")
    for what, given in (("values", values), ("costs", costs), ("budgets", budgets)):
        if len(given) == 0:
            raise ValueError(f"`{what}` must hold at least one number, got none.")
    if len(values) != len(costs):
        raise ValueError(f"`costs` must be one for each of {len(values)} values, got {len(costs)}.")
    for what, given, least in (("values", values, 0), ("costs", costs, 1), ("budgets", budgets, 0)):
        for index, number in enumerate(given):
            if not (math.isfinite(number) and number >= least):
                raise ValueError(f"`{what}` must be finite and >= {least}, got {number!r} at {index}.")
            if what == "costs" and int(number) != number:
                raise ValueError(f"`costs` must be integers, got {number!r} at {index}.")
    if all(int(value) == value for value in values):
        worth = [int(value) for value in values]
    else:
        unit = max(values)
        worth = [round(value / unit * 2**BITS) for value in values]
    return worth, [int(cost) for cost in costs], [int(budget) for budget in budgets]


def _states(funds: Sequence[int]) -> int:
    return math.prod(funds.count(fund) + 1 for fund in set(funds))


def _array(numbers: Sequence[int], total: int) -> np.ndarray:
    """int64 where nothing can overflow, else Python integers."""
    return np.array(numbers, dtype=np.int64 if total < 2**62 else object)


def _gains(worth: Sequence[int], starts: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each verifier and each end: where its longest run starts, and what that is worth."""
    prefix = list(accumulate(worth, initial=0))
    looks = [np.array(own, dtype=np.int64) for own in starts]
    sums = _array(prefix, prefix[-1])
    return looks, [sums - sums[look] for look in looks]


def _in_order(worth: Sequence[int], starts: Sequence[Sequence[int]]) -> list[Interval]:
    looks, gains = _gains(worth, starts)
    rows = [np.zeros_like(gains[0])]
    for look, gain in zip(looks, gains, strict=True):
        rows.append(np.maximum.accumulate(np.maximum(rows[-1], rows[-1][look] + gain)))
    runs: list[Interval] = [None] * len(starts)
    end = len(worth)
    for k in range(len(starts), 0, -1):
        end = _first(rows[k], end)
        if rows[k - 1][end] < rows[k][end]:
            start = starts[k - 1][end]
            runs[k - 1], end = (start, end - 1), start
    return runs


def _first(row: np.ndarray, end: int) -> int:
    """The fewest layers that reach what the first `end` do; rows never fall."""
    return int(np.searchsorted(row[: end + 1], row[end], side="left"))


def _any_order(worth: Sequence[int], funds: Sequence[int], starts: Sequence[Sequence[int]]) -> list[Interval]:
    kinds = list(dict.fromkeys(funds))  # distinct budgets, in the order of their first verifiers
    members = [[k for k, fund in enumerate(funds) if fund == kind] for kind in kinds]
    looks, gains = _gains(worth, [starts[own[0]] for own in members])
    sizes = [len(own) + 1 for own in members]
    strides = [math.prod(sizes[g + 1 :]) for g in range(len(sizes))]
    table = np.zeros((math.prod(sizes), len(worth) + 1), dtype=gains[0].dtype)
    counts = np.array(list(product(*map(range, sizes))), dtype=np.int64).reshape(len(table), len(sizes))
    level = counts.sum(1)
    for used in range(1, len(funds) + 1):
        states = np.flatnonzero(level == used)
        best = np.zeros((len(states), len(worth) + 1), dtype=table.dtype)
        for g, stride in enumerate(strides):
            having = np.flatnonzero(counts[states, g] > 0)
            fewer = table[states[having] - stride]
            best[having] = np.maximum(best[having], np.maximum(fewer, fewer[:, looks[g]] + gains[g]))
        table[states] = np.maximum.accumulate(best, axis=1)
    return _traced(table, counts, strides, members, looks, gains, len(worth))


def _traced(
    table: np.ndarray,
    counts: np.ndarray,
    strides: Sequence[int],
    members: Sequence[Sequence[int]],
    looks: Sequence[np.ndarray],
    gains: Sequence[np.ndarray],
    end: int,
) -> list[Interval]:
    """The runs behind the last entry of the table; comparisons are of integers, so there is no tolerance."""
    runs: list[Interval] = [None] * sum(map(len, members))
    state, found = len(table) - 1, [list[Interval]() for _ in members]
    while table[state, end] > 0:
        end = _first(table[state], end)
        having = [g for g in range(len(members)) if counts[state, g]]
        idle = next((g for g in having if table[state - strides[g], end] == table[state, end]), None)
        if idle is not None:
            state -= strides[idle]
            continue
        taker = next(g for g in having if table[state - strides[g], looks[g][end]] + gains[g][end] == table[state, end])
        start = int(looks[taker][end])
        found[taker].append((start, end - 1))
        state, end = state - strides[taker], start
    for own, intervals in zip(members, found, strict=True):
        for k, run in zip(own, reversed(intervals), strict=False):
            runs[k] = run
    return runs


def _trimmed(worth: Sequence[int], run: Interval) -> Interval:
    """Without layers of no value at the ends, which only cost."""
    valued = [i for i in range(run[0], run[1] + 1) if worth[i]] if run else []
    return (valued[0], valued[-1]) if valued else None


def _bounded(
    values: Sequence[int | float],
    worth: Sequence[int],
    funds: Sequence[int],
    starts: Sequence[Sequence[int]],
    seconds: float | int,
) -> Assignment:
    """The best of a mixed-integer program and of several orders, with the program's bound."""
    upper, runs = window_program(worth, starts, seconds)
    generator = np.random.default_rng(0)
    orders = [sorted(range(len(funds)), key=lambda k: sign * funds[k]) for sign in (1, -1)]
    orders += [generator.permutation(len(funds)).tolist() for _ in range(50)]
    candidates = [runs]
    for turn in orders:
        found = _in_order(worth, [starts[k] for k in turn])
        candidates.append([found[turn.index(k)] for k in range(len(funds))])
    best = max(candidates, key=lambda own: total_value(worth, own))
    intervals = [_trimmed(worth, run) for run in best]
    reached = total_value(worth, intervals)
    gap = max(0.0, 1 - reached / upper) if upper else 0.0
    done = gap <= 1e-9 or math.floor(upper + 1e-6) <= reached
    return Assignment(total_value(values, intervals), intervals, done, 0.0 if done else gap)


def window_program(
    worth: Sequence[int], starts: Sequence[Sequence[int]], seconds: float | int = 60.0
) -> tuple[float, list[Interval]]:
    """The same problem as a mixed-integer program, solved by HiGHS: which of the longest runs each verifier takes, where runs may
    overlap and a layer counts once; overlaps are cut afterwards.

    **Arguments:** `worth`: integers >= 0. `starts`: for each verifier and each end, the first layer of its longest run.

    **Returns:** a proven upper bound of the total, and disjoint runs.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415
    from scipy.sparse import coo_array  # noqa: PLC0415

    layers, windows = len(worth), [(k, i) for k in range(len(starts)) for i in range(1, len(worth) + 1)]
    windows = [(k, i) for k, i in windows if starts[k][i] < i]
    unit = max(*worth, 1)  # the program computes in floating point
    objective = np.concatenate([np.zeros(len(windows)), [-value / unit for value in worth]])
    one = [(k, w, 1.0) for w, (k, _) in enumerate(windows)]  # a verifier takes one run at most
    covered = [(len(starts) + j, w, -1.0) for w, (k, i) in enumerate(windows) for j in range(starts[k][i], i)]
    counted = [(len(starts) + j, len(windows) + j, 1.0) for j in range(layers)]
    rows, columns, entries = zip(*one, *covered, *counted, strict=True)
    matrix = coo_array((entries, (rows, columns)), shape=(len(starts) + layers, len(objective))).tocsr()
    right: Any = np.concatenate([np.ones(len(starts)), np.zeros(layers)])
    solved = milp(
        objective,
        constraints=LinearConstraint(matrix, ub=right),
        integrality=np.concatenate([np.ones(len(windows)), np.zeros(layers)]),
        bounds=Bounds(0, 1),
        options={"time_limit": float(seconds), "mip_rel_gap": 0.0},
    )
    bound = solved.mip_dual_bound if solved.mip_dual_bound is not None else -sum(worth) / unit
    picked = [windows[w] for w in np.flatnonzero(solved.x[: len(windows)] > 0.5)] if solved.x is not None else []
    runs: list[Interval] = [None] * len(starts)
    end = 0
    for k, i in sorted(picked, key=lambda window: starts[window[0]][window[1]]):
        if max(end, starts[k][i]) < i:
            runs[k], end = (max(end, starts[k][i]), i - 1), i
    return -bound * unit, runs
