"""Assign layers to devices with budgets: each device takes one run of neighbouring layers that it can pay, no layer is taken
twice, and the total value is as large as possible.

The published code calls the devices verifiers. Costs and budgets are Python integers of any size. Values are integers, or are
rounded to 2^-44 of the largest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.selection.dynamic_program import (
    Interval,
    Starts,
    assign_any_order,
    assign_in_order,
    count_states,
    find_run_starts,
)
from lowrank.selection.integer_program import solve_integer_program

TABLE_LIMIT = 2**25  # numbers in the table of the free order: 256 MB
_BITS = 44  # of a value that is no integer


@dataclass(frozen=True)
class Assignment:
    """Hold the runs of layers that the devices take.

    **Arguments**

    - `total`: the value of all layers taken.
    - `intervals`: for each device, in the order of the budgets, its first and last layer, 0-based, or None.
    - `optimal`: True if no assignment is better; for a solution of the integer program, by more than 1e-9 of the total.
    - `gap`: upper bound of (optimum - total) / optimum; 0.0 if `optimal`.
    """

    total: int | float
    intervals: list[Interval]
    optimal: bool = True
    gap: float = 0.0


@check_arguments
def assign_layers(
    values: Sequence[int | float],
    costs: Sequence[int | float],
    budgets: Sequence[int | float],
    order: str = "free",
    *,
    limit: int = TABLE_LIMIT,
    seconds: float | int = 60.0,
) -> Assignment:
    """Find the runs of layers of the largest total value.

    The solution is exact if the table of the free order is small enough. It has (layers + 1) times the product of (devices of a
    budget + 1) over the distinct budgets numbers. Otherwise a mixed-integer program finds a solution, and `gap` certifies it.

    **Arguments**

    - `values`: one number >= 0 per layer; of NumPy too, of any width.
    - `costs`: one integer >= 1 per layer.
    - `budgets`: one number >= 0 per device; rounded down.
    - `order`: 'free', or 'fixed': the run of device k is left of the run of device k + 1.
    - `limit`: largest size of the table, in numbers, >= 1.
    - `seconds`: time limit of the mixed-integer program, > 0.

    **Returns** an `Assignment`. Among equal totals the last run is decided first: it ends as early as possible and is the longest
    affordable; the first device that can take it does. Of devices with equal budgets the first takes the first run. Layers of
    value 0 at the ends of runs are left out.

    **Raises**

    - `ValueError`: an empty list; lengths that differ; a number out of its range; an unknown order.
    """
    values, costs, budgets = (_as_python(numbers) for numbers in (values, costs, budgets))
    _check_arguments(values, costs, budgets, order)
    require(limit >= 1, "limit", "be >= 1", limit)
    require(seconds > 0, "seconds", "be > 0", seconds)
    whole, funds = _scale_to_integers(values), [int(budget) for budget in budgets]
    starts = find_run_starts([int(cost) for cost in costs], funds)
    if order == "fixed":
        runs = assign_in_order(whole, starts)
    elif count_states(funds) * (len(whole) + 1) <= limit:
        runs = assign_any_order(whole, funds, starts)
    else:
        return _assign_within_bound(values, whole, funds, starts, seconds)
    intervals = [_trim(whole, run) for run in runs]
    return Assignment(total_value(values, intervals), intervals)


def total_value(values: Sequence[int | float], intervals: Sequence[Interval]) -> int | float:
    """Add up the values of all layers in some intervals.

    **Arguments**

    - `values`: one number per layer.
    - `intervals`: each the first and the last layer, 0-based, or None.

    **Returns** an int if all values taken are integers, else the correctly rounded sum.
    """
    values = _as_python(values)
    taken = [values[i] for run in intervals if run for i in range(run[0], run[1] + 1)]
    return sum(taken) if all(isinstance(value, int) for value in taken) else math.fsum(taken)


def _as_python(numbers: Any) -> list[Any]:
    """Return numbers of NumPy or torch as those of Python, which do not overflow and divide in full precision."""
    return [number.item() if hasattr(number, "item") else number for number in numbers]


def _check_arguments(values: Any, costs: Any, budgets: Any, order: str) -> None:
    require(order in ("free", "fixed"), "order", "be 'free' or 'fixed'", order)
    for name, numbers in (("values", values), ("costs", costs), ("budgets", budgets)):
        if len(numbers) == 0:
            raise ValueError(f"`{name}` must have at least one number, got none.")
    require(len(values) == len(costs), "costs", f"have one number for each of {len(values)} values", len(costs))
    for name, numbers, least in (("values", values, 0), ("costs", costs, 1), ("budgets", budgets, 0)):
        for index, number in enumerate(numbers):
            if not least <= number < math.inf:
                raise ValueError(f"`{name}` must be finite and >= {least}, got {number!r} at {index}.")
            if name == "costs" and int(number) != number:
                raise ValueError(f"`costs` must be integers, got {number!r} at {index}.")


def _scale_to_integers(values: Sequence[int | float]) -> list[int]:
    """Return integers in proportion to the values."""
    if all(int(value) == value for value in values):
        return [int(value) for value in values]
    unit = max(values)
    shares = np.array([value / unit for value in values])  # of Python's numbers: NumPy would round large integers first
    return np.rint(shares * 2**_BITS).astype(np.int64).tolist()


def _trim(values: Sequence[int], run: Interval) -> Interval:
    """Cut layers of value 0 off the ends: they only cost."""
    valued = [i for i in range(run[0], run[1] + 1) if values[i]] if run else []
    return (valued[0], valued[-1]) if valued else None


def _assign_within_bound(
    values: Sequence[int | float],
    whole: Sequence[int],
    budgets: Sequence[int],
    starts: Starts,
    seconds: float | int,
) -> Assignment:
    """Return the best of the mixed-integer program and of several fixed orders, with the program's bound."""
    upper, runs = solve_integer_program(whole, starts.tolist(), seconds)
    generator = np.random.default_rng(0)
    orders = [sorted(range(len(budgets)), key=lambda k: sign * budgets[k]) for sign in (1, -1)]
    orders += [generator.permutation(len(budgets)).tolist() for _ in range(50)]
    candidates = [runs]
    for order in orders:
        ordered = assign_in_order(whole, starts[order])
        candidates.append([ordered[order.index(k)] for k in range(len(budgets))])
    best = max(candidates, key=lambda candidate: total_value(whole, candidate))
    intervals = [_trim(whole, run) for run in best]
    reached = total_value(whole, intervals)
    gap = max(0.0, 1 - reached / upper) if upper else 0.0
    optimal = gap <= 1e-9 or math.floor(upper + 1e-6) <= reached
    return Assignment(total_value(values, intervals), intervals, optimal, 0.0 if optimal else gap)
