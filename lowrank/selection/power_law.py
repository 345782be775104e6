"""Fit the power law lambda^(-alpha) of the tail of a spectrum, by maximum likelihood and by Hill's estimator.

Every eigenvalue may start the tail. The closest tail needs the distances of few of them in full: the gaps at every 32nd
eigenvalue bound a distance from below, and most bounds exceed a distance that is known.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

_BINS = 100  # of the histogram of log10 lambda
_STRIDE = 32  # of the eigenvalues whose gaps bound a distance
_FEW = 32  # tails of the least bounds, which are measured first
EQUAL = 1e-12  # relative difference of eigenvalues that rounding makes
_ROUNDING = 1e-12  # of a distance, relative: far more than it has
_SCRATCH = 2**15  # numbers in a block of tails: fits the cache of a core


def fit_power_law(values: Float[np.ndarray, " n"], window: str, status: str) -> dict[str, Any]:
    """Fit exponents of the tail of a spectrum.

    **Arguments**

    - `values`: eigenvalues `(n,)`, n >= 2, float64, ascending, positive, not all equal.
    - `window`: 'published' or 'corrected', see `lowrank.selection.esd.esd_metrics`.
    - `status`: the status so far. 'empty window' replaces it if no tail may start in the window, and 'constant tail' replaces
      'ok' if the upper half of the eigenvalues is equal.

    **Returns** the `status` and the metrics `lowrank.selection.esd.FITTED_METRICS`, NaN for a fit that cannot be made.

    **Reference** Clauset, Shalizi and Newman, SIAM Review 2009.
    """
    logs = np.log(values)
    exponents = _fit_exponents(logs)
    low, high = _peak_window(values, window)
    near = np.flatnonzero((values[:-1] >= low) & (values[:-1] <= high) & np.isfinite(exponents))
    starts = np.arange(len(exponents))
    bounds = _measure_distances(logs, exponents, starts, np.arange(len(logs))[::-_STRIDE][::-1])
    best, distance = _find_closest(logs, exponents, starts, bounds)
    peak = exponents[_find_closest(logs, exponents, near, bounds[near])[0]] if len(near) else math.nan
    alpha, top = float(exponents[best]), math.log(values[-1])
    half = exponents[len(values) // 2 :]
    mid = float(half[0]) if len(half) and np.isfinite(half[0]) else math.nan
    if status == "ok" and len(half) and math.isnan(mid):
        status = "constant tail"
    return {
        "status": status if len(near) else "empty window",
        "alpha": alpha,
        "alpha_distance": distance,
        "alpha_xmin": float(values[best]),
        "alpha_peak": float(peak),
        "alpha_mid": mid,
        "hill": _estimate_hill(logs, len(values) // 2),
        "hill_tenth": _estimate_hill(logs, len(values) // 10),
        "alpha_weighted": alpha * top / math.log(10),
        "log_alpha_norm": (alpha * top + math.log(np.exp(alpha * (logs - top)).sum())) / math.log(10),
    }


def _fit_exponents(logs: Float[np.ndarray, " n"]) -> Float[np.ndarray, " starts"]:
    """Return the exponent of maximum likelihood for every start of the tail but the last; inf if the tail is constant."""
    left = np.arange(len(logs), 0, -1.0)  # eigenvalues in each tail
    sums = logs[::-1].cumsum()[::-1]
    with np.errstate(divide="ignore"):
        exponents = 1 + left / (sums - left * logs).clip(min=0.0)
    return np.where(logs[-1] - logs <= EQUAL, math.inf, exponents)[:-1]


def _find_closest(
    logs: Float[np.ndarray, " n"],
    exponents: Float[np.ndarray, " starts"],
    tails: Int[np.ndarray, " tails"],
    bounds: Float[np.ndarray, " tails"],
) -> tuple[int, float]:
    """Return the first of the tails that are closest to the data, and its distance; no distance is below its bound."""
    everywhere = np.arange(len(logs))
    few = np.sort(bounds.argsort()[:_FEW])
    reached = _measure_distances(logs, exponents, tails[few], everywhere).min()
    likely = tails[bounds <= reached * (1 + _ROUNDING)]
    distances = _measure_distances(logs, exponents, likely, everywhere)
    best = int(distances.argmin())
    return int(likely[best]), float(distances[best])


def _measure_distances(
    logs: Float[np.ndarray, " n"],
    exponents: Float[np.ndarray, " starts"],
    tails: Int[np.ndarray, " tails"],
    points: Int[np.ndarray, " points"],
) -> Float[np.ndarray, " tails"]:
    """Return the largest gap between the law and the data at some eigenvalues, for tails by ascending start.

    A constant tail is infinitely far away.
    """
    together = max(1, _SCRATCH // len(points))
    distances = np.full(len(tails), math.inf)
    for first in range(0, len(tails), together):
        rows = tails[first : first + together, None]
        columns = points[np.searchsorted(points, rows[0, 0]) :]
        with np.errstate(over="ignore", invalid="ignore"):
            gaps = np.exp((logs[columns] - logs[rows]) * (1 - exponents[rows]))
            gaps = np.abs(1 - gaps - (columns - rows) / (len(logs) - rows))
        gaps[columns < rows] = 0.0  # before the tail
        distances[first : first + together] = gaps.max(1)
    return np.where(np.isfinite(exponents[tails]), distances, math.inf)


def _peak_window(values: np.ndarray, window: str) -> tuple[float, float]:
    """Return where a tail may start: from 0.95 to 1.5 times the left edge of the fullest bin of log10 lambda."""
    counts, edges = np.histogram(np.log10(values), bins=_BINS)
    peak = 10 ** float(edges[int(np.argmax(counts))])
    return (0.95 * peak if window == "corrected" else math.log10(0.95 * peak)), 1.5 * peak


def _estimate_hill(logs: Float[np.ndarray, " n"], count: int) -> float:
    """Return 1 + k / (sum of ln(lambda / threshold) over the k largest); the threshold is the next value."""
    if not 1 <= count < len(logs):
        return math.nan
    spread = float((logs[-count:] - logs[-count - 1]).sum())
    return 1 + count / spread if logs[-1] - logs[-count - 1] > EQUAL else math.nan
