"""Fit the power law lambda^(-alpha) of the tail of a spectrum, by maximum likelihood and by Hill's estimator."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_BINS = 100  # of the histogram of log10 lambda
_SCRATCH = 2**15  # numbers in a block of tails: fits the cache of a core; an accelerator takes more


def fit_power_law(values: np.ndarray, window: str, status: str, device: torch.device) -> dict[str, Any]:
    """Fit exponents of the tail of a spectrum.

    **Arguments**

    - `values`: eigenvalues `(n,)`, n >= 2, float64, ascending, positive, not all equal.
    - `window`: 'published' or 'corrected', see `lowrank.selection.esd.esd_metrics`.
    - `status`: the status so far. 'empty window' replaces it if no tail may start in the window.
    - `device`: where the distances are computed.

    **Returns** the `status` and the metrics `lowrank.selection.esd.FITTED_METRICS`, NaN for a fit that cannot be made.

    **Reference** Clauset, Shalizi and Newman, SIAM Review 2009.
    """
    exponents, distances = (column.cpu().numpy() for column in _fit_tails(torch.from_numpy(values).to(device)))
    best = int(np.argmin(distances))
    low, high = _peak_window(values, window)
    near = np.flatnonzero((values[:-1] >= low) & (values[:-1] <= high))
    alpha, top = float(exponents[best]), math.log(values[-1])
    middle = len(values) // 2
    return {
        "status": status if len(near) else "empty window",
        "alpha": alpha,
        "alpha_distance": float(distances[best]),
        "alpha_xmin": float(values[best]),
        "alpha_peak": float(exponents[near[np.argmin(distances[near])]]) if len(near) else math.nan,
        "alpha_mid": float(exponents[middle]) if middle < len(exponents) else math.nan,
        "hill": _estimate_hill(values, len(values) // 2),
        "hill_tenth": _estimate_hill(values, len(values) // 10),
        "alpha_weighted": alpha * top / math.log(10),
        "log_alpha_norm": (alpha * top + math.log(np.exp(alpha * (np.log(values) - top)).sum())) / math.log(10),
    }


def _fit_tails(values: Float[Tensor, " n"]) -> tuple[Float[Tensor, " starts"], Float[Tensor, " starts"]]:
    """Return, for every start of the tail but the last, the exponent of maximum likelihood and its distance to the data."""
    logs, count = values.log(), len(values)
    left = torch.arange(count, 0, -1, device=values.device, dtype=torch.float64)  # eigenvalues in each tail
    sums = logs.flip(0).cumsum(0).flip(0)
    exponents = (1 + left / (sums - left * logs).clamp_min(0.0))[:-1]
    together = max(1, (_SCRATCH if values.device.type == "cpu" else 512 * _SCRATCH) // count)
    blocks = []
    for first in range(0, count - 1, together):
        rows = slice(first, min(first + together, count - 1))  # tails by eigenvalues; below the diagonal is no tail
        gaps = (logs[first:] - logs[rows, None]).mul_(1 - exponents[rows, None]).exp_().neg_().add_(1)
        gaps.sub_((left[rows, None] - left[first:]).div_(left[rows, None]))
        blocks.append(gaps.triu_().abs_().amax(1))
    distances = torch.cat(blocks)
    return exponents, distances.where(exponents.isfinite(), math.inf)


def _peak_window(values: np.ndarray, window: str) -> tuple[float, float]:
    """Return where a tail may start: from 0.95 to 1.5 times the left edge of the fullest bin of log10 lambda."""
    counts, edges = np.histogram(np.log10(values), bins=_BINS)
    peak = 10 ** float(edges[int(np.argmax(counts))])
    return (0.95 * peak if window == "corrected" else math.log10(0.95 * peak)), 1.5 * peak


def _estimate_hill(values: np.ndarray, count: int) -> float:
    """Return 1 + k / (sum of ln(lambda / threshold) over the k largest); the threshold is the next value."""
    if not 1 <= count < len(values):
        return math.nan
    spread = float((np.log(values[-count:]) - math.log(values[-count - 1])).sum())
    return 1 + count / spread if spread > 0 else math.nan
