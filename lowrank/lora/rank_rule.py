"""The rule that turns spectra of weight changes into LoRA ranks, with its options as one object."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any

from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require, whole_number
from lowrank.lora.deltas import DeltaSpectrum
from lowrank.lora.ranks import (
    MAX_RANK,
    MIN_RANK,
    layer_type,
    nearest_power_of_two,
    rank_for_delta,
    ranks_for_budget,
    smooth_ranks,
)


@check_arguments
@dataclass(frozen=True)
class RankRule:
    """Hold the options of the rule; `choose_ranks` applies it.

    Without `parameters` the threshold rule applies: the smallest rank that reaches the threshold, within bounds, moved towards
    the mean of its group. A layer whose change looks like noise starts from `min_rank`. With `parameters` the budget rule
    applies, see `lowrank.lora.ranks.ranks_for_budget`.

    **Arguments**

    - `threshold`: share of ||Delta||_F^2 to keep, in (0, 1]; threshold rule only.
    - `min_rank`: least rank, a whole number >= 1; threshold rule only.
    - `max_rank`: largest rank, a whole number >= min_rank.
    - `smoothing`: factor of `lowrank.lora.ranks.smooth_ranks`, in [0, 1]; threshold rule only.
    - `powers_of_two`: round ranks above 16 before the smoothing; threshold rule only.
    - `per`: 'module', or 'type' for one rank for all modules of a group, their median.
    - `group`: function module name -> group; by default the type of the layer.
    - `parameters`: budget of adapter parameters, >= 1; None for the threshold rule.

    **Raises**

    - `ValueError`: an option out of its range.
    """

    threshold: float | int = 0.9
    min_rank: int | float = MIN_RANK
    max_rank: int | float = MAX_RANK
    smoothing: float | int = 0.8
    powers_of_two: bool = False
    per: str = "module"
    group: Callable[[str], str] = layer_type
    parameters: int | float | None = None

    def __post_init__(self) -> None:
        rules = {
            "threshold": (0 < self.threshold <= 1, "be in (0, 1]"),
            "min_rank": (
                1 <= self.min_rank <= self.max_rank,
                f"be in [1, `max_rank`] for `max_rank` {self.max_rank}",
            ),
            "smoothing": (0 <= self.smoothing <= 1, "be in [0, 1]"),
            "per": (self.per in ("module", "type"), "be 'module' or 'type'"),
            "parameters": (self.parameters is None or 1 <= self.parameters < inf, "be None or >= 1"),
        }
        for name, (holds, rule) in rules.items():
            require(holds, name, rule, getattr(self, name))
        numbers: dict[str, Any] = {name: whole_number(getattr(self, name), name) for name in ("min_rank", "max_rank")}
        numbers["parameters"] = None if self.parameters is None else int(self.parameters)
        for name, number in numbers.items():  # a float without fraction, or of NumPy, which is no JSON
            object.__setattr__(self, name, number)

    def choose_ranks(self, spectra: Mapping[str, DeltaSpectrum]) -> dict[str, int]:
        """Choose the rank of every module.

        **Arguments**

        - `spectra`: module -> spectrum of its change, which is not zero.

        **Returns** module -> rank, in the order of `spectra`.
        """
        if self.parameters is None:
            ranks = self._apply_threshold(spectra)
        else:
            ranks = ranks_for_budget(spectra, int(self.parameters), max_rank=int(self.max_rank))
        if self.per == "type":
            types = median_ranks(ranks, self.group)
            ranks = {name: min(types[self.group(name)], len(spectra[name].sigma)) for name in ranks}
        return ranks

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the options that apply, under the keys of the published file."""
        if self.parameters is not None:
            rule = {"rule": "budget", "parameters": self.parameters, "max_rank": self.max_rank}
        else:
            rule = {
                "rule": "threshold",
                "svd_threshold": self.threshold,
                "min_rank": self.min_rank,
                "max_rank": self.max_rank,
                "smoothing_factor": self.smoothing,
                "powers_of_two": self.powers_of_two,
            }
        return rule | {"per": self.per}

    def _apply_threshold(self, spectra: Mapping[str, DeltaSpectrum]) -> dict[str, int]:
        bounds = int(self.min_rank), int(self.max_rank)
        ranks = {}
        for name, spectrum in spectra.items():
            sides = len(spectrum.sigma)
            noisy = spectrum.status == "noise"
            rank = min(bounds[0], sides) if noisy else rank_for_delta(spectrum.sigma, self.threshold, *bounds)
            ranks[name] = min(nearest_power_of_two(rank, *bounds), sides) if self.powers_of_two else rank
        smooth = smooth_ranks(ranks, {name: self.group(name) for name in spectra}, self.smoothing)
        return {name: min(rank, len(spectra[name].sigma)) for name, rank in smooth.items()}


def median_ranks(ranks: Mapping[str, int], group: Callable[[str], str] = layer_type) -> dict[str, int]:
    """Return the median rank of every group of modules, rounded down.

    **Arguments**

    - `ranks`: module -> rank; ranks of 0 do not count.
    - `group`: function module name -> group; by default the type of the layer.

    **Returns** group -> median rank, sorted by name.
    """
    members: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        if rank:
            members.setdefault(group(name), []).append(rank)
    return {name: int(median(values)) for name, values in sorted(members.items())}
