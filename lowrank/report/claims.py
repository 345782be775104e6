"""Judge the claims of a notebook: does a comparison hold, fail, or hang on digits that another machine or seed would change?"""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from lowrank.io.checks import require

HOLDS, FAILS, CLOSE = "holds", "fails", "too close to call"
VERDICTS = (HOLDS, FAILS, CLOSE)
RELATIONS = {"<": -1, "<=": -1, ">": 1, ">=": 1}  # the sign of left - right where the claim holds
CONFIDENCE = 0.95  # of the interval of a mean
NOISE = 1e-3  # relative; training-free numbers agree between machines to this


class Judgement(NamedTuple):
    """Hold the outcome of a claim.

    **Arguments**

    - `verdict`: one of `VERDICTS`.
    - `number`: what decides it, as text.
    """

    verdict: str
    number: str


def judge(left: Any, relation: str, right: Any, over: str = "all", noise: int | float = NOISE) -> Judgement:
    """Judge whether left and right stand in a relation.

    **Arguments**

    - `left`, `right`: numbers, or arrays with one entry per case or seed. Pandas series are aligned by index.
    - `relation`: "<", "<=", ">" or ">=".
    - `over`: "all", every case must hold; "most", more than half of the cases; "mean", the mean of left - right over seeds or
      cases, by its 95 % t interval. Default "all".
    - `noise`: a case is too close to call if the sides differ by no more than this share of the larger one. Only if it is 0,
      equal sides satisfy "<=" and ">=". "mean" does not use it. Default `NOISE`.

    **Returns** the verdict, and the number: `left` for one case, a count for several, mean and half width for "mean".

    **Raises**

    - `ValueError`: unknown relation or `over`, negative noise, no cases, sides that do not match.
    """
    require(relation in RELATIONS, "relation", f"be one of {sorted(RELATIONS)}", relation)
    require(over in JUDGES, "over", f"be one of {sorted(JUDGES)}", over)
    require(noise >= 0, "noise", "be >= 0", noise)
    one, other = _align(left, right)
    require(one.size > 0, "left", "have at least one case", left)
    return JUDGES[over](one, other, relation, noise)


def verdicts_agree(one: str, other: str) -> bool:
    """Return whether two verdicts agree: equal ones do, and one that is too close to call does with any other.

    **Arguments**

    - `one`, `other`: each one of `VERDICTS`.
    """
    return one == other or CLOSE in (one, other)


def settle_verdicts(text: str, reference: str) -> str:
    """Replace the printed verdicts that agree with those of another run by the other's.

    **Arguments**

    - `text`: lines that `Report.claim` printed, others among them.
    - `reference`: what the other run printed.

    **Returns** the text; lines on other claims, and verdicts that contradict, stay as they are.
    """
    lines, others = text.splitlines(keepends=True), reference.splitlines(keepends=True)
    return "".join(_settle_line(*pair) for pair in zip_longest(lines, others[: len(lines)], fillvalue=""))


def _settle_line(line: str, other: str) -> str:
    (one, _, claim), (another, _, same) = line.partition(": "), other.partition(": ")
    settled = claim == same and {one, another} <= set(VERDICTS) and verdicts_agree(one, another)
    return other if settled else line


def _align(left: Any, right: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(left, pd.Series) and isinstance(right, pd.Series):
        same = left.index.sort_values().equals(right.index.sort_values())
        require(same and left.index.is_unique, "right", "have the cases of `left`, each once", list(right.index))
        right = right.reindex(left.index)
    try:
        one, other = np.broadcast_arrays(np.asarray(left, dtype=float), np.asarray(right, dtype=float))
    except ValueError as error:
        raise ValueError(f"`left` and `right` must have the same cases: {error}") from error
    return one, other


def _judge_cases(one: np.ndarray, other: np.ndarray, relation: str, noise: int | float) -> tuple[int, int, int]:
    """Return how many cases hold, fail, and are too close; a case without a number is too close."""
    margin = RELATIONS[relation] * (one - other)
    if noise == 0:
        holds = margin >= 0 if relation.endswith("=") else margin > 0
        close = np.isnan(margin)
    else:
        close = ~(np.abs(margin) > noise * np.maximum(np.abs(one), np.abs(other)))
        holds = margin > 0
    held = int((holds & ~close).sum())
    return held, one.size - held - int(close.sum()), int(close.sum())


def _judge_all(one: np.ndarray, other: np.ndarray, relation: str, noise: int | float) -> Judgement:
    held, failed, close = _judge_cases(one, other, relation, noise)
    shown = f"{held} of {one.size}" if one.ndim else f"{float(one):.3g}"
    return Judgement(FAILS if failed else CLOSE if close else HOLDS, shown)


def _judge_most(one: np.ndarray, other: np.ndarray, relation: str, noise: int | float) -> Judgement:
    held, _, close = _judge_cases(one, other, relation, noise)
    verdict = HOLDS if 2 * held > one.size else FAILS if 2 * (held + close) <= one.size else CLOSE
    return Judgement(verdict, f"{held} of {one.size}")


def _judge_mean(one: np.ndarray, other: np.ndarray, relation: str, noise: int | float) -> Judgement:
    difference = np.atleast_1d(one - other)
    mean, count = difference.mean(), difference.size
    if count < 2 or np.isnan(mean):
        return Judgement(CLOSE, f"{mean:+.3g} (n={count})")
    half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * difference.std(ddof=1) / count**0.5
    margin = RELATIONS[relation] * mean
    verdict = HOLDS if margin > half else FAILS if margin < -half else CLOSE
    return Judgement(verdict, f"{mean:+.3g} ± {half:.2g} (n={count})")


JUDGES: dict[str, Callable[..., Judgement]] = {"all": _judge_all, "most": _judge_most, "mean": _judge_mean}
