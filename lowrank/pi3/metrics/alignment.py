"""Fit rotations and similarities to corresponding points, and bring arrays to float64."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from lowrank.io.checks import require

Array = Tensor | np.ndarray
LARGEST = 1e100  # its square is finite, and so is the sum of as many as fit the memory


def to_float64(name: str, values: Array) -> np.ndarray:
    """Convert a tensor or an array to a float64 array on the CPU.

    **Arguments**

    - `name`: the argument to name in errors.
    - `values`: any shape; a tensor may be on any device.

    **Raises**

    - `ValueError`: NaN, infinity or a number beyond 1e100 in `values`.
    """
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
    largest = float(np.abs(array).max(initial=0.0))
    require(largest <= LARGEST, name, f"be at most {LARGEST:g} in magnitude", largest)
    return array


def require_finite(errors: Mapping[str, float]) -> None:
    """Raise an error if a metric is NaN or infinite, as of numbers too far apart for float64.

    **Arguments**

    - `errors`: name -> metric.

    **Raises**

    - `ValueError`: a metric that is not finite, by name.
    """
    wrong = next((name for name, error in errors.items() if not np.isfinite(error)), None)
    if wrong is not None:
        raise ValueError(f"`pred` must be comparable with `gt` in float64, got {wrong} {errors[wrong]}.")


def unit_of(values: np.ndarray) -> float:
    """Return the power of two next to the largest magnitude, at most it; 1 for zeros. To divide by it rounds nothing.

    **Arguments**

    - `values`: any shape.
    """
    largest = float(np.abs(values).max(initial=0.0))
    return float(np.ldexp(1.0, int(np.frexp(largest)[1]) - 1)) if largest else 1.0


def fit_rotation(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Find the rotation R that minimises sum |R x - y|^2 over corresponding points.

    **Arguments**

    - `source`: the points x, `(n, 3)`, with mean 0.
    - `target`: the points y, `(n, 3)`, with mean 0.

    **Returns** R, `(3, 3)`, and sum y . R x.
    """
    left, values, right = np.linalg.svd(target.T @ source)
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    return left * signs @ right, float((values * signs).sum())


def fit_similarity(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Find the scale c, rotation R and shift t that minimise sum |c R x + t - y|^2 over corresponding points.

    **Arguments**

    - `source`: the points x, `(n, 3)`. If they all coincide, c is 1.
    - `target`: the points y, `(n, 3)`.

    **Returns** c, R `(3, 3)` and t `(3,)`.

    **Reference** Umeyama, IEEE TPAMI 1991, eq. 40 to 42.
    """
    source_mean, target_mean = source.mean(0), target.mean(0)
    x, y = source - source_mean, target - target_mean
    of_x, of_y = unit_of(x), unit_of(y)  # squares must neither vanish nor overflow
    rotation, agreement = fit_rotation(x / of_x, y / of_y)
    extent = float(((x / of_x) ** 2).sum())
    scale = agreement / extent * (of_y / of_x) if extent > 0 else 1.0
    return scale, rotation, target_mean - scale * rotation @ source_mean
