"""LoRA ranks from the spectra of weight deltas: rules, a JSON file, and the exact `peft.LoraConfig`.

The file (`lora_rank_config.json`, format "lowrank.rank_config/1") has these keys: `format`; `model`, a name or null;
`layer_ranks`, type of layer -> median rank; `module_ranks`, module -> exact rank; `modules`, module -> `out`, `in`, `raw_rank`,
`energy` and `relative_error` at the final rank, `status`; `parameters` of the adapter; `compression_ratio`, these over those of
the weights; `analysis_metadata`, the rule and its numbers; `hashes` of `base` and `tuned`; `versions`.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.deltas import DeltaSpectrum, delta_factors, delta_spectra

__all__ = [
    "DeltaSpectrum",
    "RankConfig",
    "delta_factors",
    "delta_spectra",
    "layer_type",
    "power_of_two",
    "rank_for_delta",
    "ranks_for_budget",
    "smooth_ranks",
    "uniform_ranks",
]

FORMAT = "lowrank.rank_config/1"
MIN_RANK, MAX_RANK, THRESHOLD, SMOOTHING = 4, 128, 0.9, 0.8
TIE = 1e-12  # relative: rounding of sums decides nothing


def rank_for_delta(
    singular_values: Tensor | Sequence[float],
    threshold: float | int,
    min_rank: int = MIN_RANK,
    max_rank: int = MAX_RANK,
    total: float | None = None,
) -> int:
    """The smallest rank whose share of ||Delta||_F^2 reaches a threshold, within bounds.

    **Arguments:** `singular_values`: `(k,)`, any order; all of them, or the largest with `total`. `threshold`: in (0, 1]; 1 asks
    for the numerical rank, the number of values above k eps sigma_1 with float32's eps. `min_rank`, `max_rank`: 1 <= min <= max.
    `total`: ||Delta||_F^2 where only the largest values are given; without it their own energy would pass for all there is.

    **Returns:** an int in [min_rank, max_rank], never more than there are values where `total` is not given; 0 for a zero delta.
    Where the values given do not reach the threshold: `max_rank`.

    **Raises:** `ValueError`: a number out of its range, values that are negative or not finite, a total below their energy.
    """
    values = torch.as_tensor(singular_values).double().flatten().sort(descending=True).values
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be in (0, 1], got {threshold}.")
    if not 1 <= min_rank <= max_rank:
        raise ValueError(f"`min_rank` must be in [1, `max_rank`], got {min_rank} with `max_rank` {max_rank}.")
    if not len(values) or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("`singular_values` must be finite and >= 0, at least one.")
    largest = float(values[0])
    if largest == 0:
        return 0
    energy = (values / largest).square().cumsum(0)  # tiny deltas must not vanish when squared
    whole = float(energy[-1]) if total is None else total / largest / largest
    if whole < float(energy[-1]) * (1 - 1e-6):
        raise ValueError(
            f"`total` must be at least the energy of the values, {float(energy[-1]) * largest**2}, got {total}."
        )
    if threshold == 1 and total is None:
        raw = int((values > len(values) * torch.finfo(torch.float32).eps * largest).sum())
    else:
        raw = int((energy < threshold * whole * (1 - TIE)).sum()) + 1
    bounded = max(min_rank, min(raw, max_rank))
    return bounded if total is not None else min(bounded, len(values))


def power_of_two(rank: int, min_rank: int = MIN_RANK, max_rank: int = MAX_RANK) -> int:
    """The power of two that is nearest on a log scale, for ranks above 16, within bounds; others as they are. May go below what
    a threshold asks for."""
    rounded = 2 ** round(torch.tensor(float(rank), dtype=torch.float64).log2().item()) if rank > 16 else rank
    return max(min_rank, min(rounded, max_rank)) if rank else 0


def layer_type(name: str) -> str:
    """The last part of a module's name: `model.layers.3.mlp.up_proj` -> `up_proj`."""
    return name.rpartition(".")[2]


