"""pi3.metrics.points"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from lowrank.pi3.metrics.alignment import Array, _double, _rotation, similarity

NEIGHBOURS = 30  # of a point, for its normal


def closest_points(
    source: np.ndarray, target: np.ndarray, distance: float, iterations: int = 30, tolerance: float = 1e-6
) -> np.ndarray:
    """The source moved onto the target by point-to-point ICP without scale: points farther than `distance` from all others do
    not count, and it ends when neither the share that counts nor the root mean square distance changes by `tolerance`.

    **Reference:** Besl and McKay, IEEE TPAMI 1992.
    """
    tree, before = KDTree(target), (np.inf, np.inf)
    for _ in range(iterations):
        gaps, nearest = (np.asarray(found) for found in tree.query(source, distance_upper_bound=distance))
        near = np.isfinite(gaps)
        if not near.any():
            break
        now = (near.mean(), float(np.sqrt((gaps[near] ** 2).mean())))
        if abs(now[0] - before[0]) < tolerance and abs(now[1] - before[1]) < tolerance:
            break
        before = now
        x, y = source[near], target[nearest[near]]
        rotation, _ = _rotation(x - x.mean(0), y - y.mean(0))
        source = source @ rotation.T + y.mean(0) - rotation @ x.mean(0)
    return source


def normals(points: np.ndarray) -> np.ndarray:
    """The direction of least spread of the 30 nearest neighbours of each point, itself among them; its sign is free."""
    _, near = KDTree(points).query(points, k=min(NEIGHBOURS, len(points)))
    around = points[np.asarray(near)]
    own = around - around.mean(1, keepdims=True)
    return np.linalg.eigh(own.swapaxes(1, 2) @ own)[1][:, :, 0]


def point_metrics(pred: Array, gt: Array, mask: Array, distance: float | int = 0.1) -> dict[str, float]:
    """Errors of a cloud of points `(..., 3)` against the true one, pixel by pixel beside it, where `mask` `(...)` is True.

    The prediction is moved by the best similarity of corresponding points, then by ICP within `distance`, in the unit of `gt`.

    **Returns:** mean and median, `acc_mean` and so on: `acc`, from each predicted point to the nearest true one; `comp`, from
    each true point to the nearest predicted one; `nc1`, `nc2`: |cosine| of the normals at the same pairs; `nc`, the mean of
    both.

    **Raises:** `ValueError`: shapes that differ, NaN, fewer than three valid points.

    **Reference:** Aanæs et al., IJCV 2016; the protocol is that of π³, arXiv:2507.13347.
    """
    valid = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask, dtype=bool)
    shapes = tuple(pred.shape), tuple(gt.shape), (*valid.shape, 3)
    if len(set(shapes)) > 1:
        raise ValueError(
            f"`pred`, `gt` and `mask` must be of one shape (..., 3), (..., 3) and (...), got {shapes[0]}, {shapes[1]} and "
            f"{valid.shape}."
        )
    if valid.sum() < 3:
        raise ValueError(f"`mask` must keep at least three points, got {valid.sum()}.")
    p, g = (
        _double(name, points[torch.from_numpy(valid) if isinstance(points, Tensor) else valid])
        for name, points in (("pred", pred), ("gt", gt))
    )
    scale, rotation, shift = similarity(p, g)
    p = closest_points(scale * p @ rotation.T + shift, g, distance)
    own, true = normals(p), normals(g)
    acc, to_true = KDTree(g).query(p)
    comp, to_own = KDTree(p).query(g)
    found = {"acc": acc, "comp": comp}
    found["nc1"] = np.abs((true[to_true] * own).sum(1))
    found["nc2"] = np.abs((own[to_own] * true).sum(1))
    metrics = {
        f"{name}_{kind}": float(function(values)) for name, values in found.items() for kind, function in KINDS.items()
    }
    return metrics | {f"nc_{kind}": (metrics[f"nc1_{kind}"] + metrics[f"nc2_{kind}"]) / 2 for kind in KINDS}


KINDS: Mapping[str, Callable[[np.ndarray], Any]] = {"mean": np.mean, "median": np.median}
