"""Evaluate π³ in its four tasks: depth of single images and of videos, poses, points.

Protocols, alignments and sizes are the published ones. `lowrank.pi3.metrics` computes the errors.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.io.checks import require
from lowrank.pi3.data import Scene
from lowrank.pi3.metrics.depth import DEPTH_METRICS, depth_metrics
from lowrank.pi3.metrics.points import point_metrics
from lowrank.pi3.metrics.poses import angle_summary, pair_angles, pose_distance
from lowrank.pi3.predictions import predict, resize_depth, resize_points

IMAGES_PER_PASS = 32  # of single images
LEAST_DEPTH_OF_POINTS = 1e-4  # points with less true depth do not count


@dataclass(frozen=True)
class Protocol:
    """Hold how results of one data set are published.

    **Arguments**

    - `mono`: alignment of the depth of single images, see `depth_metrics`; default 'scale_irls'.
    - `video`: alignment of the depth of videos; default 'lad2'.
    - `max_depth`: bound of valid depth, in the unit of the data; default: no bound.
    - `post_clip_max`: aligned depth above is set to it; default: no bound.
    - `distance`: largest distance of a match in ICP, in the unit of the points; default 0.1.
    """

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


Outputs = Mapping[str, Tensor]  # of `Pi3`, without the axis of scenes
MetricRows = list[dict[str, Any]]


def mono_depth_rows(model: nn.Module, scene: Scene, protocol: Protocol, precision: str = "fp32") -> MetricRows:
    """Compute `depth_metrics` of every image, each passed and aligned alone.

    **Arguments**

    - `model`: a π³.
    - `scene`: with depth.
    - `protocol`: of the data set.
    - `precision`: 'fp32' or 'bf16', see `predict`; default 'fp32'.

    **Returns** one row per image.
    """
    assert scene.depth is not None
    alone = [
        predict(model, part[:, None], precision)["local_points"][:, 0, ..., 2]
        for part in scene.images.split(IMAGES_PER_PASS)
    ]
    depth = resize_depth(torch.cat(alone), (scene.depth.shape[1], scene.depth.shape[2]))
    return [
        depth_metrics(one, true, protocol.mono, protocol.max_depth, protocol.post_clip_max)
        for one, true in zip(depth, scene.depth, strict=True)
    ]


def _video_depth_rows(outputs: Outputs, scene: Scene, protocol: Protocol) -> MetricRows:
    """Compute `depth_metrics` of all views together, under one alignment."""
    assert scene.depth is not None
    depth = resize_depth(outputs["local_points"][..., 2], (scene.depth.shape[1], scene.depth.shape[2]))
    return [depth_metrics(depth, scene.depth, protocol.video, protocol.max_depth, protocol.post_clip_max)]


def _pose_rows(outputs: Outputs, scene: Scene, protocol: Protocol) -> MetricRows:
    """Compute `pose_distance`, and `pair_angles` as `rotation` and `direction`."""
    assert scene.poses is not None
    predicted, true = outputs["camera_poses"].double(), scene.poses.double()
    distances = pose_distance(predicted, true)  # refuses what has no inverse
    rotation, direction = pair_angles(torch.linalg.inv(predicted), torch.linalg.inv(true))
    return [distances | {"rotation": rotation, "direction": direction}]


def _point_rows(outputs: Outputs, scene: Scene, protocol: Protocol) -> MetricRows:
    """Compute `point_metrics` in the size of the truth, over pixels with known depth."""
    true = scene.points
    assert true is not None
    assert scene.depth is not None
    predicted = resize_points(outputs["points"], (true.shape[1], true.shape[2]))
    return [point_metrics(predicted, true, scene.depth > LEAST_DEPTH_OF_POINTS, protocol.distance)]


def _weighted_means(rows: MetricRows) -> dict[str, float]:
    """Average over rows, weighted by valid pixels."""
    weights = np.array([row["valid_pixels"] for row in rows], dtype=np.float64)
    if not weights.sum():
        return dict.fromkeys(DEPTH_METRICS, 0.0) | {"valid_pixels": 0}
    means = {name: float(np.average([row[name] for row in rows], weights=weights)) for name in DEPTH_METRICS}
    return means | {"valid_pixels": int(weights.sum())}


def _means(rows: MetricRows) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _pose_totals(rows: MetricRows) -> dict[str, float]:
    """Average distances over sequences, and summarise the angles of all pairs of all sequences together."""
    pooled = [np.concatenate([row[name] for row in rows]) for name in ("rotation", "direction")]
    distances = [{name: row[name] for name in ("ate", "rpe_trans", "rpe_rot")} for row in rows]
    return _means(distances) | angle_summary(*pooled)


@dataclass(frozen=True)
class _GeometryTask:
    """Hold which scenes have the truth of a task, the rows of one scene, and the metrics of all rows.

    `rows` is None for the one task that passes each image alone.
    """

    fits: Callable[[Scene], bool]
    rows: Callable[[Outputs, Scene, Protocol], MetricRows] | None
    total: Callable[[MetricRows], dict[str, float]]


GEOMETRY_TASKS: Mapping[str, _GeometryTask] = {
    "mono_depth": _GeometryTask(lambda scene: scene.depth is not None, None, _weighted_means),
    "video_depth": _GeometryTask(
        lambda scene: scene.depth is not None and len(scene.images) > 1, _video_depth_rows, _weighted_means
    ),
    "pose": _GeometryTask(lambda scene: scene.poses is not None and len(scene.images) > 1, _pose_rows, _pose_totals),
    "points": _GeometryTask(lambda scene: scene.points is not None, _point_rows, _means),
}


def evaluate_pi3(
    model: nn.Module,
    scenes: Iterable[Scene],
    protocol: Protocol,
    tasks: Iterable[str] = tuple(GEOMETRY_TASKS),
    *,
    precision: str = "fp32",
) -> dict[str, dict[str, float]]:
    """Compute the metrics of each task over sequences.

    The views of a sequence pass together, except for 'mono_depth', in which each passes alone. A sequence without the truth of
    a task does not count in it, nor does a sequence of one view if the task needs several.

    **Arguments**

    - `model`: a π³.
    - `scenes`: the sequences; an iterator is read once.
    - `protocol`: of the data set, see `PROTOCOLS`.
    - `tasks`: keys of `GEOMETRY_TASKS`; default: all.
    - `precision`: 'fp32' or 'bf16', see `predict`; default 'fp32'.

    **Returns** task -> metrics, with the number of `sequences` that count. Depth is weighted by valid pixels. Angles come
    from all pairs of all sequences. All other metrics are plain means over sequences.

    **Raises**

    - `ValueError`: an unknown task; a task whose truth no sequence has.
    """
    tasks = list(tasks)
    unknown = sorted(set(tasks) - set(GEOMETRY_TASKS))
    require(not unknown, "tasks", f"be among {sorted(GEOMETRY_TASKS)}", unknown)
    rows: dict[str, MetricRows] = {name: [] for name in tasks}
    counts = dict.fromkeys(tasks, 0)
    for scene in scenes:
        fitting = {name: GEOMETRY_TASKS[name].rows for name in tasks if GEOMETRY_TASKS[name].fits(scene)}
        outputs = predict(model, scene.images, precision) if any(fitting.values()) else {}
        for name, compute in fitting.items():
            if compute is None:
                rows[name] += mono_depth_rows(model, scene, protocol, precision)
            else:
                rows[name] += compute(outputs, scene, protocol)
            counts[name] += 1
    if empty := next((name for name in tasks if not rows[name]), None):
        raise ValueError(f"`scenes` must hold a sequence with the truth that task {empty!r} needs, got none.")
    return {name: GEOMETRY_TASKS[name].total(rows[name]) | {"sequences": counts[name]} for name in tasks}
