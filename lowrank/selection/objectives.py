"""What an assignment of layers can be asked to maximise, and cases of budgets to compare the answers on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]  # of lowrank.selection.scores.Scores.layers
STRATEGIES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {  # verifiers -> shares, up to a factor
    "uniform": lambda count, generator: generator.uniform(0.1, 2.0, count),
    "dominant": lambda count, generator: np.where(np.arange(count) == generator.integers(count), 0.7, 1 / count),
    "decreasing": lambda count, generator: np.exp(-np.linspace(0, 2, count)),
    "increasing": lambda count, generator: np.exp(np.linspace(0, 2, count)),
    "equal": lambda count, generator: np.ones(count),
}


def _column(name: str) -> Callable[[Rows, np.random.Generator], np.ndarray]:
    return lambda rows, generator: np.array([row[name] for row in rows], dtype=np.float64)


def _reciprocal(name: str) -> Callable[[Rows, np.random.Generator], np.ndarray]:
    return lambda rows, generator: 1 / _column(name)(rows, generator)


def _parabola(rows: Rows, generator: np.random.Generator) -> np.ndarray:
    """Integers times a parabola that is .1 at both ends and 1 in the middle."""
    place = np.linspace(-1, 1, len(rows))
    return generator.integers(1, 101, len(rows)) * (1 - 0.9 * place**2)


OBJECTIVES: dict[str, Callable[[Rows, np.random.Generator], np.ndarray]] = {  # rows -> the value of each layer
    "significance": _column("significance_score"),
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
    total: int, *, cases: int = 100, verifiers: int = 3, seed: int = 42, low: float = 0.15, high: float = 0.35
) -> list[dict[str, Any]]:
    """Budgets of several verifiers: every case spends a share of the model drawn between `low` and `high`, of its own total.

    **Arguments:** `total`: parameters of all layers. `cases`: split into five equal parts, one for each of `STRATEGIES` in
    order; what is left over goes to the last. `verifiers`: >= 1.

    **Returns:** rows `case_id` (from 1), `strategy`, `num_verifiers`, `budgets` (integers), `total_budget`.

    **Raises:** `ValueError`: a number out of its range.
    """
    for what, number in (("total", total), ("cases", cases), ("verifiers", verifiers)):
        if number < 1:
            raise ValueError(f"`{what}` must be >= 1, got {number}.")
    if not 0 < low <= high <= 1:
        raise ValueError(f"`low` and `high` must be in order in (0, 1], got {low} and {high}.")
    generator, rows = np.random.default_rng(seed), []
    for index in range(cases):
        strategy = list(STRATEGIES)[min(index * len(STRATEGIES) // cases, len(STRATEGIES) - 1)]
        shares = STRATEGIES[strategy](verifiers, generator)
        spent = generator.uniform(low, high) * total
        budgets = [int(budget) for budget in spent * shares / shares.sum()]
        rows.append(
            {
                "case_id": index + 1,
                "strategy": strategy,
                "num_verifiers": verifiers,
                "budgets": budgets,
                "total_budget": sum(budgets),
            }
        )
    return rows
