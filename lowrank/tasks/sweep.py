"""Compress one dense model in many configurations and at many budgets, and measure the quality of each."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.compression.checks import Statistics
from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import decompose, replace_layers
from lowrank.compression.result import parameter_counts
from lowrank.factorization.factorize import Factors
from lowrank.factorization.rank_allocation import allocate_ranks
from lowrank.nn.batches import Batch, as_double, compute_logits, device_of, get_labels, move_batch
from lowrank.tasks.evaluation import OBJECTIVES
from lowrank.tasks.task import Task

TRUSTED = 2.0  # a divergence too small to be measured must not move ranks by more than this


def best_combination(biased: bool) -> dict[str, Configuration]:
    """List the steps from whitening to the best training-free combination, one change at a time.

    **Arguments**

    - `biased`: whether layers have biases; only then inputs are centred.

    **Returns** step -> `Configuration`; the last one is the whole combination.
    """
    steps = {"whitened": Configuration(), "output gradients": Configuration("two_sided")}
    if biased:
        steps["centring + bias"] = Configuration("two_sided", centre=True)
    steps["pivot storage"] = Configuration("two_sided", "pivoted", biased)
    steps["ranks by spectrum"] = Configuration("two_sided", "pivoted", biased, "spectrum")
    steps["ranks by measured loss"] = Configuration("two_sided", "pivoted", biased, "measured")
    return steps


@dataclass(frozen=True)
class SweepConfig:
    """Set what a sweep measures with.

    **Arguments**

    - `calibration_samples`: int, the samples that the statistics were collected over.
    - `floor`: share of its uniform rank that every layer keeps, see `allocate_ranks`.
    - `probe_samples`: int, training samples on which 'measured' truncates one layer after another.
    - `probe_keep`: share kept of the layer that is truncated alone, in (0, 1].
    - `batch_size`: int, samples of a batch.
    - `seed`: int, draws the probe samples.
    - `in_memory`: keep the factors of all layers at full rank in float64; otherwise every model is decomposed anew.
    - `split`: the split whose quality is measured; default 'validation'. 'test' needs a task opened by `Task.open_test`.
    """

    calibration_samples: int
    floor: float = 0.1
    probe_samples: int = 128
    probe_keep: float = 0.2
    batch_size: int = 64
    seed: int = 0
    in_memory: bool = True
    split: str = "validation"


@dataclass(eq=False)
class Sweep:
    """Hold a dense model, the statistics of its layers and what was computed from them, to make many compressed models.

    **Arguments**

    - `model`: the dense model; it is not changed.
    - `task`: its data, targeted layers and metrics.
    - `statistics`: layer name -> `LayerStatistics`, with gradient moments if a configuration uses `two_sided`.
    - `config`: what to measure with.
    - `labelled`: statistics for `fwsvd` with gradients under the labels of the task; by default `statistics`.
    """

    model: nn.Module
    task: Task
    statistics: Statistics
    config: SweepConfig
    labelled: Statistics | None = None
    _factors: dict[tuple[str, bool], dict[str, Factors]] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return layer name -> (out, in) of the targeted layers."""
        return {name: tuple(layer.weight.shape) for name, layer in self.task.linears(self.model).items()}

    @cached_property
    def biased(self) -> bool:
        """Return whether any targeted layer has a bias."""
        return any(layer.bias is not None for layer in self.task.linears(self.model).values())

    @cached_property
    def dense(self) -> dict[str, float]:
        """Return loss and metrics of the dense model on the configured split."""
        return self.task.evaluate(self.model, self.config.split, self.config.batch_size)

    def _statistics_for(self, method: str) -> Statistics:
        return self.labelled if method == "fwsvd" and self.labelled is not None else self.statistics

    def factors(self, method: str, centre: bool = False) -> dict[str, Factors]:
        """Return the full-rank factors of every targeted layer, decomposed once.

        **Arguments**

        - `method`: a key of `METHODS`.
        - `centre`: in the norm of the centred inputs.
        """
        key = method, centre
        if key not in self._factors:
            statistics = self._statistics_for(method)
            self._factors[key] = decompose(self.model, method, statistics, self.shapes, centre=centre)
        return self._factors[key]

    def spectra(self, method: str, centre: bool = False) -> dict[str, Tensor]:
        """Return layer name -> singular values of the matrix that a method truncates, on the CPU.

        **Arguments**

        - `method`: a key of `METHODS`.
        - `centre`: in the norm of the centred inputs.
        """
        return {name: factors.spectrum.cpu() for name, factors in self.factors(method, centre).items()}

    @cached_property
    def alone(self) -> list[dict[str, Any]]:
        """Return what truncating each layer alone does to the dense predictions, at `probe_keep` and in pivot storage.

        Ranks hang on these divergences, which can be as small as float32's rounding: a float32 model is measured in float64.

        **Returns** one row per layer: `layer`, `rank`, `predicted` by half of the discarded two-sided energy, and `measured`, the
        divergence from the dense predictions; both per target.
        """
        configuration = Configuration("two_sided", "pivoted", self.biased)
        spectra, exact = self.spectra("two_sided", self.biased), _has_float64(self.model)
        divergence = self.task.divergence(copy.deepcopy(self.model).double() if exact else self.model)
        probes, targets = self._probes(exact)
        calibrated = self.config.calibration_samples * sum(targets) / self.config.probe_samples
        rows = []
        for name, rank in self.ranks(configuration, self.config.probe_keep).items():
            smaller = self.compressed(configuration, {name: rank})
            smaller = smaller.double() if exact else smaller
            with torch.no_grad():
                caused = sum(
                    divergence(smaller, batch).item() * count for batch, count in zip(probes, targets, strict=True)
                ) / sum(targets)
            predicted = spectra[name][rank:].square().sum().item() / 2 / calibrated
            rows.append({"layer": name, "rank": rank, "predicted": predicted, "measured": caused})
        return rows

    def _probes(self, exact: bool) -> tuple[list[Batch], list[int]]:
        """Return training batches on the model's device, in float64 if `exact`, and the number of targets in each."""
        config = self.config
        batches = self.task.batches("train", config.batch_size, samples=config.probe_samples, seed=config.seed + 1)
        probes = [move_batch(batch, device_of(self.model)) for batch in batches]
        losses = OBJECTIVES[self.task.objective].losses
        with torch.no_grad():
            targets = [len(losses(compute_logits(self.model, batch), get_labels(batch))) for batch in probes]
        return [as_double(batch) for batch in probes] if exact else probes, targets

    @cached_property
    def scales(self) -> dict[str, float]:
        """Return layer name -> measured over predicted divergence, kept within `TRUSTED` times the median of all layers."""
        ratios = {row["layer"]: max(row["measured"], 0.0) / max(row["predicted"], 1e-300) for row in self.alone}
        middle = median(ratios.values())
        return {name: min(max(ratio, middle / TRUSTED), middle * TRUSTED) for name, ratio in ratios.items()}

    def ranks(self, configuration: Configuration, keep: float) -> dict[str, int]:
        """Return layer name -> rank within a budget.

        **Arguments**

        - `configuration`: its storage and allocation decide.
        - `keep`: share of the targeted parameters to keep, in (0, 1].
        """
        spectra, weights = None, None
        if configuration.allocation == "relative":
            spectra = self.spectra("whitened")
            weights = {name: 1 / sigma.square().sum().item() for name, sigma in spectra.items()}
        elif configuration.allocation != "uniform":
            spectra = self.spectra("two_sided", self.biased)
            weights = self.scales if configuration.allocation == "measured" else None
        options: dict[str, Any] = dict(storage=configuration.storage, floor=self.config.floor)
        return allocate_ranks(self.shapes, keep, spectra, weights=weights, **options)

    def compressed(self, configuration: Configuration, ranks: Mapping[str, int]) -> nn.Module:
        """Return a copy of the model with layers replaced at given ranks.

        **Arguments**

        - `configuration`: method, storage and centring.
        - `ranks`: layer name -> rank.
        """
        smaller = copy.deepcopy(self.model)
        factors = self.factors(configuration.method, configuration.centre) if self.config.in_memory else None
        replace_layers(smaller, ranks, configuration, self._statistics_for(configuration.method), factors=factors)
        return smaller

    def quality(self, smaller: nn.Module) -> dict[str, int | float]:
        """Return what a model stores and how good it is on the configured split.

        **Arguments**

        - `smaller`: a compressed form of the dense model, or that model.

        **Returns** the counts of `parameter_counts`, loss and metrics, and `added_loss` over the dense model's.
        """
        measured = self.task.evaluate(smaller, self.config.split, self.config.batch_size)
        counts = parameter_counts(smaller, self.model, self.task.layers)
        return counts | measured | {"added_loss": measured["loss"] - self.dense["loss"]}

    def run(self, configurations: Mapping[str, Configuration], keeps: Sequence[float]) -> list[dict[str, Any]]:
        """Compress and measure every configuration at every budget.

        **Arguments**

        - `configurations`: name -> `Configuration`.
        - `keeps`: shares of the targeted parameters to keep.

        **Returns** one row per configuration and budget: its name (in the column `way`), `keep`, and the quality.

        **Raises**

        - `AssertionError`: a model stores more than its budget.
        """
        rows = []
        for name, configuration in configurations.items():
            for keep in keeps:
                row = self.quality(self.compressed(configuration, self.ranks(configuration, keep)))
                assert row["keep_targeted"] <= keep + 1e-9
                rows.append({"way": name, "keep": keep} | row)
        return rows


def _has_float64(model: nn.Module) -> bool:
    """Return True for a float32 model on a device that computes in float64; a half-precision one may be too large to copy."""
    return device_of(model).type != "mps" and all(p.dtype == torch.float32 for p in model.parameters())
