"""How good predicted depth, camera poses and points are: the published protocols, in float64.

Predictions have a free scale (and frame), so they are aligned with the truth first; the names of alignments say what is done.
"""

import numpy as np

from lowrank.pi3.metrics.alignment import Array, _double, similarity

THRESHOLDS = (5, 15, 30)  # degrees


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
