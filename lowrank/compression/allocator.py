"""What rules for ranks ask about a dense model: spectra, and how far compressed copies are from it."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.divergence import Divergence, mean_divergence, predictive_divergence
from lowrank.compression.checks import Statistics, check_statistics
from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import decompose, replace_layers, spectrum_of
from lowrank.compression.retarget import retarget_layers
from lowrank.factorization.factorize import Factors
from lowrank.factorization.precision import float64_device
from lowrank.factorization.rank_allocation import allocate_ranks
from lowrank.nn.batches import Batch, as_double, batches_on, device_of
from lowrank.nn.remembering import Remembering
from lowrank.nn.targets import find_linears

EXACT = 2**27  # parameters; what truncation costs larger models is far above float32's rounding, and float64 takes long
TRUSTED = 2.0  # a divergence too small to be measured must not move ranks by more than this


@dataclass(frozen=True)
class AllocationConfig:
    """Set what rules for ranks work with.

    **Arguments**

    - `floor`: share of its uniform rank that every layer keeps, see `allocate_ranks`. Default 0.1.
    - `probe_keep`: share kept of a layer that 'measured' truncates alone, in (0, 1]. Default 0.2.
    - `in_memory`: keep the factors of all layers at full rank in float64, so that each layer is decomposed once for all ranks;
      for weights (n, n) that is four times the memory of them in float32. Otherwise they are decomposed anew. Default True.
    - `progress`: show a bar over what takes long. Default False.
    """

    floor: float = 0.1
    probe_keep: float = 0.2
    in_memory: bool = True
    progress: bool = False


@dataclass(eq=False)
class Allocator:
    """Hold a dense model and all that a rule for ranks may ask about it.

    The model is never changed: what has to be measured is measured on a compressed copy, in float64 if the model is in float32.
    Everything is computed when it is first asked for, and once.

    **Arguments**

    - `model`: the dense model.
    - `layers`: names or patterns of the targeted layers.
    - `statistics`: layer name -> `LayerStatistics`, or None.
    - `probes`: batches that the statistics have not seen, for the rules that measure. Default none.
    - `divergence`: how predictions are compared, see `mean_divergence`. Default `predictive_divergence`, without labels.
    - `own_statistics`: method -> statistics of its own. Default none.
    - `config`: what rules work with.
    - `calibration`: batches that layers are retargeted on, for configurations that ask for it. Default none.
    """

    model: nn.Module
    layers: Iterable[str]
    statistics: Statistics | None
    probes: Sequence[Batch] = ()
    divergence: Divergence = predictive_divergence
    own_statistics: Mapping[str, Statistics] = field(default_factory=dict)
    config: AllocationConfig = AllocationConfig()
    calibration: Sequence[Batch] = ()
    trials: list[dict[str, Any]] = field(default_factory=list, init=False)
    _factors: dict[tuple[str, bool], dict[str, Factors]] = field(default_factory=dict, init=False)
    _spectra: dict[tuple[str, bool], dict[str, Tensor]] = field(default_factory=dict, init=False)
    _best: dict[tuple[Configuration, float], dict[str, int]] = field(default_factory=dict, init=False)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return layer name -> (out, in) of the targeted layers."""
        return {name: tuple(layer.weight.shape) for name, layer in find_linears(self.model, self.layers).items()}

    @cached_property
    def biased(self) -> bool:
        """Return whether any targeted layer has a bias."""
        return any(layer.bias is not None for layer in find_linears(self.model, self.layers).values())

    def statistics_for(self, method: str) -> Statistics | None:
        """Return the statistics that a method uses."""
        return self.own_statistics.get(method, self.statistics)

    def factors(self, method: str, centre: bool = False) -> dict[str, Factors]:
        """Return the full-rank factors of every targeted layer.

        **Arguments**

        - `method`: a key of `METHODS`.
        - `centre`: in the norm of the centred inputs.
        """
        key = method, centre
        if key not in self._factors:
            moments = self.statistics_for(method)
            self._factors[key] = decompose(self.model, method, moments, self.shapes, centre=centre)
        return self._factors[key]

    def spectra(self, method: str, centre: bool = False) -> dict[str, Tensor]:
        """Return layer name -> singular values of the matrix that a method truncates, on the CPU.

        **Arguments**

        - `method`: a key of `METHODS`.
        - `centre`: in the norm of the centred inputs.
        """
        key = method, centre
        if key not in self._spectra:
            if self.config.in_memory:
                found = {name: factors.spectrum.cpu() for name, factors in self.factors(method, centre).items()}
            else:
                found = dict(self._decompose_in_turn(method, centre))
            self._spectra[key] = found
        return self._spectra[key]

    def _decompose_in_turn(self, method: str, centre: bool) -> Iterator[tuple[str, Tensor]]:
        moments, linears = self.statistics_for(method), find_linears(self.model, self.shapes)
        check_statistics(linears, method, "factors", moments, centre)
        bar = tqdm(linears.items(), "spectra", unit="layer", leave=False, disable=not self.config.progress)
        for name, layer in bar:
            yield name, spectrum_of(layer, name, method, moments, centre)

    def compressed(self, configuration: Configuration, ranks: Mapping[str, int]) -> nn.Module:
        """Return a copy of the model with layers replaced at given ranks.

        **Arguments**

        - `configuration`: method, storage, centring and retargeting.
        - `ranks`: layer name -> rank.
        """
        smaller, moments = copy.deepcopy(self.model), self.statistics_for(configuration.method)
        if configuration.retarget is not None:
            retarget_layers(smaller, ranks, configuration, moments, self.calibration)
            return smaller
        factors = self.factors(configuration.method, configuration.centre) if self.config.in_memory else None
        replace_layers(smaller, ranks, configuration, moments, factors=factors)
        return smaller

    def spend(self, configuration: Configuration, keep: float | int, **options: Any) -> dict[str, int]:
        """Call `allocate_ranks` with what all rules have in common.

        **Arguments**

        - `configuration`: its storage and multiple decide.
        - `keep`: share of the targeted parameters to keep, in (0, 1].
        - `options`: further arguments of `allocate_ranks`.
        """
        common = dict(storage=configuration.storage, multiple=configuration.multiple, floor=self.config.floor)
        return allocate_ranks(self.shapes, keep, **common, **options)

    def measure(self, name: str, models: Iterable[nn.Module]) -> Iterator[float]:
        """Yield the mean divergence of each model from the dense one, over the probes.

        Ranks hang on these, which can be as small as float32's rounding: copies of a float32 model of at most `EXACT`
        parameters are measured in float64.

        **Arguments**

        - `name`: of the bar.
        - `models`: compressed copies of the model; they may end in float64.
        """
        exact = _has_float64(self.model)
        teacher = Remembering(copy.deepcopy(self.model).double() if exact else self.model)
        probes = list(batches_on(self.probes, device_of(self.model)))
        probes = [as_double(batch) for batch in probes] if exact else probes
        for smaller in tqdm(models, name, unit="model", leave=False, disable=not self.config.progress):
            yield mean_divergence(smaller.double() if exact else smaller, teacher, probes, self.divergence)

    @cached_property
    def alone(self) -> list[dict[str, Any]]:
        """Return what truncating each layer alone does to the dense predictions, at `probe_keep` and in pivot storage.

        **Returns** one row per layer: `layer`, `rank`, `predicted`, half of the discarded two-sided energy, summed over the
        calibration data, and `measured`, the mean divergence from the dense predictions.
        """
        configuration = Configuration("two_sided", "pivoted", self.biased)
        spectra, ranks = self.spectra("two_sided", self.biased), self.spend(configuration, self.config.probe_keep)
        models = (self.compressed(configuration, {name: rank}) for name, rank in ranks.items())
        return [
            {
                "layer": name,
                "rank": rank,
                "predicted": spectra[name][rank:].square().sum().item() / 2,
                "measured": caused,
            }
            for (name, rank), caused in zip(ranks.items(), self.measure("layers alone", models), strict=True)
        ]

    @cached_property
    def scales(self) -> dict[str, float]:
        """Return layer name -> measured over predicted divergence, kept within `TRUSTED` times the median of all layers."""
        ratios = {row["layer"]: max(row["measured"], 0.0) / max(row["predicted"], 1e-300) for row in self.alone}
        middle = median(ratios.values())
        return {name: min(max(ratio, middle / TRUSTED), middle * TRUSTED) for name, ratio in ratios.items()}

    def best(
        self,
        configuration: Configuration,
        keep: float | int,
        candidates: Sequence[tuple[dict[str, float], dict[str, int]]],
    ) -> dict[str, int]:
        """Return the ranks that bring the whole model nearest to the dense one; of equal ones the first.

        Equal ranks are measured once, and not at all if all are equal. `trials` gets a row for each candidate that was measured.

        **Arguments**

        - `configuration`: how to compress.
        - `keep`: the budget, for the rows.
        - `candidates`: (settings, ranks), for example `({"alpha": 0.0, "gamma": 1.0}, {...})`.
        """
        key = configuration, keep
        if key in self._best:
            return self._best[key]
        unlike: dict[tuple[int, ...], tuple[dict[str, float], dict[str, int]]] = {}
        for settings, ranks in candidates:
            unlike.setdefault(tuple(ranks.values()), (settings, ranks))
        found, measured = list(unlike.values()), [0.0]
        if len(found) > 1:
            plain = replace(configuration, retarget=None)  # the ranks are those of the dense model
            models = (self.compressed(plain, ranks) for _, ranks in found)
            measured = list(self.measure(configuration.allocation, models))
            about = {"allocation": configuration.allocation, "keep": keep}
            rows = zip(found, measured, strict=True)
            self.trials += [about | settings | {"divergence": caused} for (settings, _), caused in rows]
        self._best[key] = found[measured.index(min(measured))][1]
        return self._best[key]


def _has_float64(model: nn.Module) -> bool:
    """Return True for a float32 model on a device that computes in float64; a half-precision one may be too large to copy."""
    parameters = list(model.parameters())
    small = sum(p.numel() for p in parameters) <= EXACT and all(p.dtype == torch.float32 for p in parameters)
    return small and float64_device(device_of(model)) == device_of(model)
