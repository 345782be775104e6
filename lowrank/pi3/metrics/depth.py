"""pi3.metrics.depth"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from lowrank.pi3.metrics.alignment import Array, _double

STEPS, TOLERANCE = 1000, 1e-6  # of lad2
LEAST = 1e-5  # of a depth whose logarithm or ratio is taken


def _median(values: np.ndarray) -> float:
    """The lower one of the two middle values of an even number."""
    return float(np.partition(values, (len(values) - 1) // 2)[(len(values) - 1) // 2])


def _ratio_of_medians(p: np.ndarray, g: np.ndarray) -> float:
    return _median(g) / _median(p)


def _irls(p: np.ndarray, g: np.ndarray) -> tuple[float, float]:
    scale = g.mean() / p.mean()
    for _ in range(10):
        weights = 1 / (np.abs(scale * p - g) + 1e-8)
        scale = (weights * p * g).sum() / (weights * p * p).sum()
    return max(float(scale), 1e-3), 0.0


def _least_squares(p: np.ndarray, g: np.ndarray) -> tuple[float, float]:
    scale, shift = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), g, rcond=None)[0]
    return float(scale), float(shift)


def _least_absolute(p: np.ndarray, g: np.ndarray) -> tuple[float, float]:
    found = minimize(lambda st: np.abs(st[0] * p + st[1] - g).sum(), [_ratio_of_medians(p, g), 0.0], method="BFGS")
    return float(found.x[0]), float(found.x[1])


def _least_absolute_by_adam(p: np.ndarray, g: np.ndarray, rate: float = 1e-4) -> tuple[float, float]:
    """In float32, as published: scale and shift can move by STEPS * rate at most."""
    single, truth = torch.from_numpy(p).float(), torch.from_numpy(g).float()
    both = [torch.tensor([start], requires_grad=True) for start in (_ratio_of_medians(p, g), 0.0)]
    optimizer, before = torch.optim.Adam(both, lr=rate), None
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (both[0] * single + both[1] - truth).abs().sum()
        loss.backward()
        optimizer.step()
        if before is not None and abs(before - loss.item()) < TOLERANCE:
            break
        before = loss.item()
    return both[0].item(), both[1].item()


ALIGNMENTS: dict[str, Callable[..., tuple[float, float]]] = {  # (predicted, true) -> scale, shift
    "median": lambda p, g: (_ratio_of_medians(p, g), 0.0),
    "scale_irls": _irls,
    "lstsq": _least_squares,
    "lad": _least_absolute,
    "lad2": _least_absolute_by_adam,
    "metric": lambda p, g: (1.0, 0.0),
}
DEPTH = ("abs_rel", "sq_rel", "rmse", "log_rmse", "delta_1", "delta_2", "delta_3")


def depth_metrics(
    pred: Array,
    gt: Array,
    align: str = "median",
    max_depth: float | int | None = None,
    post_clip_max: float | int | None = None,
) -> dict[str, Any]:
    """Errors of predicted depth over the valid pixels of one image, or of all images of a video together.

    **Arguments:** `pred`, `gt`: the same shape, any. Valid is 0 < gt, and gt < `max_depth` where that is given. `align`:
    'median' (ratio of medians), 'scale_irls' (scale of least absolute error, ten steps of reweighted least squares, good to
    1e-2), 'lstsq' (scale and shift), 'lad' and 'lad2' (scale and shift of least absolute error, by BFGS, and by the published
    1000 steps of Adam in float32), 'metric' (none). `post_clip_max`: what aligned predictions are cut to.

    **Returns:** `abs_rel` = mean |p - g| / g, `sq_rel` = mean (p - g)^2 / g, `rmse`, `log_rmse`; `delta_k`, the share with
    max(p / g, g / p) < 1.25^k, k = 1, 2, 3; `valid_pixels`. Zeros where no pixel is valid.

    **Raises:** `ValueError`: shapes that differ, NaN, an unknown alignment.

    **Reference:** Eigen, Puhrsch and Fergus, NeurIPS 2014; alignments as in the evaluation of π³, arXiv:2507.13347.
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"`align` must be one of {list(ALIGNMENTS)}, got {align!r}.")
    p, g = _double("pred", pred), _double("gt", gt)
    if p.shape != g.shape:
        raise ValueError(f"`pred` must have the shape of `gt`, {g.shape}, got {p.shape}.")
    valid = (g > 0) & (g < max_depth) if max_depth is not None else g > 0
    p, g = p[valid], g[valid]
    if not len(g):
        return dict.fromkeys(DEPTH, 0.0) | {"valid_pixels": 0}
    scale, shift = ALIGNMENTS[align](p, g)
    p = scale * p + shift
    if post_clip_max is not None:
        p = np.minimum(p, post_clip_max)
    error = p - g
    found = {"abs_rel": np.abs(error) / g, "sq_rel": error**2 / g}
    metrics = {name: float(values.mean()) for name, values in found.items()} | {
        "rmse": float(np.sqrt((error**2).mean()))
    }
    p = np.maximum(p, LEAST)
    ratio = np.maximum(p / g, g / p)
    metrics["log_rmse"] = float(np.sqrt((np.log(p / g) ** 2).mean()))
    return metrics | {f"delta_{k}": float((ratio < 1.25**k).mean()) for k in (1, 2, 3)} | {"valid_pixels": len(g)}
