"""Compress one dense model in many configurations and at many budgets, and measure the quality of each."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.compression.allocation import choose_ranks
from lowrank.compression.allocator import AllocationConfig, Allocator
from lowrank.compression.checks import Statistics
from lowrank.compression.configuration import Configuration
from lowrank.compression.depth import block_positions
from lowrank.compression.result import parameter_counts
from lowrank.factorization.factorize import Factors
from lowrank.nn.batches import batches_on, compute_logits, count_samples, device_of, get_labels
from lowrank.nn.profiling import weight_bytes
from lowrank.tasks.evaluation import OBJECTIVES
from lowrank.tasks.task import Task


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
    steps["retargeted"] = Configuration("two_sided", "pivoted", biased, "measured", retarget=True)
    return steps


@dataclass(frozen=True)
class SweepConfig:
    """Set what a sweep measures with.

    **Arguments**

    - `calibration_samples`: int, the samples that the statistics were collected over, and that layers are retargeted on.
    - `floor`: share of its uniform rank that every layer keeps, see `allocate_ranks`.
    - `probe_samples`: int, training samples on which rules for ranks measure: those that follow the calibration samples in their
      shuffled order, and the first of these again where the split ends.
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
    _measured: dict[tuple[Configuration, float], tuple[dict[str, Any], np.ndarray]] = field(
        default_factory=dict, init=False, repr=False
    )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return layer name -> (out, in) of the targeted layers."""
        return self.allocator.shapes

    @cached_property
    def biased(self) -> bool:
        """Return whether any targeted layer has a bias."""
        return self.allocator.biased

    @cached_property
    def dense(self) -> dict[str, float]:
        """Return loss and metrics of the dense model on the configured split."""
        return self._dense_samples[0]

    @cached_property
    def _dense_samples(self) -> tuple[dict[str, float], np.ndarray]:
        return self.task.evaluate_samples(self.model, self.config.split, self.config.batch_size)

    @cached_property
    def allocator(self) -> Allocator:
        """Return what was computed to choose ranks; the probes are training samples that the statistics have not seen."""
        config, labelled = self.config, {} if self.labelled is None else {"fwsvd": self.labelled}
        order = torch.randperm(len(self.task.split("train")), generator=torch.Generator().manual_seed(config.seed))
        probes = order.roll(-config.calibration_samples)[: config.probe_samples].split(config.batch_size)
        return Allocator(
            self.model,
            self.task.layers,
            self.statistics,
            list(self.task.loader("train", [positions.tolist() for positions in probes])),
            self.task.divergences,
            labelled,
            AllocationConfig(config.floor, config.probe_keep, config.in_memory),
            list(self.task.batches("train", config.batch_size, samples=config.calibration_samples, seed=config.seed)),
        )

    @cached_property
    def alone(self) -> list[dict[str, Any]]:
        """Return what truncating each layer alone does to the dense predictions, see `Allocator.alone`.

        **Returns** one row per layer: `layer`, `rank`, `predicted` by half of the discarded two-sided energy, and `measured`, the
        divergence from the dense predictions; both per target.
        """
        losses, targets, probes = OBJECTIVES[self.task.objective].losses, 0, self.allocator.probes
        with torch.no_grad():
            for batch in batches_on(probes, device_of(self.model)):
                targets += len(losses(compute_logits(self.model, batch), get_labels(batch)))
        calibrated = self.config.calibration_samples * targets / sum(map(count_samples, probes))
        return [row | {"predicted": row["predicted"] / calibrated} for row in self.allocator.alone]

    def factors(self, method: str, centre: bool = False) -> dict[str, Factors]:
        """Return the full-rank factors of every targeted layer, see `Allocator.factors`.

        **Arguments**

        - `method`: a key of `METHODS`.
        - `centre`: in the norm of the centred inputs.
        """
        return self.allocator.factors(method, centre)

    def spectra(self, method: str, centre: bool = False) -> dict[str, Tensor]:
        """Return layer name -> singular values of the matrix that a method truncates, see `Allocator.spectra`.

        **Arguments**

        - `method`: a key of `METHODS`.
        - `centre`: in the norm of the centred inputs.
        """
        return self.allocator.spectra(method, centre)

    def affords(self, configuration: Configuration, keep: float) -> bool:
        """Return whether a budget suffices: 'first_dense' must leave a twentieth of it to the layers behind the first block.

        **Arguments**

        - `configuration`: its allocation names the rule.
        - `keep`: share of the targeted parameters to keep, in (0, 1].
        """
        if configuration.allocation != "first_dense":
            return True
        sizes = {name: out * inputs for name, (out, inputs) in self.shapes.items()}
        first = sum(sizes[name] for name, position in block_positions(sizes).items() if position == 0)
        return 0.95 * keep * sum(sizes.values()) >= first

    def ranks(self, configuration: Configuration, keep: float) -> dict[str, int]:
        """Return layer name -> rank within a budget.

        **Arguments**

        - `configuration`: its allocation names the rule, see `lowrank.compression.allocation`.
        - `keep`: share of the targeted parameters to keep, in (0, 1].
        """
        return choose_ranks(self.allocator, configuration, keep)

    def compressed(self, configuration: Configuration, ranks: Mapping[str, int]) -> nn.Module:
        """Return a copy of the model with layers replaced at given ranks.

        **Arguments**

        - `configuration`: method, storage and centring.
        - `ranks`: layer name -> rank.
        """
        return self.allocator.compressed(configuration, ranks)

    def quality(self, smaller: nn.Module) -> dict[str, int | float]:
        """Return what a model stores and how good it is on the configured split.

        **Arguments**

        - `smaller`: a compressed form of the dense model, or that model.

        **Returns** the counts of `parameter_counts`; `weights_mb`, of parameters and indices; loss and metrics; `added_loss` over
        the dense model's, and `added_error`, its standard error over samples, 0 for the dense model.
        """
        return self.quality_by_sample(smaller)[0]

    def quality_by_sample(self, smaller: nn.Module) -> tuple[dict[str, int | float], np.ndarray]:
        """Return what `quality` does, and the mean loss of each sample of the configured split.

        **Arguments**

        - `smaller`: a compressed form of the dense model, or that model.

        **Returns** the quality; losses, `(samples,)`, float64, NaN for a sample without a target.
        """
        if smaller is self.model:
            measured, losses = self._dense_samples
        else:
            measured, losses = self.task.evaluate_samples(smaller, self.config.split, self.config.batch_size)
        counts = parameter_counts(smaller, self.model, self.task.layers) | {"weights_mb": weight_bytes(smaller) / 1e6}
        added = losses - self._dense_samples[1]
        error = float(np.nanstd(added, ddof=1) / np.isfinite(added).sum() ** 0.5) if len(added) > 1 else float("nan")
        quality = counts | measured | {"added_loss": measured["loss"] - self.dense["loss"], "added_error": error}
        return quality, losses

    def measure(self, configuration: Configuration, keep: float) -> tuple[dict[str, Any], np.ndarray]:
        """Compress at a budget and measure; asked again, return what was found the first time.

        **Arguments**

        - `configuration`: one that the budget affords.
        - `keep`: share of the targeted parameters to keep, in (0, 1].

        **Returns** `keep`, the `seconds` of choosing ranks and compressing, and the quality; the losses of samples.

        **Raises**

        - `AssertionError`: the model stores more than its budget.
        """
        if (configuration, keep) not in self._measured:
            start = time.perf_counter()
            smaller = self.compressed(configuration, self.ranks(configuration, keep))
            about = {"keep": keep, "seconds": time.perf_counter() - start}
            quality, losses = self.quality_by_sample(smaller)
            assert quality["keep_targeted"] <= keep + 1e-9
            self._measured[configuration, keep] = about | quality, losses
        return self._measured[configuration, keep]

    def run(self, configurations: Mapping[str, Configuration], keeps: Sequence[float]) -> list[dict[str, Any]]:
        """Compress and measure every configuration at every budget that it affords.

        **Arguments**

        - `configurations`: name -> `Configuration`.
        - `keeps`: shares of the targeted parameters to keep.

        **Returns** one row per configuration and budget: its name (in the column `way`), and what `measure` returns.

        **Raises** as `measure`.
        """
        return [
            {"way": name} | self.measure(configuration, keep)[0]
            for name, configuration in configurations.items()
            for keep in keeps
            if self.affords(configuration, keep)
        ]
