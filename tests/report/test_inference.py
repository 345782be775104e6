"""Effects with intervals: against closed forms, other implementations and simulated coverage."""

import numpy as np
import pytest
from scipy import stats

from lowrank.report.inference import (
    INCONCLUSIVE,
    REFUTED,
    SUPPORTED,
    Effect,
    bootstrap_effect,
    bootstrap_ratio,
    decide,
    holm,
    mean_effect,
)


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_a_mean_has_the_interval_and_p_of_the_paired_t_test(count: int) -> None:
    one, other = np.random.default_rng(count).normal(size=(2, count))
    wanted = stats.ttest_rel(one, other)
    found = mean_effect(one - other)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.n == count
    shifted = mean_effect(one - other + 0.3, 0.3)  # a margin moves the test, not the interval's width
    assert shifted.p == pytest.approx(wanted.pvalue)
    assert shifted.high - shifted.low == pytest.approx(found.high - found.low)


def test_turning_the_sides_turns_the_effect() -> None:
    values = np.random.default_rng(0).normal(0.2, 1, size=9)
    there, back = mean_effect(values), mean_effect(-values)
    assert (back.mean, back.low, back.high, back.p) == pytest.approx((-there.mean, -there.high, -there.low, there.p))


def test_one_number_decides_nothing_and_equal_numbers_decide() -> None:
    assert mean_effect([0.3])[0::4] == (0.3, 1.0)
    assert mean_effect([]).p == 1.0
    assert np.isnan(mean_effect([]).mean)
    assert mean_effect([0.3, np.nan]).n == 1
    assert mean_effect([0.5, 0.5]) == Effect(0.5, 0.5, 0.5, 2, 0.0)
    assert mean_effect([0.5, 0.5], 0.5).p == 1.0


def test_the_bootstrap_agrees_with_the_t_interval_on_many_samples() -> None:
    values = np.random.default_rng(1).exponential(size=800) - 0.9
    one, other = bootstrap_effect(values), mean_effect(values)
    assert one.mean == pytest.approx(other.mean)
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=0.1 * (other.high - other.low))
    assert bootstrap_effect(values) == one  # the same draws each time
    assert bootstrap_effect(values, 10.0).p == pytest.approx(2 / 10_001)


def test_the_bootstrap_covers_other_seeds_too() -> None:
    generator = np.random.default_rng(2)
    alike = np.tile(generator.normal(size=200), (4, 1))
    apart = alike + np.array([-1.0, -0.3, 0.3, 1.0])[:, None]  # the same mean, seeds that differ
    one, two = bootstrap_effect(alike), bootstrap_effect(apart)
    assert one.mean == pytest.approx(two.mean)
    assert two.high - two.low > 3 * (one.high - one.low)
    assert two.n == 200


def test_ninety_five_percent_of_the_intervals_hold_the_truth() -> None:
    generator, held = np.random.default_rng(3), {"t": 0, "bootstrap": 0}
    for seed in range(200):
        few, many = generator.normal(1.0, 1, size=5), generator.normal(1.0, 1, size=60)
        for name, effect in (("t", mean_effect(few)), ("bootstrap", bootstrap_effect(many, seed=seed))):
            held[name] += effect.low <= 1.0 <= effect.high
    assert all(0.9 <= count / 200 <= 0.99 for count in held.values()), held


def test_holm_by_hand_and_for_any_order() -> None:
    values = [0.04, 0.01, 0.03, 0.005]
    assert holm(values) == pytest.approx(
        [0.06, 0.03, 0.06, 0.02]
    )  # 4 x .005, 3 x .01, 2 x .03, and no smaller than before
    order = [2, 0, 3, 1]
    assert holm([values[place] for place in order]) == pytest.approx([holm(values)[place] for place in order])
    assert holm([]) == []
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_no_difference_is_seldom_called_one_however_many_are_asked() -> None:
    generator, wrong = np.random.default_rng(4), 0
    for _ in range(200):
        effects = [mean_effect(values) for values in generator.normal(size=(20, 5))]
        wrong += set(decide(effects, [0.0] * 20)) != {INCONCLUSIVE}
    assert wrong / 200 <= 0.1  # 64 % without the correction


def test_verdicts_follow_the_side_of_the_margin() -> None:
    clear = [mean_effect(np.array([0.9, 1.0, 1.1]) * sign) for sign in (1, -1)]
    assert decide(clear, [0.0, 0.0]) == [SUPPORTED, REFUTED]
    above = mean_effect([0.9, 1.0, 1.1], 2.0)
    assert decide([above], [2.0]) == [REFUTED]
    assert decide([Effect(np.nan, np.nan, np.nan, 0, 1.0)], [0.0]) == [INCONCLUSIVE]


def test_bad_arguments_are_named() -> None:
    for call, words in (
        (lambda: mean_effect([[1.0, 2.0]]), "`differences` must have one dimension"),
        (lambda: bootstrap_effect([1.0]), "`differences` must be"),
        (lambda: bootstrap_effect(np.zeros((2, 2, 2))), "`differences` must be"),
        (lambda: bootstrap_effect([1.0, np.nan]), "`differences` must be finite"),
        (lambda: holm([0.5, 1.5]), "`p_values` must be in"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_the_interval_of_a_ratio_is_that_of_fieller_and_holds_the_ratio_as_often_as_it_says() -> None:
    generator, covered, truth = np.random.default_rng(0), 0, 0.3
    for _ in range(100):
        wholes = generator.normal(2.0, 1.0, size=60)
        parts = truth * wholes + generator.normal(0.0, 0.4, size=60)
        low, high = bootstrap_ratio(parts, wholes)
        covered += low <= truth <= high
    assert 88 <= covered <= 100
    a, b, n = parts.mean(), wholes.mean(), len(parts)
    cov, t = np.cov(parts, wholes, ddof=1) / n, stats.t.ppf(0.975, n - 1)
    roots = np.roots(
        [b**2 - t**2 * cov[1, 1], -2 * (a * b - t**2 * cov[0, 1]), a**2 - t**2 * cov[0, 0]]
    )  # Fieller 1954
    assert (low, high) == pytest.approx(sorted(roots), abs=0.1 * (high - low))


def test_a_ratio_leaves_out_samples_without_a_number_and_needs_two() -> None:
    parts, wholes = [1.0, 2.0, np.nan, 4.0], [2.0, 4.0, 1.0, 8.0]
    assert bootstrap_ratio(parts, wholes) == pytest.approx((0.5, 0.5))
    assert np.isnan(bootstrap_ratio([1.0, np.nan], [1.0, 1.0])).all()
    with pytest.raises(ValueError, match="`parts` must have one dimension"):
        bootstrap_ratio([[1.0]], [[2.0]])
    with pytest.raises(ValueError, match="shape"):
        bootstrap_ratio([1.0, 2.0], [1.0])
