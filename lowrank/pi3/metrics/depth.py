"""Errors of predicted depth after one of the published alignments of its scale, and shift if there is one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from lowrank.io.checks import require
from lowrank.pi3.metrics.alignment import Array, require_finite, to_float64, unit_of

FAR = 1e3  # predictions this much larger or smaller than the truth are in another unit
ADAM_STEPS, ADAM_RATE, ADAM_TOLERANCE = 1000, 1e-4, 1e-6  # of the alignment lad2
LEAST_DEPTH = 1e-5  # aligned depth below counts as this in logarithms and ratios


def _lower_median(values: np.ndarray) -> float:
    """Return the median, the lower of the two middle values if their number is even."""
    return float(np.partition(values, (len(values) - 1) // 2)[(len(values) - 1) // 2])


def _ratio_of_medians(p: np.ndarray, g: np.ndarray) -> float:
    """Return the scale that brings one median to the other, or 1 if the predicted one is 0."""
    return _lower_median(g) / (_lower_median(p) or _lower_median(g))


def _fit_scale_irls(p: np.ndarray, g: np.ndarray) -> tuple[float, float]:
    """Fit the scale of least absolute error in ten steps of reweighted least squares, from the ratio of the means."""
    if not p.any():
        return 1.0, 0.0
    scale = g.mean() / p.mean() if p.mean() else (p @ g) / (p @ p)
    for _ in range(10):
        weights = 1 / (np.abs(scale * p - g) + 1e-8)
        scale = (weights * p * g).sum() / (weights * p * p).sum()
    return max(float(scale), 1e-3), 0.0


def _fit_least_squares(p: np.ndarray, g: np.ndarray) -> tuple[float, float]:
    unit = unit_of(p)  # a column that is small beside the ones would count as dependent
    scale, shift = np.linalg.lstsq(np.stack([p / unit, np.ones_like(p)], 1), g, rcond=None)[0]
    return float(scale / unit), float(shift)


def _fit_least_absolute(p: np.ndarray, g: np.ndarray) -> tuple[float, float]:
    start = [_ratio_of_medians(p, g), 0.0]
    solution = minimize(lambda st: np.abs(st[0] * p + st[1] - g).sum(), start, method="BFGS")
    return float(solution.x[0]), float(solution.x[1])


def _fit_least_absolute_by_adam(p: np.ndarray, g: np.ndarray) -> tuple[float, float]:
    """Fit in float32, as published: scale and shift move by at most ADAM_STEPS * ADAM_RATE."""
    predicted, truth = torch.from_numpy(p).float(), torch.from_numpy(g).float()
    both = [torch.tensor([start], requires_grad=True) for start in (_ratio_of_medians(p, g), 0.0)]
    optimizer, before = torch.optim.Adam(both, lr=ADAM_RATE), None
    for _ in range(ADAM_STEPS):
        optimizer.zero_grad()
        loss = (both[0] * predicted + both[1] - truth).abs().sum()
        loss.backward()
        optimizer.step()
        if before is not None and abs(before - loss.item()) < ADAM_TOLERANCE:
            break
        before = loss.item()
    return both[0].item(), both[1].item()


ALIGNMENTS: dict[str, Callable[..., tuple[float, float]]] = {  # (predicted, true) -> scale, shift
    "median": lambda p, g: (_ratio_of_medians(p, g), 0.0),
    "scale_irls": _fit_scale_irls,
    "lstsq": _fit_least_squares,
    "lad": _fit_least_absolute,
    "lad2": _fit_least_absolute_by_adam,
    "metric": lambda p, g: (1.0, 0.0),
}
DEPTH_METRICS = ("abs_rel", "sq_rel", "rmse", "log_rmse", "delta_1", "delta_2", "delta_3")


def depth_metrics(
    pred: Array,
    gt: Array,
    align: str = "median",
    max_depth: float | int | None = None,
    post_clip_max: float | int | None = None,
) -> dict[str, Any]:
    """Compute errors of predicted depth over the valid pixels of one image, or of all images of a video together.

    A pixel is valid if 0 < gt, and gt < `max_depth` if there is such a bound. Predictions that are over a thousand times
    larger or smaller than the truth are brought to its unit before an alignment, and both to 1 if that is a million times
    away, since some search in steps of their own.
    Predictions whose median is 0 keep their scale where the median sets it or starts the search.

    **Arguments**

    - `pred`: predicted depth p, any shape.
    - `gt`: true depth g, the same shape; 0 marks pixels without truth.
    - `align`: default 'median'. One of
      'median' (ratio of medians),
      'scale_irls' (scale of least absolute error, ten steps of reweighted least squares, accurate to 1e-2),
      'lstsq' (scale and shift by least squares),
      'lad' (scale and shift of least absolute error by BFGS),
      'lad2' (the same by the published 1000 steps of Adam in float32),
      'metric' (no alignment).
    - `max_depth`: > 0, bound of valid depth, in the unit of `gt`; default: no bound.
    - `post_clip_max`: > 0, aligned predictions above are set to it; default: no bound.

    **Returns** `abs_rel` = mean |p - g| / g, `sq_rel` = mean (p - g)^2 / g, `rmse`, `log_rmse`; `delta_k`, the share of pixels
    with max(p / g, g / p) < 1.25^k, k = 1, 2, 3; `valid_pixels`. All are 0 if no pixel is valid.

    **Raises**

    - `ValueError`: shapes differ; NaN, infinity or a number beyond 1e100; an unknown alignment; a bound that is not > 0; errors
      that float64 does not hold.

    **Reference** Eigen, Puhrsch and Fergus, NeurIPS 2014; alignments as in the evaluation of π³, arXiv:2507.13347.
    """
    require(align in ALIGNMENTS, "align", f"be one of {list(ALIGNMENTS)}", align)
    for name, bound in (("max_depth", max_depth), ("post_clip_max", post_clip_max)):
        require(bound is None or bound > 0, name, "be None or > 0", bound)
    p, g = to_float64("pred", pred), to_float64("gt", gt)
    require(p.shape == g.shape, "pred", f"have the shape of `gt`, {g.shape}", p.shape)
    valid = (g > 0) & (g < max_depth) if max_depth is not None else g > 0
    p, g = p[valid], g[valid]
    if not len(g):
        return dict.fromkeys(DEPTH_METRICS, 0.0) | {"valid_pixels": 0}
    with np.errstate(all="ignore"):  # what is not finite is named below
        if align != "metric":
            p = _align(p, g, align)
        if post_clip_max is not None:
            p = np.minimum(p, post_clip_max)
        errors = _depth_errors(p, g)
    require_finite(errors)
    return errors | {"valid_pixels": len(g)}


def _align(p: np.ndarray, g: np.ndarray, align: str) -> np.ndarray:
    """Return predictions in the scale, and shift, of the truth."""
    size, some = _lower_median(g), np.abs(p[p != 0])
    if len(some) and not size / FAR <= _lower_median(some) <= size * FAR:
        p = p / _lower_median(some) * size
    unit = 1.0 if 1 / FAR**2 <= size <= FAR**2 else size
    scale, shift = ALIGNMENTS[align](p / unit, g / unit)
    return scale * p + shift * unit


def _depth_errors(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    error = p - g
    positive = np.maximum(p, LEAST_DEPTH)
    ratio = np.maximum(positive / g, g / positive)
    return {
        "abs_rel": float((np.abs(error) / g).mean()),
        "sq_rel": float((error**2 / g).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "log_rmse": float(np.sqrt((np.log(positive / g) ** 2).mean())),
    } | {f"delta_{k}": float((ratio < 1.25**k).mean()) for k in (1, 2, 3)}
