"""Cases of budgets and objectives: shares, counts, and that an optimum of one objective is judged by another at most as well."""

import numpy as np
import pytest

from lowrank.selection.assignment import assign_layers, total_value
from lowrank.selection.objectives import ASSIGNMENT_OBJECTIVES, BUDGET_STRATEGIES, budget_cases


def make_rows(count: int = 24) -> list[dict[str, float]]:
    generator = np.random.default_rng(0)
    return [
        {
            "num_parameters": int(generator.integers(10, 99)),
            "significance_score": generator.random(),
            "norm_1": 5 + 9 * generator.random(),
            "norm_2": 1 + generator.random(),
            "norm_inf": generator.random(),
        }
        for _ in range(count)
    ]


def test_cases_are_drawn_once_and_for_all() -> None:
    rows = budget_cases(10**7)
    assert rows == budget_cases(10**7)
    assert rows != budget_cases(10**7, seed=43)
    assert [row["case_id"] for row in rows] == list(range(1, 101))
    assert [row["strategy"] for row in rows] == [name for name in BUDGET_STRATEGIES for _ in range(20)]
    for row in rows:
        assert row["total_budget"] == sum(row["budgets"])
        assert 0.15 * 10**7 - 3 <= row["total_budget"] <= 0.35 * 10**7


def test_strategies_have_their_shapes() -> None:
    by_strategy = {
        name: [row["budgets"] for row in budget_cases(10**9) if row["strategy"] == name] for name in BUDGET_STRATEGIES
    }
    for budgets in by_strategy["decreasing"]:
        assert budgets == sorted(budgets, reverse=True)
        assert budgets[0] / budgets[-1] == pytest.approx(np.e**2, rel=1e-6)
    for budgets in by_strategy["increasing"]:
        assert budgets == sorted(budgets)
    for budgets in by_strategy["equal"]:
        assert max(budgets) - min(budgets) <= 1
    for budgets in by_strategy["dominant"]:
        assert sorted(budgets)[2] / sorted(budgets)[1] == pytest.approx(2.1, rel=1e-6)
        assert sorted(budgets)[0] == pytest.approx(sorted(budgets)[1], abs=1)
    assert len({tuple(np.argsort(budgets)) for budgets in by_strategy["dominant"]}) > 1
    assert len({tuple(np.argsort(budgets)) for budgets in by_strategy["uniform"]}) > 3


def test_no_objective_is_judged_better_than_its_own_optimum() -> None:
    layers = make_rows()
    costs = [int(row["num_parameters"]) for row in layers]
    generator = np.random.default_rng(0)
    for row in budget_cases(sum(costs), cases=10):
        values = {name: make(layers, generator).tolist() for name, make in ASSIGNMENT_OBJECTIVES.items()}
        assert all(min(layer_values) >= 0 for layer_values in values.values())
        best = assign_layers(values["significance"], costs, row["budgets"]).total
        for name, layer_values in values.items():
            judged = total_value(values["significance"], assign_layers(layer_values, costs, row["budgets"]).intervals)
            assert judged <= best * (1 + 1e-12), name


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`total` must be >= 1, got 0"):
        budget_cases(0)
    with pytest.raises(ValueError, match="`devices` must be >= 1, got 0"):
        budget_cases(100, devices=0)
    with pytest.raises(ValueError, match=r"`low` and `high` must be in order in \(0, 1\], got 0.5 and 0.2"):
        budget_cases(100, low=0.5, high=0.2)
