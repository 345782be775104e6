"""Score every layer of a model by the spectrum of its weight."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.factorization.precision import with_float64
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.weights import Source, check_weight, open_weights
from lowrank.nn.targets import BLOCKS, split_block
from lowrank.selection.esd import SPECTRAL_METRICS, WINDOWS, esd_metrics_together
from lowrank.selection.layer_sizes import layer_sizes
from lowrank.selection.pruning_ratios import check_ratio_options, pruning_ratios
from lowrank.selection.scores import Scores

_MAPPINGS = ("block_wise", "layer_wise")
_BATCH_BYTES = 2**30  # of Gram matrices of one size that an accelerator decomposes at once
_CACHED = 2**16  # entries that stay in the cache of a core when they are widened to float64


@check_arguments
@dataclass(frozen=True)
class ScoringConfig:
    """Hold the options that turn spectra into scores.

    **Arguments**

    - `window`: 'published' or 'corrected', see `lowrank.selection.esd.esd_metrics`.
    - `smallest`: fits keep eigenvalues above this number, >= 0 and finite.
    - `prunable`: prune layers with the 'larger' or the 'smaller' metric more. None stands for 'larger', as published, and is
      allowed for exponents only.
    - `mapping`: 'block_wise' gives all layers of a block the mean of their metrics, 'layer_wise' each layer its metric.
    - `sparsity`: share of all weights to prune, in [0, 1).
    - `epsilon`: spread of the ratios, in [0, 1).
    - `exact`: prune exactly `sparsity`; False cuts ratios above 1 and prunes less, as published.
    - `missing`: 'error' refuses a layer without the metric, 'median' gives it the median of the others.

    **Raises**

    - `ValueError`: an option out of its range.
    """

    window: str = "published"
    smallest: float | int = 0.0
    prunable: str | None = None
    mapping: str = "block_wise"
    sparsity: float | int = 0.7
    epsilon: float | int = 0.3
    exact: bool = True
    missing: str = "error"

    def __post_init__(self) -> None:
        rules = {
            "window": (self.window in WINDOWS, f"be one of {list(WINDOWS)}"),
            "smallest": (0 <= self.smallest < math.inf, "be >= 0 and finite"),
            "prunable": (self.prunable in (None, "larger", "smaller"), "be None, 'larger' or 'smaller'"),
            "mapping": (self.mapping in _MAPPINGS, f"be one of {list(_MAPPINGS)}"),
        }
        for name, (holds, rule) in rules.items():
            require(holds, name, rule, getattr(self, name))
        check_ratio_options(self.sparsity, self.epsilon, self.missing)


@check_arguments
def layer_scores(
    model: Source,
    metric: str = "alpha_peak",
    config: ScoringConfig = ScoringConfig(),
    *,
    layers: Iterable[str] = BLOCKS,
    name: str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Scores:
    """Score the layers of a model: 1 minus the share of the layer to prune, computed from a metric of its spectrum.

    One weight at a time is in memory, so that files may be larger than the memory. An accelerator takes several weights of one
    size at a time.

    **Arguments**

    - `model`: a model, a folder with safetensors, a safetensors file, or a Hub name.
    - `metric`: one of `lowrank.selection.esd.SPECTRAL_METRICS`.
    - `config`: how metrics become scores.
    - `layers`: names or regular expressions that must match a whole name; by default the layers inside numbered blocks.
    - `name`: name of the model in the file, by default its folder or its class.
    - `device`: where weights are decomposed, by default where they are.
    - `progress`: show a progress bar.

    **Returns** the `Scores` of all layers.

    **Raises**

    - `ValueError`: an unknown metric; `config.prunable` is None for a metric that is no exponent; a layer without the metric, by
      name and status; no such layer; a weight of packed bytes or without elements.
    - `FileNotFoundError`: no such checkpoint, see `lowrank.io.weights.open_weights`.

    **Warns**

    - `LeftOutWarning`: stacks of matrices, such as the experts of a mixture, that are left out.
    """
    require(metric in SPECTRAL_METRICS, "metric", f"be one of {list(SPECTRAL_METRICS)}", metric)
    prunable = config.prunable or ("larger" if metric.startswith(("alpha", "hill")) else None)
    require(prunable is not None, "prunable", f"be 'larger' or 'smaller' for the metric {metric!r}", prunable)
    patterns = list(layers)
    sizes = layer_sizes(model, patterns)
    rows = _measure_layers(model, sizes, metric, config, device, progress)
    _check_metrics(rows, metric, config.missing)
    sign = 1 if prunable == "larger" else -1
    metrics = {row["name"]: math.nan if row["raw_metric"] is None else row["raw_metric"] for row in rows}
    ratios = pruning_ratios(
        {layer: sign * value for layer, value in metrics.items()},
        {row["name"]: row["num_parameters"] for row in rows},
        config.sparsity,
        config.epsilon,
        {row["name"]: row["block"] for row in rows} if config.mapping == "block_wise" else None,
        config.exact,
        config.missing,
    )
    for row in rows:
        row["pruning_ratio"], row["significance_score"] = ratios[row["name"]], 1 - ratios[row["name"]]
    model_keys = {"model_name": name or _name_model(model), "metric_name": metric, "layers_named": patterns}
    model_keys |= {"share_of_model": sizes.share_of_model, "left_out": list(sizes.left_out)}
    return Scores(rows, model_keys | _published_keys(config) | {"prunable": prunable})


def _measure_layers(
    model: Source,
    sizes: Mapping[str, tuple[int, ...]],
    metric: str,
    config: ScoringConfig,
    device: torch.device | str | None,
    progress: bool,
) -> list[dict[str, Any]]:
    """Return one row per layer, without ratio and score."""
    rows = {}
    with (
        open_weights(model, "model") as checkpoint,
        tqdm(total=len(sizes), desc="scores", unit="matrix", disable=not progress) as bar,
    ):
        for names in _batch_layers(sizes, device if device is not None else _device_of(model)):
            weights = [checkpoint.read(f"{name}.weight").detach() for name in names]
            for name, weight in zip(names, weights, strict=True):
                check_weight(weight, name, "model")
            weights = [weight.to(device) for weight in weights]
            spectra = esd_metrics_together(weights, config.window, config.smallest)
            for name, weight, metrics in zip(names, weights, spectra, strict=True):
                rows[name] = {
                    "name": name,
                    "block": split_block(name)[0] or name,
                    "num_parameters": weight.numel(),
                    "weight_shape": list(weight.shape),
                    "raw_metric": metrics[metric] if math.isfinite(metrics[metric]) else None,
                    "status": metrics["status"],
                } | _entry_norms(weight, metrics["norm"])
            bar.update(len(names))
    return [{"index": index} | rows[name] for index, name in enumerate(sizes)]


def _check_metrics(rows: list[dict[str, Any]], metric: str, missing: str) -> None:
    if missing == "error" and (row := next((row for row in rows if row["raw_metric"] is None), None)):
        raise ValueError(
            f"`model` must have {metric} in every layer, got status {row['status']!r} for {row['name']!r}; "
            "missing='median' fills it."
        )


def _published_keys(config: ScoringConfig) -> dict[str, Any]:
    """Return the options under the keys of the published schema."""
    return {
        "window": config.window,
        "smallest": config.smallest,
        "sparsity_ratio": config.sparsity,
        "epsilon": config.epsilon,
        "mapping_type": config.mapping,
        "exact": config.exact,
        "missing": config.missing,
        "significance_method": "inverse_ratio",
    }


def _batch_layers(sizes: Mapping[str, tuple[int, ...]], device: torch.device | str) -> Iterator[list[str]]:
    """Yield one layer at a time for the CPU, else as many with Gram matrices of one size as `_BATCH_BYTES` allow."""
    sides: dict[int, list[str]] = {}
    for name, shape in sizes.items():
        sides.setdefault(min(shape[:2]), []).append(name)
    for side, names in sides.items():
        count = 1 if torch.device(device).type == "cpu" else max(1, _BATCH_BYTES // (8 * side**2))
        yield from (names[first : first + count] for first in range(0, len(names), count))


def _device_of(model: Source) -> torch.device | str:
    return next(model.parameters()).device if isinstance(model, nn.Module) else "cpu"


def _entry_norms(weight: Tensor, norm: float) -> dict[str, float | None]:
    """Return norms of the entries; `norm` is the sum of the eigenvalues, which those of a convolution are half of."""
    weight = with_float64(weight)
    largest, sums = [], []
    for piece in weight.split(max(1, _CACHED // weight[0].numel())):
        sizes = piece.to(torch.float64, copy=True).abs_()
        largest.append(sizes.max())
        sums.append(sizes.sum())
    norms = {
        "norm_inf": float(torch.stack(largest).max()),
        "norm_1": float(torch.stack(sums).sum()),
        "norm_2": math.sqrt(norm if weight.dim() == 2 else 2 * norm),
    }
    return {name: value if math.isfinite(value) else None for name, value in norms.items()}


def _name_model(model: Source) -> str:
    if isinstance(model, nn.Module):
        return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Path(model).name
