"""How good predicted depth, camera poses and points are: the published protocols, in float64.

Predictions have a free scale (and frame), so they are aligned with the truth first; the names of alignments say what is done.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.spatial import KDTree
from torch import Tensor

Array = Tensor | np.ndarray
LEAST = 1e-5  # of a depth whose logarithm or ratio is taken
STEPS, TOLERANCE = 1000, 1e-6  # of lad2
THRESHOLDS = (5, 15, 30)  # degrees
NEIGHBOURS = 30  # of a point, for its normal


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


def _double(what: str, values: Array) -> np.ndarray:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"`{what}` must be finite, got NaN or infinity.")
    return array


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


def _rotation(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """The rotation R of least sum |R x - y|^2 of centred points `(n, 3)`, and sum y . R x."""
    left, values, right = np.linalg.svd(y.T @ x)
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    return left * signs @ right, float((values * signs).sum())


def similarity(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Scale c, rotation R and shift t of least sum |c R x + t - y|^2, of points `(n, 3)`; scale 1 where the source has no extent.

    **Reference:** Umeyama, IEEE TPAMI 1991, eq. 40 to 42.
    """
    centre, goal = source.mean(0), target.mean(0)
    x, y = source - centre, target - goal
    rotation, agreement = _rotation(x, y)
    extent = float((x**2).sum())
    scale = agreement / extent if extent > 0 else 1.0
    return scale, rotation, goal - scale * rotation @ centre


def _poses(pred: Array, gt: Array) -> tuple[np.ndarray, np.ndarray]:
    both = _double("pred", pred), _double("gt", gt)
    for name, poses in zip(("pred", "gt"), both, strict=True):
        if poses.ndim != 3 or poses.shape[1:] != (4, 4) or len(poses) < 2:
            raise ValueError(f"`{name}` must be at least two poses, (N, 4, 4), got shape {poses.shape}.")
    if both[0].shape != both[1].shape:
        raise ValueError(f"`pred` must be as many poses as `gt`, {len(both[1])}, got {len(both[0])}.")
    return both


def _angle(rotations: np.ndarray) -> np.ndarray:
    """Degrees; by sine and cosine, so that small angles keep their digits."""
    skew = rotations - rotations.swapaxes(-1, -2)
    sine = np.linalg.norm(np.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1), axis=-1) / 2
    return np.degrees(np.arctan2(sine, (np.trace(rotations, axis1=-2, axis2=-1) - 1) / 2))


def pose_distance(pred_c2w: Array, gt_c2w: Array) -> dict[str, float]:
    """Errors of a trajectory of camera-to-world poses `(N, 4, 4)`, N >= 2, after the best similarity of its positions.

    **Returns:** `ate`: root mean square distance of the positions. Of the motion from one frame to the next, on the aligned and
    scaled trajectory: `rpe_trans`, root mean square of the error of translation, in the unit of `gt_c2w`, and `rpe_rot`, of that
    of rotation, in degrees. A trajectory without extent keeps its scale.

    **Raises:** `ValueError`: fewer than two poses, shapes, NaN.

    **Reference:** Sturm et al., IROS 2012.
    """
    pred, gt = _poses(pred_c2w, gt_c2w)
    scale, rotation, shift = similarity(pred[:, :3, 3], gt[:, :3, 3])
    aligned = pred.copy()
    aligned[:, :3, :3] = rotation @ pred[:, :3, :3]
    aligned[:, :3, 3] = scale * pred[:, :3, 3] @ rotation.T + shift
    moved, meant = (np.linalg.inv(poses[:-1]) @ poses[1:] for poses in (aligned, gt))
    error = np.linalg.inv(meant) @ moved

    def rms(values: np.ndarray) -> float:
        return float(np.sqrt((values**2).mean()))

    return {
        "ate": rms(np.linalg.norm(aligned[:, :3, 3] - gt[:, :3, 3], axis=1)),
        "rpe_trans": rms(np.linalg.norm(error[:, :3, 3], axis=1)),
        "rpe_rot": rms(_angle(error[:, :3, :3])),
    }


def pair_angles(pred_w2c: Array, gt_w2c: Array) -> tuple[np.ndarray, np.ndarray]:
    """Degrees between predicted and true relative poses of all pairs of views: of rotations, and of the directions of
    translations, up to sign. A direction that one of the two lacks is 90 degrees off, one that both lack 0."""
    pred, gt = _poses(pred_w2c, gt_w2c)
    first, second = np.triu_indices(len(pred), 1)
    relative = [poses[second] @ np.linalg.inv(poses[first]) for poses in (pred, gt)]
    rotation = _angle(relative[0][:, :3, :3].swapaxes(1, 2) @ relative[1][:, :3, :3])
    u, v = (poses[:, :3, 3] for poses in relative)
    lengths = np.linalg.norm(u, axis=1), np.linalg.norm(v, axis=1)
    across, along = np.linalg.norm(np.cross(u, v), axis=1), np.abs((u * v).sum(1))
    still = [length <= 1e-12 for length in lengths]
    direction = np.where(
        still[0] & still[1], 0.0, np.where(still[0] | still[1], 90.0, np.degrees(np.arctan2(across, along)))
    )
    return rotation, direction


def angle_summary(rotation: np.ndarray, direction: np.ndarray) -> dict[str, float]:
    """Shares of pairs in percent: `racc@T` of rotation errors below T degrees, `tacc@T` of direction errors, and `auc@T`, the
    mean over k = 1 ... T of the share with both below k; an error of exactly T counts."""
    worst, found = np.maximum(rotation, direction), {}
    for top in THRESHOLDS:
        found[f"racc@{top}"] = 100 * float((rotation < top).mean())
        found[f"tacc@{top}"] = 100 * float((direction < top).mean())
        counts, _ = np.histogram(worst, bins=np.arange(top + 1))
        found[f"auc@{top}"] = 100 * float((np.cumsum(counts) / len(worst)).mean())
    return found


def pose_angles(pred_w2c: Array, gt_w2c: Array) -> dict[str, float]:
    """`angle_summary` of `pair_angles` of one sequence of world-to-camera poses `(N, 4, 4)`, N >= 2; to pool sequences,
    concatenate their pairs.

    **Reference:** Wang et al., PoseDiffusion, ICCV 2023.
    """
    return angle_summary(*pair_angles(pred_w2c, gt_w2c))


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
