"""Turn a metric of every layer into the share of the layer to prune (AlphaPruning), within one total."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.io.checks import require


def pruning_ratios(
    metric: Mapping[str, float],
    parameters: Mapping[str, int],
    sparsity: float | int,
    epsilon: float | int,
    blocks: Mapping[str, Any] | None = None,
    exact: bool = True,
    missing: str = "error",
) -> dict[str, float]:
    """Compute the share of each layer to prune, larger for a larger metric, so that `sparsity` of all weights is pruned.

    t rises linearly with the metric, from 1 - epsilon at its minimum to 1 + epsilon at its maximum. The ratio is proportional
    to t. If all metrics are equal, every ratio is `sparsity`.

    **Arguments**

    - `metric`: layer -> number.
    - `parameters`: layer -> number of weights, >= 1, for the same layers.
    - `sparsity`: share of all weights to prune, in [0, 1).
    - `epsilon`: spread of the ratios, in [0, 1).
    - `blocks`: layer -> block. The mean over a block replaces the metrics of its layers. None for no blocks.
    - `exact`: cut ratios above 1 to 1 and raise the others until the total is right. False only cuts, as published, and so
      prunes less than `sparsity`.
    - `missing`: 'error' refuses a metric that is not finite, 'median' replaces it by the median of the others.

    **Returns** layer -> ratio in [0, 1], in the order of `metric`.

    **Raises**

    - `ValueError`: the layers differ; a number out of its range; a metric that is not finite, by name.

    **Reference** Lu et al., AlphaPruning, NeurIPS 2024, section 3.3.
    """
    check_ratio_options(sparsity, epsilon, missing)
    if not metric:
        raise ValueError("`metric` must have at least one layer, got none.")
    for argument, mapping in (("parameters", parameters), ("blocks", blocks)):
        if mapping is not None and mapping.keys() != metric.keys():
            odd = sorted(mapping.keys() ^ metric.keys())[0]
            raise ValueError(f"`{argument}` must have the layers of `metric`, got {odd!r} in one of them only.")
    for name in metric:
        require(parameters[name] >= 1, "parameters", f"be >= 1 for {name!r}", parameters[name])
    values = _fill_missing(metric, missing)
    counts = np.array([parameters[name] for name in metric], dtype=np.float64)
    if blocks is not None:
        values = _average_blocks(values, [blocks[name] for name in metric])
    spread = values.max() - values.min()
    tilt = (values - values.min()) / spread * 2 * epsilon + (1 - epsilon) if spread > 0 else np.ones_like(values)
    total = sparsity * counts.sum()
    ratios = _scale_to_total(tilt, counts, total) if exact else _scale_and_cut(tilt, counts, total)
    return dict(zip(metric, ratios.tolist(), strict=True))


def check_ratio_options(sparsity: float | int, epsilon: float | int, missing: str) -> None:
    """Check the options of `pruning_ratios`.

    **Arguments**

    - `sparsity`, `epsilon`: numbers in [0, 1).
    - `missing`: 'error' or 'median'.

    **Raises**

    - `ValueError`: an option out of its range.
    """
    require(0 <= sparsity < 1, "sparsity", "be in [0, 1)", sparsity)
    require(0 <= epsilon < 1, "epsilon", "be in [0, 1)", epsilon)
    require(missing in ("error", "median"), "missing", "be 'error' or 'median'", missing)


def _fill_missing(metric: Mapping[str, float], missing: str) -> np.ndarray:
    values = np.array(list(metric.values()), dtype=np.float64)
    lost = ~np.isfinite(values)
    if lost.any():
        if missing == "error" or lost.all():
            name = list(metric)[int(np.argmax(lost))]
            raise ValueError(f"`metric` must be finite, got {metric[name]} for {name!r}; `missing='median'` fills it.")
        values[lost] = np.median(values[~lost])
    return values


def _average_blocks(values: np.ndarray, blocks: Sequence[Any]) -> np.ndarray:
    order = list(dict.fromkeys(blocks))
    labels = np.array([order.index(block) for block in blocks])
    return (np.bincount(labels, values) / np.bincount(labels))[labels]


def _scale_and_cut(tilt: np.ndarray, counts: np.ndarray, total: float) -> np.ndarray:
    return np.clip(tilt * total / (counts * tilt).sum(), 0.0, 1.0)


def _scale_to_total(tilt: np.ndarray, counts: np.ndarray, total: float) -> np.ndarray:
    """Return min(c t, 1) for the c that gives the total; layers reach 1 in the order of their t."""
    full = np.zeros(len(tilt), dtype=bool)
    while True:
        scale = (total - counts[full].sum()) / (counts * tilt)[~full].sum()
        over = ~full & (scale * tilt > 1)
        if not over.any():
            return np.where(full, 1.0, scale * tilt)
        full |= over
