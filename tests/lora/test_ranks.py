"""Rules for ranks: reference ranks, the properties of the rules, the budget, and the controls."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from weight_changes import spectrum_of

from lowrank.lora.deltas import DeltaSpectrum
from lowrank.lora.rank_rule import RankRule
from lowrank.lora.ranks import (
    layer_type,
    nearest_power_of_two,
    random_ranks,
    rank_for_delta,
    ranks_for_budget,
    smooth_ranks,
    uniform_ranks,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "lora_ranks"


def test_reference_ranks() -> None:
    thresholds = json.loads((GOLDEN / "expected.json").read_text())["spectra"]["q_geometric_64x64"]["thresholds"]
    file = load_file(GOLDEN / "delta_q_geometric_64x64.safetensors")
    spectrum = spectrum_of(file["delta"])
    torch.testing.assert_close(spectrum.sigma.float(), file["sigma"], rtol=1e-4, atol=1e-6)
    for values in (spectrum.sigma, file["sigma"]):
        for threshold, expected in thresholds.items():
            assert rank_for_delta(values, float(threshold), 1, 1000) == expected["r_raw"]
            assert spectrum.energy(expected["r_raw"]) == pytest.approx(expected["energy_at_r"], abs=1e-5)
            for bounds, final in expected["final"].items():
                low, high = map(int, bounds.split("-"))
                rank = rank_for_delta(values, float(threshold), low, high)
                assert rank == final["clip_only"]
                assert nearest_power_of_two(rank, low, high) == final["reference_pow2"]
            not_squared = rank_for_delta(values.sqrt(), float(threshold), 1, 1000)
            assert not_squared == expected["r_if_sigma_not_squared"] != expected["r_raw"]


def test_reference_smoothing() -> None:
    for case in json.loads((GOLDEN / "expected.json").read_text())["groups"]:
        names = [f"layers.{i}.q_proj" for i in range(len(case["before"]))]
        groups = dict.fromkeys(names, "q_proj")
        after = smooth_ranks(dict(zip(names, case["before"], strict=True)), groups, case["smoothing"])
        assert list(after.values()) == case["after"]
        parameters = sum(rank * sum(shape) for rank, shape in zip(after.values(), case["shapes"], strict=True))
        assert parameters == case["lora_params"]


@pytest.mark.parametrize(
    ("factor", "expected"), [(0.25, [14, 17, 23, 59, 107]), (0.8, [36, 36, 38, 48, 60]), (1, [44] * 5)]
)
def test_smoothing_by_hand(factor: float, expected: list[int]) -> None:
    ranks = dict(zip("abcde", [4, 8, 16, 64, 128], strict=True))
    assert list(smooth_ranks(ranks, dict.fromkeys(ranks, "q"), factor).values()) == expected
    assert smooth_ranks(ranks, dict.fromkeys(ranks, "q"), 0) == ranks


def test_smoothing_keeps_to_groups_bounds_and_means() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ranks = {
            f"layers.{i}.{kind}": int(torch.randint(4, 129, (), generator=generator)) for i in range(6) for kind in "qv"
        }
        groups = {name: layer_type(name) for name in ranks}
        for factor in (0.1, 0.5, 0.8, 1.0):
            smooth = smooth_ranks(ranks, groups, factor)
            for kind in "qv":
                before, after = ([r[n] for n in ranks if groups[n] == kind] for r in (ranks, smooth))
                assert min(before) <= min(after)
                assert max(after) <= max(before)
                assert sum(before) / 6 - 1 <= sum(after) / 6 <= sum(before) / 6
    assert smooth_ranks({"a": 0, "b": 8, "c": 16}, dict.fromkeys("abc", "q"), 1) == {"a": 0, "b": 12, "c": 12}


def test_the_threshold_rule_has_its_properties() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 40), (32, 32), (40, 24)):
        sigma = torch.linalg.svdvals(torch.randn(shape, generator=generator))
        thresholds = torch.linspace(0.01, 1, 60).tolist()
        ranks = [rank_for_delta(sigma, threshold, 1, 1000) for threshold in thresholds]
        assert ranks == sorted(ranks)
        assert ranks[-1] == min(shape)
        for scale in (1e-30, 1e-6, 1e6):
            assert [rank_for_delta(scale * sigma.double(), t, 1, 1000) for t in thresholds] == ranks
        for top in (5, 10, 20):
            assert [rank_for_delta(sigma, t, 1, top) for t in thresholds] == [min(rank, top) for rank in ranks]
        low = torch.randn(shape[0], 7, generator=generator) @ torch.randn(7, shape[1], generator=generator)
        assert rank_for_delta(torch.linalg.svdvals(low), 1.0, 1, 1000) == 7
        assert rank_for_delta(spectrum_of(low).sigma, 1.0, 1, 1000) == 7


def test_bounds_and_edges() -> None:
    assert rank_for_delta([3.0, 1.0], 0.9, 1, 128) == 1  # exactly reached
    assert rank_for_delta([3.0, 1.0], 0.91, 1, 128) == 2
    assert rank_for_delta([3.0, 1.0], 0.5, 4, 128) == 2  # no more than there are
    assert rank_for_delta([1.0] * 200, 0.9, 4, 128) == 128
    assert rank_for_delta([0.0, 0.0], 0.9) == 0
    assert rank_for_delta([1e-30, 1e-31], 0.999, 1, 8) == 2
    assert [nearest_power_of_two(r) for r in (0, 4, 16, 17, 22, 23, 45, 46, 90, 91, 181)] == [
        0,
        4,
        16,
        16,
        16,
        32,
        32,
        64,
        64,
        128,
        128,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], 0.0), r"`threshold` must be in \(0, 1\], got 0.0"),
        (([1.0], 1.1), r"`threshold` must be in \(0, 1\], got 1.1"),
        (([1.0], 0.9, 8, 4), r"`min_rank` must be in \[1, `max_rank`\] for `max_rank` 4, got 8"),
        (([1.0], 0.9, 0, 4), r"`min_rank` must be in \[1, `max_rank`\] for `max_rank` 4, got 0"),
        (([float("nan")], 0.9), "`singular_values` must be finite"),
        (([-1.0], 0.9), "`singular_values` must be finite"),
        (([], 0.9), "`singular_values` must be finite and >= 0, at least one"),
    ],
    ids=str,
)
def test_rule_refusals(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_for_delta(*arguments)


def test_smoothing_refusals() -> None:
    with pytest.raises(ValueError, match=r"`factor` must be in \[0, 1\], got 1.5"):
        smooth_ranks({"a": 4}, {"a": "q"}, 1.5)
    with pytest.raises(ValueError, match="`groups` must name a group for every layer, got none for 'a'"):
        smooth_ranks({"a": 4}, {}, 0.5)


def test_a_budget_is_spent_on_the_largest_energies() -> None:
    torch.manual_seed(0)
    spectra = {f"layers.{i}.q": spectrum_of((i + 0.5) * torch.randn(20, 20)) for i in range(5)}
    for budget in (40, 400, 1234, 3000):
        ranks = ranks_for_budget(spectra, budget)
        spent = sum(40 * rank for rank in ranks.values())
        assert budget - 40 < spent <= budget
        kept = sum(float(s.sigma[: ranks[n]].square().sum()) for n, s in spectra.items())
        best = sum(
            sorted((v for s in spectra.values() for v in s.sigma.square().tolist()), reverse=True)[: spent // 40]
        )
        assert kept == pytest.approx(best)  # equal shapes: exactly the globally largest
    assert sum(ranks_for_budget(spectra, 10**6).values()) == 100
    assert max(ranks_for_budget(spectra, 10**6, max_rank=7).values()) == 7
    with pytest.raises(ValueError, match="`parameters` must be >= 1, got 0"):
        ranks_for_budget(spectra, 0)
    zero = spectra | {"layers.9.q": spectrum_of(torch.zeros(20, 20))}
    assert ranks_for_budget(zero, 400)["layers.9.q"] == 0


def test_costs_weigh_where_shapes_differ() -> None:
    small, large = (
        DeltaSpectrum((4, 4), torch.tensor([1.0]), 1.0, 1.0),
        DeltaSpectrum((40, 40), torch.tensor([2.0]), 4.0, 1.0),
    )
    assert ranks_for_budget({"large": large, "small": small}, 80) == {"large": 0, "small": 1}
    assert ranks_for_budget({"large": large, "small": small}, 88) == {"large": 1, "small": 1}
    assert uniform_ranks({"a": (4, 4), "b": (40, 40)}, 200) == {"a": 3, "b": 2}


def test_controls_use_up_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (4, 4), "b": (40, 40), "c": (24, 40), "d": (40, 24)}
    whole = sum(min(shape) * sum(shape) for shape in shapes.values())
    seen = set()
    for budget in (300, 1000, 3000, whole, 2 * whole):
        for _ in range(5):
            ranks = random_ranks(shapes, budget, generator)
            seen.add(tuple(ranks.values()))
            left = budget - sum(rank * sum(shapes[name]) for name, rank in ranks.items())
            assert all(0 <= rank <= min(shapes[name]) for name, rank in ranks.items())
            assert left >= 0
            assert left < 64 or all(left < sum(shapes[n]) or r == min(shapes[n]) for n, r in ranks.items())
        uniform = uniform_ranks(shapes, budget)
        free = [rank for name, rank in uniform.items() if rank < min(shapes[name])]
        assert not free or max(free) - min(free) <= 1
    assert len(seen) > 15
    assert list(ranks.values()) == [4, 40, 24, 24]
    again = random_ranks(shapes, 1000, torch.Generator().manual_seed(1))
    assert again == random_ranks(shapes, 1000, torch.Generator().manual_seed(1))


SHAPES = {"a": (np.int16(300), np.int16(300)), "b": (np.int16(200), np.int16(400))}


def spectra_of(shapes: Any) -> dict[str, DeltaSpectrum]:
    values = {name: torch.linspace(2, 1, min(shape)).double() for name, shape in shapes.items()}
    return {name: DeltaSpectrum(shapes[name], v, float(v.square().sum()), 1.0) for name, v in values.items()}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("number", [float("nan"), -10, -0.5, float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "choose",
    [
        lambda budget: ranks_for_budget(spectra_of({"a": (4, 4)}), budget),
        lambda budget: uniform_ranks({"a": (4, 4)}, budget),
        lambda budget: random_ranks({"a": (4, 4)}, budget, torch.Generator()),
        lambda budget: RankRule(parameters=budget),
    ],
    ids=["budget", "uniform", "random", "rule"],
)
def test_a_budget_that_is_none_is_refused(choose: Any, number: float) -> None:
    with pytest.raises(ValueError, match=r"`parameters` must be .*, got (nan|-10|-0.5|inf|-inf)"):
        choose(number)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", [0, -5, 2.5, float("nan"), float("inf"), True])
def test_bounds_of_ranks_that_are_none_are_refused(bad: Any) -> None:
    spectra = spectra_of({"a": (8, 8)})
    if bad is not True:  # counts as 1 in Python; a bound is no flag
        with pytest.raises(ValueError, match="`m(in|ax)_rank` must be"):
            rank_for_delta([2.0, 1.0], 0.9, 1, bad)
        with pytest.raises(ValueError, match="`m(in|ax)_rank` must be"):
            RankRule(min_rank=bad)
    with pytest.raises(ValueError, match="`max_rank` must be a whole number >= 1"):
        ranks_for_budget(spectra, 100, max_rank=bad)
    if bad != 0:
        with pytest.raises(ValueError, match="`rank` must be a whole number >= 0"):
            nearest_power_of_two(bad)
        with pytest.raises(ValueError, match=r"`ranks\['a'\]` must be a whole number >= 0"):
            smooth_ranks({"a": bad}, {"a": "q"}, 0.5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [int, float, np.int16, np.int64, np.float32])
def test_numbers_of_any_type_give_the_same_ranks(kind: Any) -> None:
    plain = {name: tuple(map(int, shape)) for name, shape in SHAPES.items()}
    budget, spectra = 30000, spectra_of(plain)
    for shapes in (plain, SHAPES):
        uniform = uniform_ranks(shapes, kind(budget))
        assert uniform == {"a": 25, "b": 25}
        drawn = random_ranks(shapes, kind(budget), torch.Generator().manual_seed(0))
        assert drawn == random_ranks(plain, budget, torch.Generator().manual_seed(0))
        assert all(type(rank) is int for rank in (*uniform.values(), *drawn.values()))
    found = ranks_for_budget(spectra, kind(budget), max_rank=kind(30))
    assert found == ranks_for_budget(spectra, budget, max_rank=30)
    assert type(rank_for_delta([2.0, 1.0, 0.5], 0.9, kind(1), kind(2))) is int
    assert type(RankRule(min_rank=kind(2), parameters=kind(9)).metadata["parameters"]) is int
    assert uniform_ranks({}, 10) == random_ranks({}, 10, torch.Generator()) == {}
