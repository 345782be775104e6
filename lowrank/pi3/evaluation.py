"""How good a π³ is at its four tasks: depth of single images and of videos, poses, points. One row per sequence, one per task.

The protocols, alignments and sizes are the published ones; see `lowrank.pi3.metrics.poses` for what is measured.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank.nn.batches import device_of, evaluating
from lowrank.pi3.data import Scene
from lowrank.pi3.metrics.depth import DEPTH, depth_metrics
from lowrank.pi3.metrics.points import point_metrics
from lowrank.pi3.metrics.poses import angle_summary, pair_angles, pose_distance
from lowrank.pi3.model import autocast

CHUNK = 32  # single images in one pass


@dataclass(frozen=True)
class Protocol:
    """How results of one data set are published: alignments of the two tasks of depth, what depth counts and what aligned
    depth is cut to, and the reach of ICP, in the unit of its points."""

    mono: str = "scale_irls"
    video: str = "lad2"
    max_depth: float | int | None = None
    post_clip_max: float | int | None = None
    distance: float | int = 0.1


PROTOCOLS: Mapping[str, Protocol] = {
    "scenes": Protocol(),
    "sintel": Protocol(max_depth=70, post_clip_max=70),
    "bonn": Protocol(max_depth=70),
    "tum": Protocol(max_depth=70),
    "kitti": Protocol(),
    "7scenes": Protocol(),
    "nrgbd": Protocol(),
    "scannet": Protocol(),
}


def predict(model: nn.Module, images: Tensor, precision: str = "fp32") -> dict[str, Tensor]:
    """Outputs of one forward pass over views (N, 3, H, W) of one scene, or scenes (B, N, 3, H, W), on the CPU.

    **Arguments:** `precision`: 'fp32' or 'bf16' (autocast; the heads stay in float32).
    """
    device, single = device_of(model), images.dim() == 4
    with evaluating(model), torch.no_grad(), autocast(device, precision):
        outputs = model((images[None] if single else images).to(device))
    return {name: (value[0] if single else value).cpu() for name, value in outputs.items()}


def resized(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Depth (N, H, W) in another size, cubically, not antialiased (the kernel has a = -0.75, as OpenCV's)."""
    if tuple(depth.shape[1:]) == size:
        return depth
    return functional.interpolate(depth[:, None], size=size, mode="bicubic", align_corners=False)[:, 0]


def _depth(predicted: Tensor, scene: Scene, align: str, protocol: Protocol) -> dict[str, Any]:
    assert scene.depth is not None
    own = resized(predicted, (scene.depth.shape[1], scene.depth.shape[2]))
    return depth_metrics(own, scene.depth, align, protocol.max_depth, protocol.post_clip_max)


def mono_depth(model: nn.Module, scene: Scene, protocol: Protocol, precision: str = "fp32") -> list[dict[str, Any]]:
    """`depth_metrics` of every image, each alone and aligned by itself."""
    assert scene.depth is not None
    alone = [
        predict(model, part[:, None], precision)["local_points"][:, 0, ..., 2] for part in scene.images.split(CHUNK)
    ]
    own = resized(torch.cat(alone), (scene.depth.shape[1], scene.depth.shape[2]))
    return [
        depth_metrics(one, true, protocol.mono, protocol.max_depth, protocol.post_clip_max)
        for one, true in zip(own, scene.depth, strict=True)
    ]


def video_depth(outputs: Mapping[str, Tensor], scene: Scene, protocol: Protocol) -> list[dict[str, Any]]:
    """`depth_metrics` of all views together, under one alignment."""
    return [_depth(outputs["local_points"][..., 2], scene, protocol.video, protocol)]


def poses(outputs: Mapping[str, Tensor], scene: Scene, protocol: Protocol) -> list[dict[str, Any]]:
    """`pose_distance`, and the angular errors of all pairs of views, in degrees: `rotation`, `direction`."""
    assert scene.poses is not None
    own, true = outputs["camera_poses"].double(), scene.poses.double()
    rotation, direction = pair_angles(torch.linalg.inv(own), torch.linalg.inv(true))
    return [pose_distance(own, true) | {"rotation": rotation, "direction": direction}]


