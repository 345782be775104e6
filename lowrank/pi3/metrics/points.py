"""Errors of predicted point clouds and of their normals, after a similarity and ICP."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from lowrank.io.checks import require
from lowrank.pi3.metrics.alignment import Array, fit_rotation, fit_similarity, require_finite, to_float64

NEIGHBOURS = 30  # points that the normal of a point is estimated from, itself included
ICP_STEPS, ICP_TOLERANCE = 30, 1e-6
AVERAGES: Mapping[str, Callable[[np.ndarray], Any]] = {"mean": np.mean, "median": np.median}


def align_by_icp(source: np.ndarray, target: np.ndarray, distance: float) -> np.ndarray:
    """Move a point cloud onto another by point-to-point ICP without scale, in at most 30 steps.

    A step matches each source point with the nearest target point within `distance`; other points do not count. ICP ends if
    neither the share of matched points nor their root mean square distance changes by 1e-6.

    **Arguments**

    - `source`: `(n, 3)`, float64; it is not changed.
    - `target`: `(m, 3)`, float64.
    - `distance`: largest distance of a match, in the unit of the points.

    **Returns** the moved source, `(n, 3)`.

    **Reference** Besl and McKay, IEEE TPAMI 1992.
    """
    tree, before = KDTree(target), (np.inf, np.inf)
    for _ in range(ICP_STEPS):
        gaps, nearest = (np.asarray(part) for part in tree.query(source, distance_upper_bound=distance))
        near = np.isfinite(gaps)
        if not near.any():
            break
        now = (near.mean(), float(np.sqrt((gaps[near] ** 2).mean())))
        if abs(now[0] - before[0]) < ICP_TOLERANCE and abs(now[1] - before[1]) < ICP_TOLERANCE:
            break
        before = now
        x, y = source[near], target[nearest[near]]
        rotation, _ = fit_rotation(x - x.mean(0), y - y.mean(0))
        source = source @ rotation.T + y.mean(0) - rotation @ x.mean(0)
    return source


def estimate_normals(points: np.ndarray) -> np.ndarray:
    """Return the direction of least spread of the 30 nearest neighbours of each point, `(n, 3)`; its sign is arbitrary."""
    _, nearest = KDTree(points).query(points, k=min(NEIGHBOURS, len(points)))
    neighbours = points[np.asarray(nearest)]
    centred = neighbours - neighbours.mean(1, keepdims=True)
    return np.linalg.eigh(centred.swapaxes(1, 2) @ centred)[1][:, :, 0]


def point_metrics(pred: Array, gt: Array, mask: Array, distance: float | int = 0.1) -> dict[str, float]:
    """Compute errors of a point cloud against the true one, whose points correspond pixel by pixel.

    The best similarity of corresponding points moves the prediction, then ICP within `distance`.

    **Arguments**

    - `pred`: predicted points, `(..., 3)`.
    - `gt`: true points, the same shape.
    - `mask`: `(...)`, bool; True where points count. At least three.
    - `distance`: > 0, largest distance of a match in ICP, in the unit of `gt`; default 0.1.

    **Returns** mean and median (`acc_mean`, `acc_median`, ...) of `acc`, the distance from each predicted point to the nearest
    true one; `comp`, from each true point to the nearest predicted one; `nc1` and `nc2`, |cosine| of the normals at the same
    pairs; `nc`, the mean of `nc1` and `nc2`.

    **Raises**

    - `ValueError`: shapes differ; NaN or infinity; fewer than three points; a distance that is not > 0.

    **Reference** Aanæs et al., IJCV 2016; the protocol of π³, arXiv:2507.13347.
    """
    require(distance > 0, "distance", "be > 0", distance)
    p, g = _select_valid(pred, gt, mask)
    scale, rotation, shift = fit_similarity(p, g)
    p = align_by_icp(scale * p @ rotation.T + shift, g, distance)
    predicted_normals, true_normals = estimate_normals(p), estimate_normals(g)
    acc, nearest_true = KDTree(g).query(p)
    comp, nearest_predicted = KDTree(p).query(g)
    errors = {
        "acc": acc,
        "comp": comp,
        "nc1": np.abs((true_normals[nearest_true] * predicted_normals).sum(1)),
        "nc2": np.abs((predicted_normals[nearest_predicted] * true_normals).sum(1)),
    }
    metrics = {
        f"{name}_{average}": float(function(values))
        for name, values in errors.items()
        for average, function in AVERAGES.items()
    }
    metrics |= {f"nc_{name}": (metrics[f"nc1_{name}"] + metrics[f"nc2_{name}"]) / 2 for name in AVERAGES}
    require_finite(metrics)
    return metrics


def _select_valid(pred: Array, gt: Array, mask: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted and the true points at True pixels, `(n, 3)` each."""
    valid = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask, dtype=bool)
    shapes = tuple(pred.shape), tuple(gt.shape), (*valid.shape, 3)
    if len(set(shapes)) > 1:
        raise ValueError(
            f"`pred`, `gt` and `mask` must be of one shape (..., 3), (..., 3) and (...), got {shapes[0]}, {shapes[1]} and "
            f"{valid.shape}."
        )
    require(int(valid.sum()) >= 3, "mask", "keep at least three points", int(valid.sum()))
    p, g = (
        to_float64(name, points[torch.from_numpy(valid) if isinstance(points, Tensor) else valid])
        for name, points in (("pred", pred), ("gt", gt))
    )
    return p, g