def smooth_ranks(ranks: Mapping[str, int], groups: Mapping[str, str], factor: float | int) -> dict[str, int]:
    """Draws ranks towards the mean of their group: int(factor * mean + (1 - factor) * rank).

    A mean of bounded ranks is within the bounds. Ranks of 0 (nothing changed) stay 0 and count in no mean.

    **Arguments:** `groups`: name -> group, for instance its `layer_type`. `factor`: in [0, 1]; 0 changes nothing, 1 gives equal
    ranks in a group.

    **Raises:** `ValueError`: a factor out of its range; a name without a group.
    """
    if not 0 <= factor <= 1:
        raise ValueError(f"`factor` must be in [0, 1], got {factor}.")
    if lacking := sorted(ranks.keys() - groups.keys()):
        raise ValueError(f"`groups` must name a group for every layer, got none for {lacking[0]!r}.")
    members: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        if rank:
            members.setdefault(groups[name], []).append(rank)
    share = Fraction(str(factor))  # as written: 0.8 * 36 + 0.2 * 4 must not fall short of an integer by rounding
    return {
        name: int(share * Fraction(sum(own), len(own)) + (1 - share) * rank)
        if rank and (own := members[groups[name]])
        else 0
        for name, rank in ranks.items()
    }


def ranks_for_budget(
    spectra: Mapping[str, DeltaSpectrum],
    parameters: int,
    *,
    min_rank: int = 0,
    max_rank: int | None = None,
) -> dict[str, int]:
    """Ranks that keep the most energy sum sigma^2 over all layers within a number of adapter parameters, r (out + in) each.

    The globally largest sigma^2 per parameter come first; energies are absolute, so that a layer that barely changed gets little,
    whatever the shape of its spectrum. What the next value in order no longer fits into goes to smaller ones that do.

    **Arguments:** `parameters`: >= what `min_rank` costs. `min_rank`: of every layer that changed. `max_rank`: None for no bound
    but the shape's.

    **Returns:** layer -> rank, in the order of `spectra`; 0 where none is worth it.

    **Raises:** `ValueError`: a budget below the minimum, with what that is.
    """
    alive = {name: s for name, s in spectra.items() if s.total > 0}
    caps = {name: min(len(s.sigma), max_rank or len(s.sigma)) for name, s in alive.items()}
    ranks = dict.fromkeys(spectra, 0) | {name: min(min_rank, caps[name]) for name in alive}
    left = parameters - sum(rank * sum(spectra[name].shape) for name, rank in ranks.items())
    if parameters < 1 or left < 0:
        raise ValueError(
            f"`parameters` must be at least {max(1, parameters - left)} for `min_rank` {min_rank}, got {parameters}."
        )
    steps = [
        (-(float(sigma) ** 2) / sum(s.shape), name, index, sum(s.shape))
        for name, s in alive.items()
        for index, sigma in enumerate(s.sigma[: caps[name]].tolist())
        if index >= ranks[name]
    ]
    closed: set[str] = set()
    for _, name, index, cost in sorted(steps):
        if name in closed or cost > left:
            closed.add(name)  # a later value of a layer counts only on top of the earlier ones
            continue
        ranks[name], left = index + 1, left - cost
    return ranks


