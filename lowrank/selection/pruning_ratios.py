"""selection.pruning_ratios"""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np


@overload
def pruning_ratios(
    metric: Mapping[str, float], parameters: Mapping[str, int], sparsity: float, epsilon: float,
    blocks: Mapping[str, Any] | None = None, exact: bool = True, missing: str = "error",
) -> dict[str, float]: ...  # fmt: skip


@overload
def pruning_ratios(
    metric: Sequence[float], parameters: Sequence[int], sparsity: float, epsilon: float,
    blocks: Sequence[Any] | None = None, exact: bool = True, missing: str = "error",
) -> list[float]: ...  # fmt: skip


def pruning_ratios(
    metric: Any,
    parameters: Any,
    sparsity: float | int,
    epsilon: float | int,
    blocks: Any = None,
    exact: bool = True,
    missing: str = "error",
) -> Any:
    """The share of each layer to prune: larger where the metric is larger, `sparsity` of all weights together.

    t = (1 - epsilon) ... (1 + epsilon), linear in the metric from its least to its greatest; the ratio is proportional to t.

    **Arguments:** `metric`: layer -> number, or a list. `parameters`: the weights of each, in the same form. `sparsity`: in
    [0, 1). `epsilon`: in [0, 1). `blocks`: the block of each layer; metrics are replaced by the mean of their block. `exact`:
    ratios above 1 are cut to 1 and the others raised until the total is right; False cuts only, as published, and misses it.
    `missing`: what to do with a metric that is not finite: 'error', or 'median' of the others.

    **Returns:** ratios in [0, 1] in the form of `metric`; `sparsity` everywhere where all metrics are equal.

    **Raises:** `ValueError`: layers that differ, a number out of its range, a metric that is missing, by name.

    **Reference:** Lu et al., AlphaPruning, NeurIPS 2024, section 3.3.
    """
    if isinstance(metric, Mapping):
        for what, given in (("parameters", parameters), ("blocks", blocks)):
            if given is not None and given.keys() != metric.keys():
                odd = sorted(given.keys() ^ metric.keys())[0]
                raise ValueError(f"`{what}` must be of the layers of `metric`, got {odd!r} in one of them only.")
        names = list(metric)
        counts = [parameters[name] for name in names]
        labels = None if blocks is None else [blocks[name] for name in names]
        ratios = _ratios(names, list(metric.values()), counts, labels, sparsity, epsilon, exact, missing)
        return dict(zip(names, ratios, strict=True))
    if len(parameters) != len(metric) or (blocks is not None and len(blocks) != len(metric)):
        raise ValueError(f"`parameters` and `blocks` must be one for each of {len(metric)} metrics.")
    return _ratios(list(range(len(metric))), metric, parameters, blocks, sparsity, epsilon, exact, missing)


def _ratios(
    names: Sequence[Any],
    metric: Sequence[float],
    parameters: Sequence[int],
    blocks: Sequence[Any] | None,
    sparsity: float | int,
    epsilon: float | int,
    exact: bool,
    missing: str,
) -> list[float]:
    if not len(metric):
        raise ValueError("`metric` must hold at least one layer, got none.")
    for what, number in (("sparsity", sparsity), ("epsilon", epsilon)):
        if not 0 <= number < 1:
            raise ValueError(f"`{what}` must be in [0, 1), got {number}.")
    if missing not in ("error", "median"):
        raise ValueError(f"`missing` must be 'error' or 'median', got {missing!r}.")
    if small := [n for n, count in zip(names, parameters, strict=True) if count < 1]:
        raise ValueError(f"`parameters` must be >= 1, got {parameters[list(names).index(small[0])]} for {small[0]!r}.")
    found, counts = np.array(metric, dtype=np.float64), np.array(parameters, dtype=np.float64)
    lost = ~np.isfinite(found)
    if lost.any():
        if missing == "error" or lost.all():
            raise ValueError(
                f"`metric` must be finite, got {found[lost][0]} for {names[int(np.argmax(lost))]!r}; `missing='median'` fills it."
            )
        found[lost] = np.median(found[~lost])
    if blocks is not None:
        labels = np.array([list(dict.fromkeys(blocks)).index(block) for block in blocks])
        found = (np.bincount(labels, found) / np.bincount(labels))[labels]
    spread = found.max() - found.min()
    tilt = (found - found.min()) / spread * 2 * epsilon + (1 - epsilon) if spread > 0 else np.ones_like(found)
    asked = sparsity * counts.sum()
    if not exact:
        return np.clip(tilt * asked / (counts * tilt).sum(), 0.0, 1.0).tolist()
    return _projected(tilt, counts, asked).tolist()


def _projected(tilt: np.ndarray, counts: np.ndarray, asked: float) -> np.ndarray:
    """min(c t, 1) with the c that gives the total; layers reach 1 in the order of their t."""
    full = np.zeros(len(tilt), dtype=bool)
    while True:
        scale = (asked - counts[full].sum()) / (counts * tilt)[~full].sum()
        over = ~full & (scale * tilt > 1)
        if not over.any():
            return np.where(full, 1.0, scale * tilt)
        full |= over
