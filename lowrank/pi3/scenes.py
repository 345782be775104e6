"""Scenes to learn geometry from: rooms with boxes and balls, textured, seen by several cameras, with exact depth and poses.

Everything is drawn from a seed. Surfaces are found exactly, one ray per pixel through its centre; colours are sums of waves in
space, so that a surface looks the same from everywhere but for the light.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROOM = (2.0, 3.0), (1.2, 1.6), (2.0, 3.0)  # half sides of the room, x, y (down), z
WAVES = 6  # of each surface's texture


@dataclass(frozen=True)
class Views:
    """Views of one scene: `images` (N, 3, H, W) in [0, 1]; `depth` (N, H, W), along the axis of the camera; `local_points`
    (N, H, W, 3) in the frame of each camera (x right, y down, z forward); `points` (N, H, W, 3) in the frame of the scene;
    `poses` (N, 4, 4), camera to world; `focal`, in pixels. float32."""

    images: Tensor
    depth: Tensor
    local_points: Tensor
    points: Tensor
    poses: Tensor
    focal: float


def rays(height: int, width: int, focal: float) -> np.ndarray:
    """Directions (H, W, 3) through the centres of pixels, with z = 1: depth times these are points."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([(x - width / 2) / focal, (y - height / 2) / focal, np.ones_like(x)], -1)


def looking(position: np.ndarray, target: np.ndarray, roll: float = 0.0) -> np.ndarray:
    """The camera-to-world pose (4, 4) of a camera that looks at a target, y down in the world as in the camera."""
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


def box_hits(origin: np.ndarray, directions: np.ndarray, low: np.ndarray, high: np.ndarray, inside: bool) -> np.ndarray:
    """Distances along rays to an axis-aligned box, from without or within; inf where a ray misses."""
    with np.errstate(divide="ignore"):
        ends = np.stack([(low - origin) / directions, (high - origin) / directions])
    enter, leave = ends.min(0).max(-1), ends.max(0).min(-1)
    return leave if inside else np.where((enter <= leave) & (enter > 1e-6), enter, np.inf)


