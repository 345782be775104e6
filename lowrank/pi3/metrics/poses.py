"""Errors of camera trajectories, and angles between relative poses of pairs of views."""

import numpy as np

from lowrank.io.checks import require
from lowrank.pi3.metrics.alignment import Array, fit_similarity, require_finite, to_float64, unit_of

ANGLE_THRESHOLDS = (5, 15, 30)  # degrees
RIGID = 0.1  # how far an entry of R^T R may be from the identity: more than half precision makes it
STILL = 1e-12  # a translation, relative to the positions: less than float64 tells from none


def _check_poses(pred: Array, gt: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return both trajectories in float64 if they are rigid motions of the right shapes."""
    both = to_float64("pred", pred), to_float64("gt", gt)
    for name, poses in zip(("pred", "gt"), both, strict=True):
        if poses.ndim != 3 or poses.shape[1:] != (4, 4) or len(poses) < 2:
            raise ValueError(f"`{name}` must be at least two poses, (N, 4, 4), got shape {poses.shape}.")
        rigid = _is_rigid(poses)
        if not rigid.all():
            index = int(np.argmin(rigid))
            rule = "be rigid motions, [R, t] above [0, 0, 0, 1] with a rotation R"
            require(False, name, rule, f"{poses[index].tolist()} at {index}")
    require(len(both[0]) == len(both[1]), "pred", f"be as many poses as `gt`, {len(both[1])}", len(both[0]))
    return both


def _is_rigid(poses: np.ndarray) -> np.ndarray:
    """Return for each pose whether it is a rotation and a translation, up to half precision."""
    rotations = poses[:, :3, :3].clip(-2, 2)  # the products of larger entries may overflow, and are no rotations either
    square = np.abs(rotations.swapaxes(1, 2) @ rotations - np.eye(3)).max((1, 2)) <= RIGID
    last = np.abs(poses[:, 3] - np.array([0.0, 0.0, 0.0, 1.0])).max(1) <= RIGID
    return square & last & (np.linalg.det(rotations) > 0)


def _angle(rotations: np.ndarray) -> np.ndarray:
    """Return the angles of rotations in degrees, by sine and cosine, so that small angles keep their digits."""
    skew = rotations - rotations.swapaxes(-1, -2)
    sine = np.linalg.norm(np.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1), axis=-1) / 2
    return np.degrees(np.arctan2(sine, (np.trace(rotations, axis1=-2, axis2=-1) - 1) / 2))


def pose_distance(pred_c2w: Array, gt_c2w: Array) -> dict[str, float]:
    """Compute the errors of a camera trajectory after the best similarity of its positions.

    A predicted trajectory that stays in one place keeps its scale.

    **Arguments**

    - `pred_c2w`: predicted camera-to-world poses, `(N, 4, 4)`, N >= 2.
    - `gt_c2w`: true camera-to-world poses, the same shape.

    **Returns** `ate`, the root mean square distance of the positions. Then errors of the motion from one view to the next, on
    the aligned trajectory: `rpe_trans`, root mean square error of translation in the unit of `gt_c2w`, and `rpe_rot`, of
    rotation in degrees.

    **Raises**

    - `ValueError`: fewer than two poses; other shapes; NaN or infinity; a pose that is no rigid motion.

    **Reference** Sturm et al., IROS 2012.
    """
    pred, gt = _check_poses(pred_c2w, gt_c2w)
    scale, rotation, shift = fit_similarity(pred[:, :3, 3], gt[:, :3, 3])
    aligned = pred.copy()
    aligned[:, :3, :3] = rotation @ pred[:, :3, :3]
    aligned[:, :3, 3] = scale * pred[:, :3, 3] @ rotation.T + shift
    motion, true_motion = (np.linalg.inv(poses[:-1]) @ poses[1:] for poses in (aligned, gt))
    error = np.linalg.inv(true_motion) @ motion

    def rms(values: np.ndarray) -> float:
        return float(np.sqrt((values**2).mean()))

    errors = {
        "ate": rms(np.linalg.norm(aligned[:, :3, 3] - gt[:, :3, 3], axis=1)),
        "rpe_trans": rms(np.linalg.norm(error[:, :3, 3], axis=1)),
        "rpe_rot": rms(_angle(error[:, :3, :3])),
    }
    require_finite(errors)
    return errors


def pair_angles(pred_w2c: Array, gt_w2c: Array) -> tuple[np.ndarray, np.ndarray]:
    """Compute the angles between predicted and true relative poses of all pairs of views.

    If one of two translations has length 0, up to 1e-12 of the positions, the angle of their directions is 90 degrees; if both
    have, it is 0.

    **Arguments**

    - `pred_w2c`: predicted world-to-camera poses, `(N, 4, 4)`, N >= 2.
    - `gt_w2c`: true world-to-camera poses, the same shape.

    **Returns** two arrays `(N (N - 1) / 2,)` in degrees: angles of rotations, and of directions of translations up to sign.

    **Raises**

    - `ValueError`: fewer than two poses; other shapes; NaN or infinity; a pose that is no rigid motion.
    """
    pred, gt = _check_poses(pred_w2c, gt_w2c)
    first, second = np.triu_indices(len(pred), 1)
    relative = [poses[second] @ np.linalg.inv(poses[first]) for poses in (pred, gt)]
    rotation = _angle(relative[0][:, :3, :3].swapaxes(1, 2) @ relative[1][:, :3, :3])
    u, v = (motions[:, :3, 3] / unit_of(poses[:, :3, 3]) for motions, poses in zip(relative, (pred, gt), strict=True))
    still = [np.linalg.norm(motion, axis=1) <= STILL for motion in (u, v)]
    across, along = np.linalg.norm(np.cross(u, v), axis=1), np.abs((u * v).sum(1))
    direction = np.where(
        still[0] & still[1], 0.0, np.where(still[0] | still[1], 90.0, np.degrees(np.arctan2(across, along)))
    )
    return rotation, direction


def angle_summary(rotation: np.ndarray, direction: np.ndarray) -> dict[str, float]:
    """Summarise angular errors of pairs of views at the thresholds T = 5, 15 and 30 degrees.

    **Arguments**

    - `rotation`: errors of relative rotations, `(pairs,)`, degrees; at least one.
    - `direction`: errors of directions of relative translations, `(pairs,)`, degrees.

    **Returns** shares of pairs in percent: `racc@T`, rotation error below T; `tacc@T`, direction error below T; `auc@T`, the
    mean over k = 1 ... T of the share with both errors below k, in which an error of exactly T counts.

    **Raises**

    - `ValueError`: no pair; lengths that differ; NaN or infinity.

    **Reference** Wang et al., PoseDiffusion, ICCV 2023.
    """
    rotation, direction = to_float64("rotation", rotation), to_float64("direction", direction)
    require(
        rotation.shape == direction.shape,
        "direction",
        f"have the shape of `rotation`, {rotation.shape}",
        direction.shape,
    )
    require(rotation.size > 0, "rotation", "have at least one pair", rotation.size)
    worst, summary = np.maximum(rotation, direction), {}
    for top in ANGLE_THRESHOLDS:
        summary[f"racc@{top}"] = 100 * float((rotation < top).mean())
        summary[f"tacc@{top}"] = 100 * float((direction < top).mean())
        counts, _ = np.histogram(worst, bins=np.arange(top + 1))
        summary[f"auc@{top}"] = 100 * float((np.cumsum(counts) / len(worst)).mean())
    return summary
