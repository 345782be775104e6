"""pi3.metrics.alignment"""

import numpy as np
from torch import Tensor

Array = Tensor | np.ndarray


def _double(what: str, values: Array) -> np.ndarray:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"`{what}` must be finite, got NaN or infinity.")
    return array


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
