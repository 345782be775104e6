"""Solve the assignment of runs of layers to devices exactly, by dynamic programming.

Values are >= 0, so the longest affordable run that ends at a layer is never worse than a shorter one. One earlier layer per
device and layer is therefore enough to consider. With V the prefix sums of values and l_k(i) the first layer of the longest run
of device k that ends before layer i,

    F[S][i] = max(F[S][i-1], F[S - k][i], F[S - k][l_k(i)] + V[i] - V[l_k(i)] for k in S)

is exact for every set S of devices. In a fixed order the sets form a chain. In free order devices of equal budgets are
interchangeable, so that a state only counts how many of each budget are used.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, product

import numpy as np
from jaxtyping import Int

Interval = tuple[int, int] | None  # first and last layer, 0-based; None for no layer
Starts = Int[np.ndarray, "devices ends"]


def find_run_starts(costs: Sequence[int], budgets: Sequence[int]) -> Starts:
    """Find the longest affordable run before every layer.

    **Arguments**

    - `costs`: one integer >= 1 per layer.
    - `budgets`: one integer >= 0 per device.

    **Returns** l, `(devices, layers + 1)`, int64: layers l[k, i], ..., i - 1 are the longest run that device k can pay and that
    ends before layer i; l[k, i] = i if it can pay none.
    """
    before = _sum_prefixes(costs)
    funds = np.array([min(budget, before[-1]) for budget in budgets], dtype=before.dtype)  # more than all buys no more
    return np.searchsorted(before, before - funds[:, None])


def count_states(budgets: Sequence[int]) -> int:
    """Count the states of the free order: the product of (devices of a budget + 1) over the distinct budgets.

    **Arguments**

    - `budgets`: one integer per device.
    """
    return math.prod(budgets.count(budget) + 1 for budget in set(budgets))


def assign_in_order(values: Sequence[int], starts: Starts) -> list[Interval]:
    """Solve the assignment if every device must take a run left of the next device's.

    **Arguments**

    - `values`: one integer >= 0 per layer.
    - `starts`: the result of `find_run_starts`.

    **Returns** the run of each device.
    """
    gains = _compute_gains(values, starts)
    rows = [np.zeros_like(gains[0])]
    for earlier, gain in zip(starts, gains, strict=True):
        rows.append(np.maximum.accumulate(np.maximum(rows[-1], rows[-1][earlier] + gain)))
    runs: list[Interval] = [None] * len(starts)
    end = len(values)
    for k in range(len(starts), 0, -1):
        end = _shortest_prefix(rows[k], end)
        if rows[k - 1][end] < rows[k][end]:
            start = int(starts[k - 1, end])
            runs[k - 1], end = (start, end - 1), start
    return runs


def assign_any_order(values: Sequence[int], budgets: Sequence[int], starts: Starts) -> list[Interval]:
    """Solve the assignment with the devices in any order.

    Memory: `count_states(budgets)` * (layers + 1) numbers of 8 bytes.

    **Arguments**

    - `values`: one integer >= 0 per layer.
    - `budgets`: one integer >= 0 per device.
    - `starts`: the result of `find_run_starts`.

    **Returns** the run of each device.
    """
    distinct = list(dict.fromkeys(budgets))  # in the order of their first devices
    groups = [[k for k, budget in enumerate(budgets) if budget == common] for common in distinct]
    before = starts[[devices[0] for devices in groups]]
    gains = _compute_gains(values, before)
    sizes = [len(devices) + 1 for devices in groups]
    strides = [math.prod(sizes[g + 1 :]) for g in range(len(sizes))]
    table = np.zeros((math.prod(sizes), len(values) + 1), dtype=gains[0].dtype)
    counts = np.array(list(product(*map(range, sizes))), dtype=np.int64).reshape(len(table), len(sizes))
    level = counts.sum(1)
    for used in range(1, len(budgets) + 1):
        states = np.flatnonzero(level == used)
        best = np.zeros((len(states), len(values) + 1), dtype=table.dtype)
        for g, stride in enumerate(strides):
            having = np.flatnonzero(counts[states, g] > 0)
            fewer = table[states[having] - stride]
            best[having] = np.maximum(best[having], np.maximum(fewer, fewer[:, before[g]] + gains[g]))
        table[states] = np.maximum.accumulate(best, axis=1)
    return _distribute(groups, _trace_runs(table, counts, strides, before, gains))


def _sum_prefixes(numbers: Sequence[int]) -> np.ndarray:
    """Return the sums of the first 0, 1, ... numbers: int64, or Python integers if int64 may overflow."""
    sums = list(accumulate(numbers, initial=0))
    return np.array(sums, dtype=np.int64 if sums[-1] < 2**62 else object)


def _compute_gains(values: Sequence[int], starts: Starts) -> np.ndarray:
    """Return, for each device and end, the value of its longest run."""
    sums = _sum_prefixes(values)
    return sums - sums[starts]


def _shortest_prefix(row: np.ndarray, end: int) -> int:
    """Return the fewest layers that reach the value of the first `end` layers; rows never fall."""
    return int(np.searchsorted(row[: end + 1], row[end], side="left"))


def _trace_runs(
    table: np.ndarray,
    counts: np.ndarray,
    strides: Sequence[int],
    before: Starts,
    gains: np.ndarray,
) -> list[list[Interval]]:
    """Return the runs behind the last entry of the table, last run first, for each group of equal budgets.

    The entries are integers, so that comparisons need no tolerance.
    """
    runs = [list[Interval]() for _ in strides]
    state, end = len(table) - 1, table.shape[1] - 1
    while table[state, end] > 0:
        end = _shortest_prefix(table[state], end)
        having = [g for g in range(len(strides)) if counts[state, g]]
        idle = next((g for g in having if table[state - strides[g], end] == table[state, end]), None)
        if idle is not None:
            state -= strides[idle]
            continue
        taker = next(
            g for g in having if table[state - strides[g], before[g, end]] + gains[g, end] == table[state, end]
        )
        start = int(before[taker, end])
        runs[taker].append((start, end - 1))
        state, end = state - strides[taker], start
    return runs


def _distribute(groups: Sequence[Sequence[int]], runs: Sequence[Sequence[Interval]]) -> list[Interval]:
    """Give the runs of each group to its devices, the first run to the first device."""
    intervals: list[Interval] = [None] * sum(map(len, groups))
    for devices, group_runs in zip(groups, runs, strict=True):
        for k, run in zip(devices, reversed(group_runs), strict=False):
            intervals[k] = run
    return intervals
