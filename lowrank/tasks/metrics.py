"""The metrics that tasks report: how each is computed, and whether more of it is better.

`METRICS` is the only list of metrics. Other files ask a `Metric` for its properties and never compare names.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the share of entries that are equal, in [0, 1].

    **Arguments**

    - `predicted`: `(samples,)`, the predicted classes.
    - `true`: `(samples,)`, the labels.
    """
    return float((predicted == true).mean())


def f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the F1 score of class 1, in [0, 1]; 0 if class 1 is neither true nor predicted.

    **Arguments**

    - `predicted`: `(samples,)`, the predicted classes.
    - `true`: `(samples,)`, the labels.
    """
    from sklearn.metrics import f1_score  # noqa: PLC0415

    return float(f1_score(true, predicted, zero_division=0))  # pyright: ignore[reportArgumentType]


def matthews(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the Matthews correlation, in [-1, 1]; 0 if one side is constant.

    **Arguments**

    - `predicted`: `(samples,)`, the predicted classes.
    - `true`: `(samples,)`, the labels.
    """
    from sklearn.metrics import matthews_corrcoef  # noqa: PLC0415

    return float(matthews_corrcoef(true, predicted))


def _correlation(predicted: np.ndarray, true: np.ndarray, kind: str) -> float:
    from scipy import stats  # noqa: PLC0415

    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return -1.0  # undefined for constant predictions: counts as worst, not as NaN
    return float(getattr(stats, kind)(predicted, true).statistic)


def pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the Pearson correlation, in [-1, 1]; -1 if one side is constant.

    **Arguments**

    - `predicted`: `(samples,)`, the predicted values.
    - `true`: `(samples,)`, the labels.
    """
    return _correlation(predicted, true, "pearsonr")


def spearman(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the Spearman rank correlation, in [-1, 1]; -1 if one side is constant.

    **Arguments**

    - `predicted`: `(samples,)`, the predicted values.
    - `true`: `(samples,)`, the labels.
    """
    return _correlation(predicted, true, "spearmanr")


@dataclass(frozen=True)
class Metric:
    """Describe a metric: its name, its function, and how to read its values.

    **Arguments**

    - `name`: its key in `METRICS`, and the name of its column in tables.
    - `function`: `(predicted, true) -> float`, both `(samples,)`; `(loss) -> float` if `from_loss`.
    - `higher_is_better`: whether a better model has a higher value.
    - `objectives`: the keys of `lowrank.tasks.evaluation.OBJECTIVES` that it fits.
    - `bounds`: its lowest and highest value; None, the default, if it grows without bound.
    - `from_loss`: whether it is computed from the mean loss instead of predictions; default False.
    """

    name: str
    function: Callable[..., float]
    higher_is_better: bool
    objectives: tuple[str, ...]
    bounds: tuple[float, float] | None = None
    from_loss: bool = False

    @property
    def sign(self) -> int:
        """Return 1 if higher is better, else -1: the metric times its sign is a score."""
        return 1 if self.higher_is_better else -1


_CLASSES, _VALUES, _TOKENS = ("classification",), ("regression",), ("language_modelling",)

METRICS = {
    metric.name: metric
    for metric in (
        Metric("loss", float, False, (*_CLASSES, *_VALUES, *_TOKENS), from_loss=True),
        Metric("perplexity", lambda loss: float(np.exp(loss)), False, _TOKENS, from_loss=True),
        Metric("accuracy", accuracy, True, _CLASSES, (0.0, 1.0)),
        Metric("f1", f1, True, _CLASSES, (0.0, 1.0)),
        Metric("matthews", matthews, True, _CLASSES, (-1.0, 1.0)),
        Metric("pearson", pearson, True, _VALUES, (-1.0, 1.0)),
        Metric("spearman", spearman, True, _VALUES, (-1.0, 1.0)),
    )
}
