"""Render scenes to learn geometry from: textured rooms with boxes and balls, seen by several cameras, with exact depth.

A seed decides everything. One ray goes through the centre of each pixel.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank.io.checks import require
from lowrank.pi3.solids import Solid

SPLIT_SEEDS: Mapping[str, range] = {  # what scenes of these seeds are for; no seed is in two
    "validation": range(100_000),
    "train": range(100_000, 200_000),  # to calibrate and refine on
    "test": range(200_000, 300_000),
    "pretraining": range(1_000_000, 2_000_000),  # of the small model
}
ROOM_HALF_SIDES = (2.0, 3.0), (1.2, 1.6), (2.0, 3.0)  # least and most, x, y (down), z


@dataclass(frozen=True)
class Views:
    """Hold the N rendered views of one scene, float32.

    **Arguments**

    - `images`: `(N, 3, H, W)`, in [0, 1].
    - `depth`: `(N, H, W)`, along the axis of the camera.
    - `local_points`: `(N, H, W, 3)`, in the frame of each camera; x points right, y down, z forward.
    - `points`: `(N, H, W, 3)`, in the frame of the scene.
    - `poses`: `(N, 4, 4)`, camera to world.
    - `focal`: focal length, pixels.
    """

    images: Tensor
    depth: Tensor
    local_points: Tensor
    points: Tensor
    poses: Tensor
    focal: float


def pixel_rays(height: int, width: int, focal: float) -> np.ndarray:
    """Compute directions through the centres of pixels, with z = 1: depth times direction is a local point.

    **Arguments**

    - `height`, `width`: of the image, pixels.
    - `focal`: focal length, pixels.

    **Returns** `(H, W, 3)`, float64.
    """
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([(x - width / 2) / focal, (y - height / 2) / focal, np.ones_like(x)], -1)


def look_at(position: np.ndarray, target: np.ndarray, roll: float = 0.0) -> np.ndarray:
    """Build the pose of a camera that looks at a target, with y down in the world as in the camera.

    **Arguments**

    - `position`: `(3,)`, of the camera.
    - `target`: `(3,)`, another point, not straight above or below.
    - `roll`: turn about the axis of the camera, radians; default 0.

    **Returns** `(4, 4)`, camera to world.
    """
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    axes = np.stack([right, down, forward], 1)
    cos, sin = np.cos(roll), np.sin(roll)
    pose = np.eye(4)
    pose[:3, :3] = axes @ np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    pose[:3, 3] = position
    return pose


def _random_solids(generator: np.random.Generator) -> tuple[list[Solid], np.ndarray]:
    """Return a room with three to six boxes and balls in it, the room first, and half the sides of the room."""
    half = np.array([generator.uniform(*sides) for sides in ROOM_HALF_SIDES])
    solids = [Solid.random("room", -half, half, generator)]
    for _ in range(generator.integers(3, 7)):
        size = generator.uniform(0.15, 0.5, 3)
        x, z = generator.uniform(-0.55, 0.55, 2) * half[[0, 2]]
        if generator.random() < 0.5:
            base = half[1] - 2 * size[1] if generator.random() < 0.8 else generator.uniform(-0.3, 0.3)
            low = np.array([x - size[0], base, z - size[2]])
            solids.append(Solid.random("box", low, low + 2 * size, generator))
        else:
            y = half[1] - size[0] if generator.random() < 0.8 else generator.uniform(-0.3, 0.3)
            solids.append(Solid.random("ball", np.array([x, y, z]), np.full(3, size[0]), generator))
    return solids, half


def _random_cameras(
    views: int, solids: list[Solid], half: np.ndarray, generator: np.random.Generator
) -> list[np.ndarray]:
    """Place cameras on an arc near the walls that look at the middle of the room, none in a solid."""
    start, step, poses = generator.uniform(0, 2 * np.pi), generator.uniform(0.15, 0.45) * generator.choice([-1, 1]), []
    for view in range(views):
        trials = 0
        while True:
            angle = start + step * view + generator.normal() * 0.05 * (1 + trials // 100)
            position = np.array([np.cos(angle), 0.0, np.sin(angle)]) * half * generator.uniform(0.75, 0.88)
            position[1] = generator.uniform(-0.5, 0.3)
            if all(solid.is_clear(position) for solid in solids[1:]):
                break
            trials += 1  # if solids fill the place, search ever farther along the wall
        target = np.array([0.0, 0.35, 0.0]) + generator.normal(size=3) * 0.2
        poses.append(look_at(position, target, generator.normal() * 0.05))
    return poses


def _trace(
    pose: np.ndarray, local_rays: np.ndarray, solids: list[Solid], light: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trace one view, and return its image `(3, H, W)`, depth `(H, W)` and points `(H, W, 3)`."""
    height, width = local_rays.shape[:2]
    directions = (local_rays @ pose[:3, :3].T).reshape(-1, 3)
    distances = np.stack([solid.hits(pose[:3, 3], directions) for solid in solids])
    nearest, depth = distances.argmin(0), distances.min(0)
    points = pose[:3, 3] + depth[:, None] * directions
    colours = np.empty_like(points)
    for index, solid in enumerate(solids):
        pixels = nearest == index
        colours[pixels] = solid.shade(points[pixels], light)
    image = colours.reshape(height, width, 3).transpose(2, 0, 1)
    return image, depth.reshape(height, width), points.reshape(height, width, 3)


def render_scene(seed: int, views: int = 4, height: int = 64, width: int = 64) -> Views:
    """Render the views of one random scene.

    **Arguments**

    - `seed`: int >= 0; it decides the scene and its cameras.
    - `views`: number of views, >= 1; default 4.
    - `height`, `width`: of the images, pixels, >= 1; default 64.

    **Raises**

    - `ValueError`: fewer than one view or pixel.
    """
    for name, number in (("views", views), ("height", height), ("width", width)):
        require(number >= 1, name, "be >= 1", number)
    generator = np.random.default_rng(seed)
    solids, half = _random_solids(generator)
    light = np.array([0.0, -0.9, 0.0]) * half + generator.normal(size=3) * 0.2
    focal = float(generator.uniform(0.8, 1.1) * max(height, width))
    local_rays = pixel_rays(height, width, focal)
    poses = _random_cameras(views, solids, half, generator)
    shots = [_trace(pose, local_rays, solids, light) for pose in poses]
    images, depth, points = (torch.from_numpy(np.stack(part)).float() for part in zip(*shots, strict=True))
    local = depth[..., None] * torch.from_numpy(local_rays).float()
    return Views(images, depth, local, points, torch.from_numpy(np.stack(poses)).float(), focal)
