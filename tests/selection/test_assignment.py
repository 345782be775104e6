"""Assignment against exhaustive search, an independent program, and what must not change the answer."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowrank.selection.assignment import Assignment, assign_layers, total_value
from lowrank.selection.integer_program import solve_integer_program

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "layer_selection" / "mvbcs.json"


def instance(generator: np.random.Generator, layers: int = 7, devices: int = 3) -> tuple[list, list, list]:
    count, several = int(generator.integers(1, layers + 1)), int(generator.integers(1, devices + 1))
    costs = generator.integers(1, 20, count)
    values = generator.integers(0, 12, count)
    return values.tolist(), costs.tolist(), generator.integers(0, 1 + costs.sum(), several).tolist()


def exhaustive(values: Sequence[int], costs: Sequence[int], budgets: Sequence[int], order: str) -> int:
    """The best over all choices of runs, by definition."""
    spans = [(a, b) for a in range(len(values)) for b in range(a, len(values))]
    options = [[None, *[s for s in spans if sum(costs[s[0] : s[1] + 1]) <= budget]] for budget in budgets]
    best = 0
    for selection in itertools.product(*options):
        taken = [run for run in selection if run]
        if order == "free":
            taken = sorted(taken)
        if all(one[1] < two[0] for one, two in itertools.pairwise(taken)):
            best = max(best, sum(sum(values[a : b + 1]) for a, b in taken))
    return best


def is_valid(assignment: Assignment, values: Any, costs: Any, budgets: Any, order: str) -> bool:
    runs = [run for run in assignment.intervals if run]
    layers = [i for a, b in runs for i in range(a, b + 1)]
    paid = all(
        run is None or sum(costs[run[0] : run[1] + 1]) <= budget
        for run, budget in zip(assignment.intervals, budgets, strict=True)
    )
    in_order = order == "free" or runs == sorted(runs)
    ends = all(values[a] > 0 and values[b] > 0 for a, b in runs)
    return (
        paid
        and in_order
        and ends
        and len(layers) == len(set(layers))
        and assignment.total == total_value(values, assignment.intervals)
    )


@pytest.mark.parametrize("order", ["free", "fixed"])
def test_500_small_instances_equal_exhaustive_search(order: str) -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        values, costs, budgets = instance(generator)
        assignment = assign_layers(values, costs, budgets, order)
        assert assignment.total == exhaustive(values, costs, budgets, order), (values, costs, budgets)
        assert assignment.optimal
        assert assignment.gap == 0
        assert is_valid(assignment, values, costs, budgets, order)


def first_of_the_best(values: Sequence[int], costs: Sequence[int], budgets: Sequence[int]) -> list:
    """The documented choice among equal totals in a fixed order, over all choices of longest affordable runs."""
    layers = range(len(values))
    longest = [
        [(min(a for a in range(b + 1) if sum(costs[a : b + 1]) <= budget), b) for b in layers if costs[b] <= budget]
        for budget in budgets
    ]
    options = []
    for selection in itertools.product(*([None, *runs] for runs in longest)):
        taken = [run for run in selection if run]
        if all(one[1] < two[0] for one, two in itertools.pairwise(taken)):
            last_first = [(run[1], k) for k, run in reversed(list(enumerate(selection))) if run]
            options.append((-sum(sum(values[a : b + 1]) for a, b in taken), last_first, selection))
    valued = [[i for i in range(run[0], run[1] + 1) if values[i]] if run else [] for run in min(options)[2]]
    return [(run[0], run[-1]) if run else None for run in valued]


def test_ties_in_a_fixed_order_are_decided_as_documented() -> None:
    generator = np.random.default_rng(1)
    for _ in range(300):
        _, costs, budgets = instance(generator)
        values = generator.integers(0, 3, len(costs)).tolist()
        found = assign_layers(values, costs, budgets, "fixed").intervals
        assert found == first_of_the_best(values, costs, budgets), (values, costs, budgets)
        huge = [cost * 2**70 for cost in costs], [budget * 2**70 for budget in budgets]
        assert assign_layers([value * 2**70 for value in values], *huge, "fixed").intervals == found


def test_reference_instances() -> None:
    for case in json.loads(GOLDEN.read_text())["instances"]:
        for order in ("free", "ordered"):
            assignment = assign_layers(
                case["values"], case["costs"], case["budgets"], "fixed" if order == "ordered" else order
            )
            assert assignment.total == case[f"{order}_optimum"], case["name"]
            assert is_valid(assignment, case["values"], case["costs"], case["budgets"], order), case["name"]


def large(seed: int, layers: int = 60, devices: int = 5) -> tuple[list, list, list]:
    generator = np.random.default_rng(seed)
    costs = generator.integers(1, 50, layers)
    budgets = (generator.uniform(0.05, 0.2, devices) * costs.sum()).astype(int)
    return generator.random(layers).tolist(), costs.tolist(), budgets.tolist()


def test_what_must_not_change_the_answer() -> None:
    for seed in range(20):
        values, costs, budgets = large(seed)
        best = assign_layers(values, costs, budgets)
        assert is_valid(best, values, costs, budgets, "free")
        shuffled = assign_layers(values, costs, budgets[::-1])
        assert shuffled.total == best.total
        assert assign_layers(values[::-1], costs[::-1], budgets).total == best.total
        for scale in (1e-10, 1e10, 2.0**-900):
            scaled = assign_layers([scale * value for value in values], costs, budgets)
            assert scaled.intervals == best.intervals
        same = assign_layers(values, [7 * cost for cost in costs], [7 * budget + 6 for budget in budgets])
        assert same.intervals == best.intervals
        fixed = assign_layers(values, costs, budgets, "fixed")
        singles = [assign_layers(values, costs, [budget]).total for budget in budgets]
        assert best.total >= fixed.total >= max(singles)
        more = (
            assign_layers(values, costs, [*budgets, 30]),
            assign_layers(values, costs, [budgets[0] + 40, *budgets[1:]]),
        )
        assert min(one.total for one in more) >= best.total


def test_every_order_of_equal_budgets_is_the_same() -> None:
    for seed in range(10):
        values, costs, budgets = large(seed)
        grouped = [budgets[0], budgets[1], budgets[0], budgets[1], budgets[0]]
        best = max(assign_layers(values, costs, turn, "fixed").total for turn in set(itertools.permutations(grouped)))
        assignment = assign_layers(values, costs, grouped)
        assert assignment.total == pytest.approx(best, rel=1e-12)
        starts = [run[0] for run in assignment.intervals[::2] if run]
        assert starts == sorted(starts)


def test_canonical_choice_among_ties() -> None:
    assert assign_layers([1] * 5, [1] * 5, [2]).intervals == [(0, 1)]
    assert assign_layers([1] * 6, [1] * 6, [2, 2]).intervals == [(0, 1), (2, 3)]
    assert assign_layers([0, 3, 0, 0, 3, 0], [1] * 6, [6, 6]).intervals == [(1, 4), None]
    assert assign_layers([0, 0], [1, 1], [5]) == Assignment(0, [None])
    assert assign_layers([5], [10], [10.9]).intervals == [(0, 0)]
    assert assign_layers([5, 7], [1, 1], [0.99]).intervals == [None]


def test_costs_and_values_of_any_size_are_exact() -> None:
    big = 2**53
    assert assign_layers([1, 1, 1], [big, 1, 1], [big + 1]).total == 2
    assert assign_layers([1, 1], [big, 1], [big]).intervals == [(0, 0)]
    huge = assign_layers([2**70, 2**70 + 1, 1], [2**80, 2**80 + 1, 1], [2**80, 2**80 + 2])
    assert huge == Assignment(2**71 + 2, [(0, 0), (1, 2)])
    assert assign_layers([10**400, 1], [1, 10**400], [10**400]) == Assignment(10**400, [(0, 0)])
    tenths = assign_layers([0.5, 0.9, 0.2], [2, 4, 5], [4])
    assert tenths.total == 0.9


@pytest.mark.parametrize("seed", range(6))
def test_the_program_agrees_and_bounds(seed: int) -> None:
    values, costs, budgets = large(seed, 20 + 4 * seed, 2 + seed % 3)
    exact = assign_layers(values, costs, budgets)
    other = assign_layers(values, costs, budgets, limit=1)
    assert other.total == pytest.approx(exact.total, rel=1e-9)
    assert other.optimal
    assert is_valid(other, values, costs, budgets, "free")


def test_beyond_the_limit_a_gap_is_certified() -> None:
    generator = np.random.default_rng(3)
    costs = generator.integers(1, 40, 80).tolist()
    values = generator.integers(1, 100, 80).tolist()
    budgets = generator.integers(20, 200, 10).tolist()
    exact = assign_layers(values, costs, budgets)
    rough = assign_layers(values, costs, budgets, limit=1, seconds=0.2)
    assert is_valid(rough, values, costs, budgets, "free")
    assert rough.total <= exact.total <= math.floor(rough.total / (1 - rough.gap) + 1e-6)
    assert rough.optimal == (rough.gap == 0)


def test_runs_of_the_program_that_lie_in_one_another_lose_nothing(monkeypatch) -> None:
    """The program may let one run lie within another; cutting the overlap must not cut what only the outer one has."""
    import scipy.optimize  # noqa: PLC0415

    starts = [[0, 0, 0, 0, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5]]  # device 0 pays four layers, device 1 one
    windows = [(k, i) for k in range(2) for i in range(1, 7)]
    picked = [float(window in ((0, 5), (1, 3))) for window in windows]  # layers 1..4, and layer 2 within

    def nested(objective: np.ndarray, **_: Any) -> Any:
        return scipy.optimize.OptimizeResult(x=np.array(picked + [0.0] * 6), mip_dual_bound=float(-len(objective)))

    monkeypatch.setattr(scipy.optimize, "milp", nested)
    _, runs = solve_integer_program([1] * 6, starts)
    assert runs == [(1, 4), None]


@pytest.mark.parametrize(
    ("values", "costs", "budgets", "order", "message"),
    [
        ([1, -1], [1, 1], [1], "free", "`values` must be finite and >= 0, got -1 at 1"),
        ([1.0, float("nan")], [1, 1], [1], "free", "`values` must be finite and >= 0, got nan at 1"),
        ([1], [0], [1], "free", "`costs` must be finite and >= 1, got 0 at 0"),
        ([1], [-3], [1], "free", "`costs` must be finite and >= 1, got -3 at 0"),
        ([1], [2.5], [1], "free", "`costs` must be integers, got 2.5 at 0"),
        ([1], [1], [-1], "free", "`budgets` must be finite and >= 0, got -1 at 0"),
        ([], [], [1], "free", "`values` must have at least one number, got none"),
        ([1], [1], [], "free", "`budgets` must have at least one number, got none"),
        ([1, 2], [1], [1], "free", "`costs` must have one number for each of 2 values, got 1"),
        ([1], [1], [1], "any", "`order` must be 'free' or 'fixed', got 'any'"),
    ],
)  # fmt: skip
def test_refusals(values: Any, costs: Any, budgets: Any, order: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign_layers(values, costs, budgets, order)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.int32, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["free", "fixed"])
@pytest.mark.parametrize("limit", [1, 2**25])
def test_numbers_of_any_width_give_the_assignment_of_integers(kind: Any, order: str, limit: int) -> None:
    generator = np.random.default_rng(0)
    values, costs = generator.integers(1, 120, 9), generator.integers(1, 120, 9)
    budgets = np.array([120, 90, 120, 60])
    wanted = assign_layers(values.tolist(), costs.tolist(), budgets.tolist(), order, limit=limit)
    found = assign_layers(values.astype(kind), costs.astype(kind), budgets.astype(kind), order, limit=limit)
    assert found == wanted
    assert total_value(values.astype(kind), wanted.intervals) == wanted.total


@pytest.mark.usefixtures("unchecked")
def test_small_shares_keep_the_digits_of_their_own_type() -> None:
    values = np.array([0.1, 0.2, 0.30004883], dtype=np.float16)
    found = assign_layers(values, [1, 1, 1], [1, 1])
    assert found.intervals == [(1, 1), (2, 2)]
    assert found.total == float(values[1]) + float(values[2])
