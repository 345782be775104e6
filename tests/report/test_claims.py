"""Verdicts of claims: one rule for cases, for most cases, and for means over seeds."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lowrank.report.claims import CLOSE, FAILS, HOLDS, VERDICTS, judge, settle_verdicts, verdicts_agree


@pytest.mark.parametrize(
    ("left", "relation", "right", "verdict"),
    [
        (1.0, "<", 1.1, HOLDS),
        (1.0, "<", 0.9, FAILS),
        (1.0, "<", 1.0005, CLOSE),
        (1.0, ">", 1.0005, CLOSE),
        (1.0, "<=", 1.0, CLOSE),
        (-1.0, ">", -1.1, HOLDS),
        (0.0, ">=", 0.0, CLOSE),
        (np.nan, "<", 1.0, CLOSE),
    ],
)
def test_a_difference_within_the_noise_is_too_close(left: float, relation: str, right: float, verdict: str) -> None:
    assert judge(left, relation, right).verdict == verdict
    turned = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}[relation]
    assert judge(right, turned, left).verdict == verdict
    assert judge(1e6 * left, relation, 1e6 * right).verdict == verdict  # noise is relative


@pytest.mark.parametrize(("relation", "verdict"), [("<", FAILS), ("<=", HOLDS), (">", FAILS), (">=", HOLDS)])
def test_without_noise_equal_sides_decide_by_the_relation(relation: str, verdict: str) -> None:
    assert judge(3, relation, 3, noise=0).verdict == verdict


def test_all_cases_must_hold_and_a_clear_failure_counts_most() -> None:
    assert judge([1, 2], "<", 3) == (HOLDS, "2 of 2")
    assert judge([1, 2, 3], "<", 3) == (CLOSE, "2 of 3")
    assert judge([1, 3, 4], "<", 3) == (FAILS, "1 of 3")


def test_most_cases_is_more_than_half() -> None:
    assert judge([1, 1, 5], "<", 3, over="most") == (HOLDS, "2 of 3")
    assert judge([1, 5], "<", 3, over="most") == (FAILS, "1 of 2")
    assert judge([1, 1, 3, 5], "<", 3, over="most") == (CLOSE, "2 of 4")
    assert judge([1, 3, 5, 5], "<", 3, over="most") == (FAILS, "1 of 4")


def test_a_mean_is_judged_by_the_t_interval_of_paired_differences() -> None:
    generator = np.random.default_rng(0)
    for count, shift in [(2, 0.0), (3, 1.0), (5, -0.5), (30, 0.2)]:
        one, other = generator.normal(size=(2, count))
        low, high = stats.ttest_rel(one + shift, other).confidence_interval(0.95)
        wanted = HOLDS if low > 0 else FAILS if high < 0 else CLOSE
        assert judge(one + shift, ">", other, over="mean").verdict == wanted
        assert judge(other, "<", one + shift, over="mean").verdict == wanted
    assert judge([0.2, 0.2], ">", 0.1, over="mean").verdict == HOLDS  # no spread
    assert judge([0.2], ">", 0.1, over="mean") == (CLOSE, "+0.1 (n=1)")  # one seed decides nothing
    assert judge([1.0, 2.0, 3.0], ">", 0.0, over="mean").number == "+2 ± 2.5 (n=3)"


def test_series_are_paired_by_index() -> None:
    left = pd.Series([1.0, 2.0, 3.0], index=[0, 1, 2])
    right = pd.Series([3.1, 1.1, 2.1], index=[2, 0, 1])
    assert judge(left, "<", right).verdict == HOLDS
    with pytest.raises(ValueError, match="`right` must have the cases of `left`, each once"):
        judge(left, "<", right.drop(2))


def test_bad_arguments_are_named() -> None:
    for options, name in (
        ({"relation": "=="}, "relation"),
        ({"over": "some"}, "over"),
        ({"noise": -1}, "noise"),
        ({"left": []}, "left"),
        ({"left": [1, 2], "right": [1, 2, 3]}, "left"),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            judge(**{"left": 1, "relation": "<", "right": 2} | options)


@pytest.mark.parametrize("here", VERDICTS)
@pytest.mark.parametrize("there", VERDICTS)
def test_printed_verdicts_are_settled_only_if_they_agree(here: str, there: str) -> None:
    text, reference = f"3 rows\n{here}: a < b\n", f"3 rows\n{there}: a < b\n"
    assert (settle_verdicts(text, reference) == reference) == verdicts_agree(here, there)
    assert verdicts_agree(here, there) == ({here, there} != {HOLDS, FAILS})


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        (f"{CLOSE}: a < b\n", f"{HOLDS}: a < c\n"),  # another claim
        (f"{CLOSE}: a < b\n", "maybe: a < b\n"),  # no verdict
        (f"{CLOSE}: a < b\n{CLOSE}: c\n", f"{CLOSE}: a < b\n"),  # a line more
        (f"{CLOSE}: a < b\n", f"{CLOSE}: a < b\n{CLOSE}: c\n"),  # a line fewer
        ("3 rows\n", "4 rows\n"),
        ("", "4 rows\n"),
    ],
)
def test_other_differences_stay(text: str, reference: str) -> None:
    assert settle_verdicts(text, reference) == text