def ball_hits(origin: np.ndarray, directions: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """Distances along rays to a ball, from without; inf where a ray misses."""
    offset, square = origin - centre, (directions**2).sum(-1)
    along = directions @ offset
    left = along**2 - square * (offset @ offset - radius**2)
    near = (-along - np.sqrt(np.maximum(left, 0.0))) / square
    return np.where((left > 0) & (near > 1e-6), near, np.inf)


@dataclass(frozen=True)
class _Thing:
    """A room, a box or a ball with its texture."""

    kind: str
    first: np.ndarray  # low corner, or centre
    second: np.ndarray  # high corner, or radius three times
    colours: np.ndarray  # (6, 3), one for each side
    waves: np.ndarray  # (WAVES, 3)
    tints: np.ndarray  # (WAVES, 3)

    def hits(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        if self.kind == "ball":
            return ball_hits(origin, directions, self.first, float(self.second[0]))
        return box_hits(origin, directions, self.first, self.second, self.kind == "room")

    def shaded(self, points: np.ndarray, light: np.ndarray) -> np.ndarray:
        """Colours (P, 3) of points on the surface, under a light."""
        centre, half = (
            (self.first, self.second)
            if self.kind == "ball"
            else ((self.first + self.second) / 2, (self.second - self.first) / 2)
        )
        scaled = (points - centre) / half
        side = np.abs(scaled).argmax(-1)
        sign = np.take_along_axis(scaled, side[:, None], 1)[:, 0] > 0
        normal = scaled if self.kind == "ball" else np.eye(3)[side] * np.where(sign, 1.0, -1.0)[:, None]
        towards = light - points
        towards /= np.linalg.norm(towards, axis=-1, keepdims=True)
        bright = 0.55 + 0.45 * np.abs((normal * towards).sum(-1))
        texture = np.sin(points @ self.waves.T) @ self.tints
        return np.clip((self.colours[2 * side + sign] + texture) * bright[:, None], 0.0, 1.0)


def _thing(kind: str, first: np.ndarray, second: np.ndarray, generator: np.random.Generator) -> _Thing:
    waves = generator.normal(size=(WAVES, 3)) * generator.uniform(2, 12, (WAVES, 1))
    tints = generator.normal(size=(WAVES, 3)) * 0.08
    return _Thing(kind, first, second, generator.uniform(0.2, 0.9, (6, 3)), waves, tints)


def _things(generator: np.random.Generator) -> tuple[list[_Thing], np.ndarray]:
    half = np.array([generator.uniform(*sides) for sides in ROOM])
    things = [_thing("room", -half, half, generator)]
    for _ in range(generator.integers(3, 7)):
        size = generator.uniform(0.15, 0.5, 3)
        x, z = generator.uniform(-0.55, 0.55, 2) * half[[0, 2]]
        if generator.random() < 0.5:
            base = half[1] - 2 * size[1] if generator.random() < 0.8 else generator.uniform(-0.3, 0.3)
            low = np.array([x - size[0], base, z - size[2]])
            things.append(_thing("box", low, low + 2 * size, generator))
        else:
            y = half[1] - size[0] if generator.random() < 0.8 else generator.uniform(-0.3, 0.3)
            things.append(_thing("ball", np.array([x, y, z]), np.full(3, size[0]), generator))
    return things, half


def _cameras(views: int, things: list[_Thing], half: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """Cameras on an arc near the walls that look at the middle of the room, none within a thing."""
    start, step, poses = generator.uniform(0, 2 * np.pi), generator.uniform(0.15, 0.45) * generator.choice([-1, 1]), []
    for view in range(views):
        tried = 0
        while True:
            angle = start + step * view + generator.normal() * 0.05 * (1 + tried // 100)
            position = np.array([np.cos(angle), 0.0, np.sin(angle)]) * half * generator.uniform(0.75, 0.88)
            position[1] = generator.uniform(-0.5, 0.3)
            if all(_outside(thing, position) for thing in things[1:]):
                break
            tried += 1  # where things fill the place, ever farther along the wall
        target = np.array([0.0, 0.35, 0.0]) + generator.normal(size=3) * 0.2
        poses.append(looking(position, target, generator.normal() * 0.05))
    return poses


def _outside(thing: _Thing, position: np.ndarray) -> bool:
    low, high = (
        (thing.first - thing.second, thing.first + thing.second)
        if thing.kind == "ball"
        else (thing.first, thing.second)
    )
    return bool(((position < low - 0.15) | (position > high + 0.15)).any())


def render_scene(seed: int, views: int = 4, height: int = 64, width: int = 64) -> Views:
    """One scene and its views, all drawn from a seed.

    **Raises:** `ValueError`: fewer than one view or pixel.
    """
    for what, number in (("views", views), ("height", height), ("width", width)):
        if number < 1:
            raise ValueError(f"`{what}` must be >= 1, got {number}.")
    generator = np.random.default_rng(seed)
    things, half = _things(generator)
    light = np.array([0.0, -0.9, 0.0]) * half + generator.normal(size=3) * 0.2
    focal = float(generator.uniform(0.8, 1.1) * max(height, width))
    local_rays, shots = rays(height, width, focal), []
    poses = _cameras(views, things, half, generator)
    for pose in poses:
        directions = (local_rays @ pose[:3, :3].T).reshape(-1, 3)
        distances = np.stack([thing.hits(pose[:3, 3], directions) for thing in things])
        nearest, depth = distances.argmin(0), distances.min(0)
        points = pose[:3, 3] + depth[:, None] * directions
        colours = np.empty_like(points)
        for index, thing in enumerate(things):
            own = nearest == index
            colours[own] = thing.shaded(points[own], light)
        shots.append(
            (
                colours.reshape(height, width, 3).transpose(2, 0, 1),
                depth.reshape(height, width),
                points.reshape(height, width, 3),
            )
        )
    images, depth, points = (torch.from_numpy(np.stack(part)).float() for part in zip(*shots, strict=True))
    local = depth[..., None] * torch.from_numpy(local_rays).float()
    return Views(images, depth, local, points, torch.from_numpy(np.stack(poses)).float(), focal)
