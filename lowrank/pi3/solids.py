"""The textured solids of rendered scenes: a room, boxes and balls, and the rays that hit them.

Rays hit surfaces exactly. Colours are sums of waves in space, so a surface looks the same from everywhere except for the light.
"""

from dataclasses import dataclass

import numpy as np

WAVES = 6  # of the texture of each surface


def box_hits(origin: np.ndarray, directions: np.ndarray, low: np.ndarray, high: np.ndarray, inside: bool) -> np.ndarray:
    """Compute distances along rays to an axis-aligned box, in units of the length of a direction.

    **Arguments**

    - `origin`: `(3,)`, common start of the rays.
    - `directions`: `(..., 3)`.
    - `low`, `high`: `(3,)`, opposite corners of the box.
    - `inside`: whether the rays start in the box.

    **Returns** `(...)`; infinity for a ray that misses.
    """
    with np.errstate(divide="ignore"):
        ends = np.stack([(low - origin) / directions, (high - origin) / directions])
    enter, leave = ends.min(0).max(-1), ends.max(0).min(-1)
    return leave if inside else np.where((enter <= leave) & (enter > 1e-6), enter, np.inf)


def ball_hits(origin: np.ndarray, directions: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """Compute distances along rays from outside to a ball, in units of the length of a direction.

    **Arguments**

    - `origin`: `(3,)`, common start of the rays.
    - `directions`: `(..., 3)`.
    - `centre`: `(3,)`, of the ball.
    - `radius`: of the ball.

    **Returns** `(...)`; infinity for a ray that misses.
    """
    offset, square = origin - centre, (directions**2).sum(-1)
    along = directions @ offset
    left = along**2 - square * (offset @ offset - radius**2)
    near = (-along - np.sqrt(np.maximum(left, 0.0))) / square
    return np.where((left > 0) & (near > 1e-6), near, np.inf)


@dataclass(frozen=True)
class Solid:
    """Hold a room, a box or a ball with its texture.

    **Arguments**

    - `kind`: 'room', 'box' or 'ball'.
    - `first`: `(3,)`, the low corner, or the centre of a ball.
    - `second`: `(3,)`, the high corner, or the radius of a ball in each of its entries.
    - `colours`: `(6, 3)`, one for each side, in [0, 1].
    - `waves`: `(WAVES, 3)`, wave vectors of the texture.
    - `tints`: `(WAVES, 3)`, the colour that each wave adds.
    """

    kind: str
    first: np.ndarray
    second: np.ndarray
    colours: np.ndarray
    waves: np.ndarray
    tints: np.ndarray

    @classmethod
    def random(cls, kind: str, first: np.ndarray, second: np.ndarray, generator: np.random.Generator) -> "Solid":
        """Build a solid with a random texture.

        **Arguments**

        - `kind`, `first`, `second`: see `Solid`.
        - `generator`: source of the texture; it is advanced.
        """
        waves = generator.normal(size=(WAVES, 3)) * generator.uniform(2, 12, (WAVES, 1))
        tints = generator.normal(size=(WAVES, 3)) * 0.08
        return cls(kind, first, second, generator.uniform(0.2, 0.9, (6, 3)), waves, tints)

    def hits(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Compute distances along rays to the surface, see `box_hits` and `ball_hits`.

        **Arguments**

        - `origin`: `(3,)`, common start of the rays.
        - `directions`: `(..., 3)`.
        """
        if self.kind == "ball":
            return ball_hits(origin, directions, self.first, float(self.second[0]))
        return box_hits(origin, directions, self.first, self.second, self.kind == "room")

    def shade(self, points: np.ndarray, light: np.ndarray) -> np.ndarray:
        """Compute the colours of points on the surface.

        **Arguments**

        - `points`: `(P, 3)`.
        - `light`: `(3,)`, position of the light.

        **Returns** `(P, 3)`, in [0, 1].
        """
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

    def is_clear(self, position: np.ndarray) -> bool:
        """Return True if a position, `(3,)`, is at least 0.15 outside the bounding box of a box or ball."""
        low, high = (
            (self.first - self.second, self.first + self.second) if self.kind == "ball" else (self.first, self.second)
        )
        return bool(((position < low - 0.15) | (position > high + 0.15)).any())
