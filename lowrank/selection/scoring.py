"""selection.scoring"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.io.weights import Source, opened
from lowrank.nn.targets import BLOCKS, split_block
from lowrank.selection.esd import METRICS, esd_metrics_together
from lowrank.selection.pruning_ratios import pruning_ratios
from lowrank.selection.scores import Scores, layer_sizes

TOGETHER = 2**30  # bytes of Gram matrices of one size that an accelerator decomposes at once
SUMS = {"norm_1": 1, "norm_2": 2}  # norms of the entries that are sums
MAPPINGS = ("block_wise", "layer_wise")
PRUNABLE = ("larger", "smaller")


def layer_scores(
    model: Source,
    metric: str = "alpha_peak",
    *,
    layers: Iterable[str] = BLOCKS,
    window: str = "published",
    smallest: float | int = 0.0,
    prunable: str | None = None,
    mapping: str = "block_wise",
    sparsity: float | int = 0.7,
    epsilon: float | int = 0.3,
    exact: bool = True,
    missing: str = "error",
    name: str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Scores:
    """Scores of the layers of a model: a metric of the spectrum, the share to prune, and significance = 1 - that share.

    One matrix at a time is in memory, so that files of any size will do; on an accelerator, several of one size.

    **Arguments:** `model`: a model, a folder with safetensors, a file, a Hub name. `metric`: one of `lowrank.selection.esd.METRICS`.
    `layers`: names or patterns. `window`, `smallest`: as in `esd_metrics`. `prunable`: which layers to prune more, those with
    the 'larger' or the 'smaller' metric; 'larger' is what is published for exponents, for all other metrics it has to be said.
    `mapping`: 'block_wise', where layers of a block share the mean of their metrics, or 'layer_wise'. `sparsity`, `epsilon`,
    `exact`, `missing`: as in `pruning_ratios`. `name`: kept in the file. `device`: where
    matrices are decomposed, by default where the weights are.

    **Raises:** `ValueError`: an unknown name or number out of its range; a layer without the metric, by name and status.
    `FileNotFoundError`: as `opened`.
    """
    for what, given, known in (("metric", metric, METRICS), ("mapping", mapping, MAPPINGS)):
        if given not in known:
            raise ValueError(f"`{what}` must be one of {list(known)}, got {given!r}.")
    if prunable is None and metric.startswith(("alpha", "hill")):
        prunable = "larger"
    if prunable not in PRUNABLE:
        raise ValueError(f"`prunable` must be 'larger' or 'smaller' for the metric {metric!r}, got {prunable!r}.")
    entries = list(layers)
    rows = _measured(model, entries, metric, window, smallest, device, progress)
    found = {row["name"]: _number(row["raw_metric"]) for row in rows}
    if missing == "error" and (lost := next((row for row in rows if row["raw_metric"] is None), None)):
        raise ValueError(
            f"`model` must have {metric} in every layer, got status {lost['status']!r} for {lost['name']!r}; "
            "missing='median' fills it."
        )
    sign = 1 if prunable == "larger" else -1
    ratios = pruning_ratios(
        {own: sign * value for own, value in found.items()},
        {row["name"]: row["num_parameters"] for row in rows},
        sparsity,
        epsilon,
        {row["name"]: row["block"] for row in rows} if mapping == "block_wise" else None,
        exact,
        missing,
    )
    for row in rows:
        row["pruning_ratio"], row["significance_score"] = ratios[row["name"]], 1 - ratios[row["name"]]
    rule = {
        "sparsity_ratio": sparsity,
        "epsilon": epsilon,
        "mapping_type": mapping,
        "prunable": prunable,
        "exact": exact,
    }
    about = {"model_name": name or _name_of(model), "metric_name": metric, "window": window, "smallest": smallest}
    return Scores(
        rows, about | rule | {"significance_method": "inverse_ratio", "missing": missing, "layers_named": entries}
    )


def _measured(
    model: Source,
    layers: list[str],
    metric: str,
    window: str,
    smallest: float | int,
    device: torch.device | str | None,
    progress: bool,
) -> list[dict[str, Any]]:
    sizes, rows = layer_sizes(model, layers), {}
    with (
        opened(model, "model") as held,
        tqdm(total=len(sizes), desc="scores", unit="matrix", disable=not progress) as bar,
    ):
        for names in _together(sizes, device if device is not None else _device_of(model)):
            weights = [held.read(f"{name}.weight").detach().to(device) for name in names]
            for name, weight, found in zip(
                names, weights, esd_metrics_together(weights, window, smallest), strict=True
            ):
                value = found[metric]
                about = {"name": name, "block": split_block(name)[0] or name, "num_parameters": weight.numel()}
                about |= {"weight_shape": list(weight.shape), "raw_metric": value if math.isfinite(value) else None}
                rows[name] = about | {"status": found["status"]} | _norms(weight)
            bar.update(len(names))
    return [{"index": index} | rows[name] for index, name in enumerate(sizes)]


def _together(sizes: Mapping[str, tuple[int, ...]], device: torch.device | str) -> Iterator[list[str]]:
    """One layer after the other on the CPU; elsewhere those whose Gram matrices have one size, as many as `TOGETHER` holds."""
    sides: dict[int, list[str]] = {}
    for name, shape in sizes.items():
        sides.setdefault(min(shape[:2]), []).append(name)
    for side, names in sides.items():
        count = 1 if torch.device(device).type == "cpu" else max(1, TOGETHER // (8 * side**2))
        yield from (names[first : first + count] for first in range(0, len(names), count))


def _device_of(model: Source) -> torch.device | str:
    return next(model.parameters()).device if isinstance(model, nn.Module) else "cpu"


def _norms(weight: Tensor) -> dict[str, float | None]:
    wide = torch.float64 if weight.device.type != "mps" else torch.float32
    found = {"norm_inf": float(torch.linalg.vector_norm(weight, math.inf))}
    found |= {name: float(torch.linalg.vector_norm(weight, order, dtype=wide)) for name, order in SUMS.items()}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _name_of(model: Source) -> str:
    if isinstance(model, nn.Module):
        return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Path(model).name
