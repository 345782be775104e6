"""Turn paired differences into an effect with its interval, and effects into verdicts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from lowrank.io.checks import require

SUPPORTED, REFUTED, INCONCLUSIVE = "supported", "refuted", "inconclusive"
LEVEL = 0.05  # of the intervals, and of all verdicts of a notebook and set together
RESAMPLES = 10_000


class Effect(NamedTuple):
    """Hold a mean difference.

    **Arguments**

    - `mean`: of the differences; NaN without any.
    - `low`, `high`: the ends of its 95 % interval; NaN if `n` is below 2.
    - `n`: int, seeds, models or samples.
    - `p`: of a mean at the margin, two-sided; 1 if `n` is below 2.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float


def mean_effect(differences: Any, margin: int | float = 0.0) -> Effect:
    """Return the mean of paired differences with its t interval.

    **Arguments**

    - `differences`: `(n,)`, one number per seed, model, layer or case; NaN is left out.
    - `margin`: what the mean is tested against. Default 0.

    **Raises**

    - `ValueError`: differences that are no list of numbers.

    **Reference** Student, Biometrika 6, 1908.
    """
    values = np.asarray(differences, dtype=float)
    require(values.ndim == 1, "differences", "have one dimension", values.shape)
    values = values[~np.isnan(values)]
    if values.size < 2:
        return Effect(float(values[0]) if values.size else np.nan, np.nan, np.nan, values.size, 1.0)
    mean, error = float(values.mean()), float(values.std(ddof=1) / values.size**0.5)
    half = float(stats.t.ppf(1 - LEVEL / 2, values.size - 1)) * error
    p = float(2 * stats.t.sf(abs(mean - margin) / error, values.size - 1)) if error else float(mean == margin)
    return Effect(mean, mean - half, mean + half, values.size, p)


def bootstrap_effect(differences: Any, margin: int | float = 0.0, *, seed: int = 0) -> Effect:
    """Return the mean of paired differences over samples with its percentile interval.

    Samples are drawn with replacement, and so are seeds, each independently of the other: the interval covers other samples and
    other seeds.

    **Arguments**

    - `differences`: `(samples,)` or `(seeds, samples)`, finite.
    - `margin`: what the mean is tested against. Default 0.
    - `seed`: int, of the 10,000 draws. Default 0.

    **Returns** the effect; `n` counts the samples.

    **Raises**

    - `ValueError`: fewer than 2 samples, more than two dimensions, NaN or infinity.

    **Reference** Efron, Annals of Statistics 7, 1979; for crossed factors Owen, Annals of Applied Statistics 1, 2007.
    """
    values = np.asarray(differences, dtype=float)
    require(
        values.ndim in (1, 2) and values.shape[-1] > 1, "differences", "be (samples,) or (seeds, samples)", values.shape
    )
    require(bool(np.isfinite(values).all()), "differences", "be finite", values)
    values = np.atleast_2d(values)
    seeds, samples = values.shape
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    by_sample = weights @ values
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):  # so that a draw over many samples stays small
        rows = by_sample[start : start + 500]
        drawn = generator.multinomial(samples, np.full(samples, 1 / samples), len(rows))
        means[start : start + 500] = (drawn * rows).sum(axis=1) / samples
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    beyond = min((means <= margin).sum(), (means >= margin).sum())
    return Effect(
        float(values.mean()), float(low), float(high), samples, float(min(1, 2 * (beyond + 1) / (RESAMPLES + 1)))
    )


def bootstrap_ratio(parts: Any, wholes: Any, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a ratio of two means over the same samples, which are drawn with replacement.

    **Arguments**

    - `parts`, `wholes`: `(samples,)`, one number per sample each; a sample without a number in either is left out.
    - `seed`: int, of the 10,000 draws. Default 0.

    **Returns** its ends; NaN for fewer than 2 samples.

    **Raises**

    - `ValueError`: no lists of equal length.

    **Reference** Efron, Annals of Statistics 7, 1979.
    """
    pairs = np.stack([np.asarray(values, dtype=float) for values in (parts, wholes)])
    require(pairs.ndim == 2, "parts", "have one dimension, as `wholes`", pairs.shape[1:])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    samples = pairs.shape[1]
    if samples < 2:
        return np.nan, np.nan
    generator, ratios = np.random.default_rng(seed), np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):  # so that a draw over many samples stays small
        drawn = generator.multinomial(samples, np.full(samples, 1 / samples), 500) @ pairs.T
        ratios[start : start + 500] = drawn[:, 0] / drawn[:, 1]
    low, high = np.quantile(ratios, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for their number, so that one level holds for all of them together.

    **Arguments**

    - `p_values`: in [0, 1], in any order.

    **Returns** the adjusted values, in the same order.

    **Raises**

    - `ValueError`: a value outside [0, 1].

    **Reference** Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    values = np.asarray(p_values, dtype=float)
    require(bool(((values >= 0) & (values <= 1)).all()), "p_values", "be in [0, 1]", list(p_values))
    order = np.argsort(values, kind="stable")
    adjusted = np.maximum.accumulate(values[order] * (values.size - np.arange(values.size))).clip(max=1)
    result = np.empty_like(values)
    result[order] = adjusted
    return result.tolist()


def decide(effects: Sequence[Effect], margins: Sequence[float]) -> list[str]:
    """Judge which of several claims that a mean exceeds its margin are supported, by Holm's correction over all of them.

    **Arguments**

    - `effects`: one per claim of a notebook and set, each tested against its margin.
    - `margins`: those margins.

    **Returns** 'supported', 'refuted' (significantly below the margin) or 'inconclusive' for each claim.
    """
    verdicts = []
    for effect, margin, p in zip(effects, margins, holm([effect.p for effect in effects]), strict=True):
        side = SUPPORTED if effect.mean > margin else REFUTED
        verdicts.append(side if p <= LEVEL else INCONCLUSIVE)
    return verdicts