@dataclass(frozen=True)
class RankConfig:
    """Exact LoRA ranks by module, with what led to them; see the module's docstring for the file.

    `module_ranks`: module -> rank; modules whose weights did not change are left out. `modules`: module -> figures at the final
    rank. `analysis_metadata`: the rule.
    """

    module_ranks: dict[str, int]
    modules: dict[str, dict[str, Any]]
    analysis_metadata: dict[str, Any]
    model: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_spectra(
        cls,
        spectra: Mapping[str, DeltaSpectrum],
        *,
        threshold: float | int = THRESHOLD,
        min_rank: int = MIN_RANK,
        max_rank: int = MAX_RANK,
        smoothing: float | int = SMOOTHING,
        powers_of_two: bool = False,
        per: str = "module",
        parameters: int | None = None,
        model: str | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> "RankConfig":
        """Ranks by the threshold rule, or by a budget.

        **Arguments:** `threshold`, `min_rank`, `max_rank`: as in `rank_for_delta`; a layer whose delta looks like noise gets
        `min_rank`. `smoothing`: factor of `smooth_ranks` in each type of layer. `powers_of_two`: round ranks above 16, before the
        smoothing. `per`: 'module', or 'type' for one rank for all modules of a type, their median. `parameters`: a budget, exact;
        replaces threshold, rounding and smoothing by `ranks_for_budget`. `model`, `hashes`: kept in the file.

        **Raises:** `ValueError`: as the rules; no spectrum; every delta zero.
        """
        if per not in ("module", "type"):
            raise ValueError(f"`per` must be 'module' or 'type', got {per!r}.")
        alive = {name: s for name, s in sorted(spectra.items()) if s.total > 0}
        if not alive:
            raise ValueError("`spectra` must have a layer that changed, got none.")
        raw = {name: rank_for_delta(s.sigma, threshold, min_rank, max_rank) for name, s in alive.items()}
        groups = {name: layer_type(name) for name in alive}
        if parameters is not None:
            ranks = ranks_for_budget(alive, parameters, min_rank=0, max_rank=max_rank)
            rule: dict[str, Any] = {"rule": "budget", "parameters": parameters, "max_rank": max_rank}
        else:
            bounded = {
                name: min(min_rank, len(s.sigma)) if s.status == "noise" else raw[name] for name, s in alive.items()
            }
            if powers_of_two:
                bounded = {
                    name: min(power_of_two(rank, min_rank, max_rank), len(alive[name].sigma))
                    for name, rank in bounded.items()
                }
            smooth = smooth_ranks(bounded, groups, smoothing)
            ranks = {name: min(rank, len(alive[name].sigma)) for name, rank in smooth.items()}
            rule = {
                "rule": "threshold",
                "svd_threshold": threshold,
                "min_rank": min_rank,
                "max_rank": max_rank,
                "smoothing_factor": smoothing,
                "powers_of_two": powers_of_two,
            }
        if per == "type":
            types = _medians(ranks)
            ranks = {name: min(types[groups[name]], len(alive[name].sigma)) for name in ranks}
        return cls.from_ranks(alive, ranks, rule | {"per": per}, model=model, hashes=hashes)

    @classmethod
    def from_ranks(
        cls,
        spectra: Mapping[str, DeltaSpectrum],
        ranks: Mapping[str, int],
        rule: Mapping[str, Any],
        *,
        model: str | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> "RankConfig":
        """Given ranks, with their figures. `rule`: how they came about, kept as `analysis_metadata`.

        **Raises:** `ValueError`: a rank for a layer without a spectrum, or one that its shape does not allow.
        """
        for name, rank in ranks.items():
            largest = len(spectra[name].sigma) if name in spectra else 0
            if not 0 <= rank <= largest:
                raise ValueError(f"`ranks` must be in [0, {largest}] for {name!r}, got {rank}.")
        rows = {}
        for name, s in sorted(spectra.items()):
            energy = s.energy(ranks.get(name, 0))
            rows[name] = {
                "out": s.shape[0],
                "in": s.shape[1],
                "raw_rank": rank_for_delta(s.sigma, rule.get("svd_threshold", THRESHOLD), 1, len(s.sigma)),
                "energy": energy,
                "relative_error": max(0.0, 1 - energy) ** 0.5,
                "status": s.status,
            }
        used = {package: version(package) for package in ("torch", "safetensors")}
        kept = {name: rank for name, rank in sorted(ranks.items()) if rank}
        return cls(kept, rows, dict(rule), model, dict(hashes or {}), used)

    @property
    def layer_ranks(self) -> dict[str, int]:
        """Type of layer -> median rank of its modules, as the published file has it; the exact ones are in `module_ranks`."""
        return _medians(self.module_ranks)

    @property
    def parameters(self) -> int:
        """Of the adapter: r (out + in) for each module."""
        return sum(
            rank * (self.modules[name]["out"] + self.modules[name]["in"]) for name, rank in self.module_ranks.items()
        )

    @property
    def compression_ratio(self) -> float:
        """Parameters of the adapter over those of the weights it stands for, all modules that changed; may exceed 1."""
        return self.parameters / sum(row["out"] * row["in"] for row in self.modules.values())

    def save(self, path: Path | str) -> None:
        """Writes the file, whole or not at all; the same config gives the same bytes."""
        path = Path(path)
        figures = {
            "layer_ranks": self.layer_ranks,
            "parameters": self.parameters,
            "compression_ratio": self.compression_ratio,
        }
        text = json.dumps({"format": FORMAT} | asdict(self) | figures, indent=1, sort_keys=True, allow_nan=False)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text + "\n", encoding="utf8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path | str) -> "RankConfig":
        """Reads what `save` wrote.

        **Raises:** `FileNotFoundError`. `ValueError`: no JSON; another format or version; a key that is missing; a rank that
        is no int >= 1 or exceeds its module.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"`path` must be a file written by RankConfig.save, got {str(path)!r}, which does not exist."
            )
        try:
            about = json.loads(path.read_text(encoding="utf8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"`path` must be whole JSON, got {str(path)!r}: {error}.") from error
        given = about.get("format") if isinstance(about, dict) else about
        if given != FORMAT:
            raise ValueError(f"`path` must have format {FORMAT!r}, got {given!r} in {str(path)!r}.")
        keys = ("module_ranks", "modules", "analysis_metadata", "model", "hashes", "versions")
        if lacking := [key for key in keys if key not in about]:
            raise ValueError(f"`path` must have the key {lacking[0]!r}, got none in {str(path)!r}.")
        for name, rank in about["module_ranks"].items():
            row = about["modules"].get(name, {})
            largest = min(row.get("out", 0), row.get("in", 0))
            if type(rank) is not int or not 1 <= rank <= largest:
                raise ValueError(
                    f"`path` must have ranks in [1, {largest}] for {name!r}, got {rank!r} in {str(path)!r}."
                )
        return cls(**{key: about[key] for key in keys})

    def lora_config(self, model: nn.Module, *, scaling: float | int = 1.0, **peft_options: Any) -> Any:
        """The `peft.LoraConfig` with exactly these ranks, and one scaling on every module whatever its rank.

        Names are anchored, so that `layers.1` is not found in `layers.11` nor in a second tower.

        **Arguments:** `model`: the one that the adapter is for. `scaling`: what peft multiplies B A by: alpha / r, or alpha /
        sqrt(r) with `use_rslora`. `peft_options`: others of `LoraConfig`.

        **Raises:** `ValueError`: a module that the model lacks or has in another shape; an option that this method sets itself.
        """
        import peft  # noqa: PLC0415

        own = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}
        if clash := sorted(own & peft_options.keys()):
            raise ValueError(f"`peft_options` must leave {clash[0]!r} to the ranks of this file.")
        modules = dict(model.named_modules())
        for name in self.module_ranks:
            row = self.modules[name]
            wanted, given = (row["out"], row["in"]), _sides(modules.get(name))
            if given != wanted:
                raise ValueError(
                    f"`model` must have the modules of this file: {name!r} should be {wanted}, got {given or 'none'}."
                )
        root = 0.5 if peft_options.get("use_rslora") else 1.0
        patterns = {f"^{re.escape(name)}": rank for name, rank in self.module_ranks.items()}
        first = next(iter(self.module_ranks.values()))
        return peft.LoraConfig(
            r=first,
            lora_alpha=scaling * first**root,  # pyright: ignore[reportArgumentType] (a float will do)
            target_modules="|".join(map(re.escape, self.module_ranks)),
            rank_pattern=patterns,
            alpha_pattern={pattern: scaling * rank**root for pattern, rank in patterns.items()},
            **peft_options,
        )


def _medians(ranks: Mapping[str, int]) -> dict[str, int]:
    types: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        if rank:
            types.setdefault(layer_type(name), []).append(rank)
    return {kind: int(median(own)) for kind, own in sorted(types.items())}


def _sides(module: nn.Module | None) -> tuple[int, ...] | None:
    """The sides of a module's weight as a checkpoint has it; kernels flattened."""
    weight = getattr(module, "weight", None)
    return tuple(weight.flatten(1).shape) if isinstance(weight, Tensor) and weight.dim() >= 2 else None


def uniform_ranks(shapes: Mapping[str, tuple[int, int]], parameters: int) -> dict[str, int]:
    """One rank for all layers, the largest within a number of adapter parameters; what is left goes to the first layers."""
    cost = sum(map(sum, shapes.values()))
    ranks = dict.fromkeys(shapes, min(parameters // cost, *(min(shape) for shape in shapes.values())))
    left = parameters - sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    for name, shape in shapes.items():
        if ranks[name] < min(shape) and sum(shape) <= left:
            ranks[name], left = ranks[name] + 1, left - sum(shape)
    return ranks