def points_at(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Points (N, H, W, 3) in another size, bilinearly, antialiased."""
    if tuple(points.shape[1:3]) == size:
        return points
    channels = points.permute(0, 3, 1, 2)
    moved = functional.interpolate(channels, size=size, mode="bilinear", align_corners=False, antialias=True)
    return moved.permute(0, 2, 3, 1)


def point_map(outputs: Mapping[str, Tensor], scene: Scene, protocol: Protocol) -> list[dict[str, Any]]:
    """`point_metrics` where depth is known, in the size of the truth."""
    true = scene.points
    assert true is not None
    assert scene.depth is not None
    own = points_at(outputs["points"], (true.shape[1], true.shape[2]))
    return [point_metrics(own, true, scene.depth > 1e-4, protocol.distance)]


def _weighted(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means weighted by valid pixels."""
    weights = np.array([row["valid_pixels"] for row in rows], dtype=np.float64)
    if not weights.sum():
        return dict.fromkeys(DEPTH, 0.0) | {"valid_pixels": 0}
    means = {name: float(np.average([row[name] for row in rows], weights=weights)) for name in DEPTH}
    return means | {"valid_pixels": int(weights.sum())}


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _trajectories(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means of distances over sequences; angles of all pairs of all sequences together."""
    pooled = [np.concatenate([row[name] for row in rows]) for name in ("rotation", "direction")]
    return _means([{name: row[name] for name in ("ate", "rpe_trans", "rpe_rot")} for row in rows]) | angle_summary(
        *pooled
    )


@dataclass(frozen=True)
class _Task:
    needs: Callable[[Scene], bool]
    rows: Callable[..., list[dict[str, Any]]]
    total: Callable[[list[dict[str, Any]]], dict[str, float]]


TASKS: Mapping[str, _Task] = {
    "mono_depth": _Task(lambda scene: scene.depth is not None, mono_depth, _weighted),
    "video_depth": _Task(lambda scene: scene.depth is not None and len(scene.images) > 1, video_depth, _weighted),
    "pose": _Task(lambda scene: scene.poses is not None and len(scene.images) > 1, poses, _trajectories),
    "points": _Task(lambda scene: scene.points is not None, point_map, _means),
}


def evaluate_pi3(
    model: nn.Module,
    scenes: Iterable[Scene],
    protocol: Protocol,
    tasks: Iterable[str] = tuple(TASKS),
    *,
    precision: str = "fp32",
) -> dict[str, dict[str, float]]:
    """Metrics of each task over sequences; views of a sequence pass together but for `mono_depth`, which sees each alone.

    **Arguments:** `scenes`: with the truth that the tasks need; a sequence without it does not count in a task, nor does one of
    a single view where several are needed. `protocol`: of the data set, see `PROTOCOLS`. `tasks`: keys of `TASKS`.
    `precision`: 'fp32' or 'bf16'.

    **Returns:** task -> metrics, with the number of `sequences` that count. Depth is weighted by valid pixels; angles are of
    all pairs of all sequences; all else are plain means over sequences.

    **Raises:** `ValueError`: an unknown task, or one for which no sequence has the truth.
    """
    tasks = list(tasks)
    if unknown := sorted(set(tasks) - set(TASKS)):
        raise ValueError(f"`tasks` must be among {sorted(TASKS)}, got {unknown}.")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
    counts = dict.fromkeys(tasks, 0)
    for scene in scenes:
        fitting = [name for name in tasks if TASKS[name].needs(scene)]
        outputs = predict(model, scene.images, precision) if set(fitting) - {"mono_depth"} else {}
        for name in fitting:
            found = (
                mono_depth(model, scene, protocol, precision)
                if name == "mono_depth"
                else TASKS[name].rows(outputs, scene, protocol)
            )
            rows[name] += found
            counts[name] += 1
    if empty := next((name for name in tasks if not rows[name]), None):
        raise ValueError(f"`scenes` must hold a sequence with the truth that task {empty!r} needs, got none.")
    return {name: TASKS[name].total(rows[name]) | {"sequences": counts[name]} for name in tasks}
