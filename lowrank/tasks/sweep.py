"""Many compressed models of one dense model: ways of compressing, budgets, and the quality of each."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from lowrank.compression.compress import compress, decompose, parameter_counts
from lowrank.factorization.methods import Factors
from lowrank.factorization.moments import LayerStatistics
from lowrank.factorization.rank_allocation import allocate_ranks
from lowrank.nn.batches import device_of, labels, logits, to_device
from lowrank.tasks.evaluation import OBJECTIVES
from lowrank.tasks.task import Task

TRUSTED = 2.0  # a divergence too small to be measured must not move ranks by more than this
POLICIES = ("uniform", "relative", "spectrum", "measured")


class Way(NamedTuple):
    """A way of compressing: a key of `METHODS`, a storage, whether inputs are centred, and what the ranks are spent by.

    `policy`: 'uniform', the same share of every layer; 'relative', by the discarded share of each layer's one-sided energy;
    'spectrum', by the two-sided spectrum, which approximates the loss; 'measured', the same with each layer scaled so that
    truncating it alone costs what it is measured to cost.
    """

    method: str
    storage: str = "factors"
    centre: bool = False
    policy: str = "uniform"


def combination(biased: bool) -> dict[str, Way]:
    """From whitening to the best training-free combination, one change at a time; centring only where there are biases."""
    steps = {"whitened": Way("whitened"), "output gradients": Way("two_sided")}
    if biased:
        steps["centring + bias"] = Way("two_sided", centre=True)
    steps["pivot storage"] = Way("two_sided", "pivoted", biased)
    steps["ranks by spectrum"] = Way("two_sided", "pivoted", biased, "spectrum")
    steps["ranks by measured loss"] = Way("two_sided", "pivoted", biased, "measured")
    return steps


@dataclass(eq=False)
class Sweep:
    """A dense model, the statistics of its layers, and the models made from them. Decompositions are made once.

    `statistics`: over `calibration_samples` samples, with gradient moments where `two_sided` is asked for. `labelled`:
    statistics for `fwsvd` under the labels of the task, where they are others. `floor`: of `allocate_ranks`. `probe_samples`,
    `probe_keep`, `seed`: the training samples and the share kept at which 'measured' looks at one layer after another.
    `in_memory`: keep the factors of all layers at full rank in float64; without, every model is decomposed anew.
    """

    model: nn.Module
    task: Task
    statistics: Mapping[str, LayerStatistics]
    calibration_samples: int
    labelled: Mapping[str, LayerStatistics] | None = None
    floor: float = 0.1
    probe_samples: int = 128
    probe_keep: float = 0.2
    batch_size: int = 64
    seed: int = 0
    in_memory: bool = True
    _bases: dict[tuple[str, bool], dict[str, Factors]] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(layer.weight.shape) for name, layer in self.task.linears(self.model).items()}

    @cached_property
    def biased(self) -> bool:
        return any(layer.bias is not None for layer in self.task.linears(self.model).values())

    @cached_property
    def dense(self) -> dict[str, float]:
        """Quality of the dense model."""
        return self.task.evaluate(self.model, batch_size=self.batch_size)

    def _given(self, method: str) -> Mapping[str, LayerStatistics]:
        return self.labelled if method == "fwsvd" and self.labelled is not None else self.statistics

    def basis(self, method: str, centre: bool = False) -> dict[str, Factors]:
        """The full-rank factors of every targeted layer."""
        if (method, centre) not in self._bases:
            self._bases[method, centre] = decompose(self.model, method, self._given(method), self.shapes, centre=centre)
        return self._bases[method, centre]

    def spectra(self, method: str, centre: bool = False) -> dict[str, torch.Tensor]:
        """layer -> singular values of one method."""
        return {name: factors.spectrum.cpu() for name, factors in self.basis(method, centre).items()}

    @cached_property
    def alone(self) -> list[dict[str, Any]]:
        """What truncating each layer alone does to the dense predictions, at `probe_keep`, pivoted: one row per layer, `layer`,
        `rank`, `predicted` by the discarded two-sided spectrum (half of its energy) and `measured` as the divergence from the
        dense predictions, both per target."""
        way, device = Way("two_sided", "pivoted", self.biased), device_of(self.model)
        spectra, distance = self.spectra("two_sided", self.biased), self.task.divergence(self.model)
        samples = self.task.batches("train", self.batch_size, samples=self.probe_samples, seed=self.seed + 1)
        probes = [to_device(batch, device) for batch in samples]
        losses = OBJECTIVES[self.task.objective].losses
        with torch.no_grad():
            targets = [len(losses(logits(self.model, batch), labels(batch))) for batch in probes]
        seen = self.calibration_samples * sum(targets) / self.probe_samples
        rows = []
        for name, rank in self.ranks(way, self.probe_keep).items():
            smaller = self.compressed(way, {name: rank})
            with torch.no_grad():
                caused = sum(distance(smaller, b).item() * n for b, n in zip(probes, targets, strict=True)) / sum(
                    targets
                )
            predicted = spectra[name][rank:].square().sum().item() / 2 / seen
            rows.append({"layer": name, "rank": rank, "predicted": predicted, "measured": caused})
        return rows

    @cached_property
    def scales(self) -> dict[str, float]:
        """layer -> measured over predicted, where that is within `TRUSTED` times the median of all layers."""
        ratios = {row["layer"]: max(row["measured"], 0.0) / max(row["predicted"], 1e-300) for row in self.alone}
        middle = median(ratios.values())
        return {name: min(max(ratio, middle / TRUSTED), middle * TRUSTED) for name, ratio in ratios.items()}

    def ranks(self, way: Way, keep: float) -> dict[str, int]:
        """layer -> rank within a budget."""
        if way.policy not in POLICIES:
            raise ValueError(f"`way` must have a policy among {list(POLICIES)}, got {way.policy!r}.")
        spectra, weights = None, None
        if way.policy == "relative":
            spectra = self.spectra("whitened")
            weights = {name: 1 / sigma.square().sum().item() for name, sigma in spectra.items()}
        elif way.policy != "uniform":
            spectra = self.spectra("two_sided", self.biased)
            weights = self.scales if way.policy == "measured" else None
        return allocate_ranks(self.shapes, keep, spectra, weights=weights, storage=way.storage, floor=self.floor)

    def compressed(self, way: Way, ranks: Mapping[str, int]) -> nn.Module:
        """A copy of the model with layers at given ranks."""
        smaller = copy.deepcopy(self.model)
        factors = self.basis(way.method, way.centre) if self.in_memory else None
        compress(smaller, ranks, way.method, self._given(way.method), way.storage, centre=way.centre, factors=factors)
        return smaller

    def quality(self, smaller: nn.Module) -> dict[str, int | float]:
        """What a model stores and how good it is on the held-out split; `added_loss`: over the dense model."""
        found = self.task.evaluate(smaller, batch_size=self.batch_size)
        counts = parameter_counts(smaller, self.model, self.task.layers)
        return counts | found | {"added_loss": found["loss"] - self.dense["loss"]}

    def run(self, ways: Mapping[str, Way], keeps: Sequence[float]) -> list[dict[str, Any]]:
        """One row per way and share kept: `way`, `keep`, and the quality.

        **Raises:** `AssertionError`: a model stores more than its budget.
        """
        rows = []
        for name, way in ways.items():
            for keep in keeps:
                row = self.quality(self.compressed(way, self.ranks(way, keep)))
                assert row["keep_targeted"] <= keep + 1e-9
                rows.append({"way": name, "keep": keep} | row)
        return rows
