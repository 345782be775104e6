"""Fit rotations and similarities to corresponding points, and bring arrays to float64."""

import numpy as np
from torch import Tensor

Array = Tensor | np.ndarray


def to_float64(name: str, values: Array) -> np.ndarray:
    """Convert a tensor or an array to a float64 array on the CPU.

    **Arguments**

    - `name`: the argument to name in errors.
    - `values`: any shape; a tensor may be on any device.

    **Raises**

    - `ValueError`: NaN or infinity in `values`.
    """
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
    return array


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
    rotation, agreement = fit_rotation(x, y)
    extent = float((x**2).sum())
    scale = agreement / extent if extent > 0 else 1.0
    return scale, rotation, target_mean - scale * rotation @ source_mean
