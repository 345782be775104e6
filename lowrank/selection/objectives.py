"""Values of layers that an assignment can maximise, and budgets on which to compare them.

The published code calls the devices verifiers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.io.checks import require

Rows = Sequence[Mapping[str, Any]]  # `Scores.layers`
Objective = Callable[[Rows, np.random.Generator], np.ndarray]  # rows -> the value of each layer

BUDGET_STRATEGIES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {  # devices -> shares, up to a factor
    "uniform": lambda count, generator: generator.uniform(0.1, 2.0, count),
    "dominant": lambda count, generator: np.where(np.arange(count) == generator.integers(count), 0.7, 1 / count),
    "decreasing": lambda count, generator: np.exp(-np.linspace(0, 2, count)),
    "increasing": lambda count, generator: np.exp(np.linspace(0, 2, count)),
    "equal": lambda count, generator: np.ones(count),
}


def _column(name: str) -> Objective:
    return lambda rows, generator: np.array([row[name] for row in rows], dtype=np.float64)


def _reciprocal(name: str) -> Objective:
    return lambda rows, generator: 1 / _column(name)(rows, generator)


def _parabola(rows: Rows, generator: np.random.Generator) -> np.ndarray:
    """Return random integers times a parabola that is 0.1 at both ends and 1 in the middle."""
    place = np.linspace(-1, 1, len(rows))
    return generator.integers(1, 101, len(rows)) * (1 - 0.9 * place**2)


ASSIGNMENT_OBJECTIVES: dict[str, Objective] = {
    "significance": _column("significance_score"),  # the published name of the score
    "norm_1": _column("norm_1"),
    "norm_2": _column("norm_2"),
    "norm_inf": _column("norm_inf"),
    "published norm_1": _reciprocal("norm_1"),  # small norms first
    "published norm_2": _reciprocal("norm_2"),
    "published random": _parabola,
    "random": lambda rows, generator: generator.random(len(rows)),
    "uniform": lambda rows, generator: np.ones(len(rows)),
    "parameters": _column("num_parameters"),
}


def budget_cases(
    total: int, *, cases: int = 100, devices: int = 3, seed: int = 42, low: float = 0.15, high: float = 0.35
) -> list[dict[str, Any]]:
    """Draw cases of budgets for several devices.

    The budgets of a case together are a random share of the model, uniform between `low` and `high`.

    **Arguments**

    - `total`: parameters of all layers, >= 1.
    - `cases`: number of cases, >= 1. They are split into equal parts, one for each of `BUDGET_STRATEGIES` in order.
    - `devices`: number of devices in a case, >= 1.
    - `seed`: of the random numbers.
    - `low`, `high`: bounds of the share, 0 < low <= high <= 1.

    **Returns** one row per case: `case_id` (from 1), `strategy`, `num_verifiers` (the number of devices), `budgets` (integers,
    parameters), `total_budget`.

    **Raises**

    - `ValueError`: a number out of its range.
    """
    for name, number in (("total", total), ("cases", cases), ("devices", devices)):
        require(number >= 1, name, "be >= 1", number)
    if not 0 < low <= high <= 1:
        raise ValueError(f"`low` and `high` must be in order in (0, 1], got {low} and {high}.")
    generator, rows = np.random.default_rng(seed), []
    for index in range(cases):
        strategy = list(BUDGET_STRATEGIES)[min(index * len(BUDGET_STRATEGIES) // cases, len(BUDGET_STRATEGIES) - 1)]
        shares = BUDGET_STRATEGIES[strategy](devices, generator)
        spent = generator.uniform(low, high) * total
        budgets = [int(budget) for budget in spent * shares / shares.sum()]
        rows.append(
            {
                "case_id": index + 1,
                "strategy": strategy,
                "num_verifiers": devices,
                "budgets": budgets,
                "total_budget": sum(budgets),
            }
        )
    return rows
