"""LoRA ranks from the spectra of weight deltas as a JSON file and as the exact `peft.LoraConfig`.

The file (`lora_rank_config.json`, format "lowrank.rank_config/1") has these keys: `format`; `model`, a name or null;
`layer_ranks`, type of layer -> median rank; `module_ranks`, module -> exact rank; `modules`, module -> `out`, `in`, `raw_rank`,
`energy` and `relative_error` at the final rank, `status`; `parameters` of the adapter; `compression_ratio`, these over those of
the weights; `analysis_metadata`, the rule and its numbers; `hashes` of `base` and `tuned`; `versions`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from lowrank.io.records import read_record, write_record
from lowrank.lora.deltas import DeltaSpectrum
from lowrank.lora.ranks import (
    MAX_RANK,
    MIN_RANK,
    SMOOTHING,
    THRESHOLD,
    layer_type,
    power_of_two,
    rank_for_delta,
    ranks_for_budget,
    smooth_ranks,
)

FORMAT = "lowrank.rank_config/1"


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
        group: Callable[[str], str] = layer_type,
        parameters: int | None = None,
        model: str | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> "RankConfig":
        """Ranks by the threshold rule, or by a budget.

        **Arguments:** `threshold`, `min_rank`, `max_rank`: as in `rank_for_delta`; a layer whose delta looks like noise gets
        `min_rank`. `smoothing`: factor of `smooth_ranks` in each group of layers. `powers_of_two`: round ranks above 16, before
        the smoothing. `per`: 'module', or 'type' for one rank for all modules of a group, their median. `group`: module name ->
        its group, the type of the layer by default. `parameters`: a budget, exact; replaces threshold, rounding and smoothing by
        `ranks_for_budget`. `model`, `hashes`: kept in the file.

        **Raises:** `ValueError`: as the rules; no spectrum; every delta zero.
        """
        if per not in ("module", "type"):
            raise ValueError(f"`per` must be 'module' or 'type', got {per!r}.")
        alive = {name: s for name, s in sorted(spectra.items()) if s.total > 0}
        if not alive:
            raise ValueError("`spectra` must have a layer that changed, got none.")
        raw = {name: rank_for_delta(s.sigma, threshold, min_rank, max_rank) for name, s in alive.items()}
        groups = {name: group(name) for name in alive}
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
            types = _medians(ranks, group)
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
        return _medians(self.module_ranks, layer_type)

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
        figures = {
            "layer_ranks": self.layer_ranks,
            "parameters": self.parameters,
            "compression_ratio": self.compression_ratio,
        }
        write_record(path, FORMAT, asdict(self) | figures)

    @classmethod
    def load(cls, path: Path | str) -> "RankConfig":
        """Reads what `save` wrote.

        **Raises:** `FileNotFoundError`. `ValueError`: no JSON; another format or version; a key that is missing; a rank that
        is no int >= 1 or exceeds its module.
        """
        keys = ("module_ranks", "modules", "analysis_metadata", "model", "hashes", "versions")
        about = read_record(path, FORMAT, keys, "RankConfig.save")
        for name, rank in about["module_ranks"].items():
            row = about["modules"].get(name, {})
            largest = min(row.get("out", 0), row.get("in", 0))
            if type(rank) is not int or not 1 <= rank <= largest:
                raise ValueError(
                    f"`path` must have ranks in [1, {largest}] for {name!r}, got {rank!r} in {str(path)!r}."
                )
        return cls(**{key: about[key] for key in keys})

    def located(self, model: nn.Module) -> dict[str, str]:
        """The modules of this file in a model: name in the file -> name in the model.

        They differ where transformers writes checkpoints under older names than those of its modules, as for Qwen2.5-VL:
        `model.layers.0.mlp.up_proj` is `model.language_model.layers.0.mlp.up_proj`. Then the module is the only one of its shape
        that ends like the name, the more of the name the better, the number of the block at least.

        **Raises:** `ValueError`: a module that the model lacks, has in another shape, or has twice.
        """
        sides = {name: _sides(module) for name, module in model.named_modules()}
        found = {}
        for name in self.module_ranks:
            wanted = (self.modules[name]["out"], self.modules[name]["in"])
            ends = [name.split(".", count)[-1] for count in range(name.count(".") + 1)]
            ends = [end for end in ends if re.search(r"(^|\.)\d+\.", end)]
            likely = ([own for own in sides if own.endswith(f".{end}") and sides[own] == wanted] for end in ends)
            best = [name] if name in sides else next((own for own in likely if own), [])
            if len(best) != 1 or sides[best[0]] != wanted:
                given = sides.get(name) or (f"{best[0]!r} and {best[1]!r}" if best else "none")
                raise ValueError(
                    f"`model` must have the modules of this file: {name!r} should be {wanted}, got {given}."
                )
            found[name] = best[0]
        if len(set(found.values())) < len(found):
            raise ValueError("`model` must have a module of its own for each of this file, got one for two of them.")
        return found

    def lora_config(
        self,
        model: nn.Module,
        *,
        scaling: float | int | None = None,
        lora_alpha: float | int | None = None,
        **peft_options: Any,
    ) -> Any:
        """The `peft.LoraConfig` with exactly these ranks, and by default one scaling on every module whatever its rank.

        Names are anchored, so that `layers.1` is not found in `layers.11` nor in a second tower.

        **Arguments:** `model`: the one that the adapter is for. `scaling`: what peft multiplies B A by, 1 by default.
        `lora_alpha`: instead of it, one alpha: then B A is multiplied by alpha / r, or with `use_rslora` by alpha / sqrt(r), of
        each module's own rank. `peft_options`: others of `LoraConfig`.

        **Raises:** `ValueError`: a module that the model lacks or has in another shape; an option that this method sets itself;
        `scaling` and `lora_alpha` together.
        """
        import peft  # noqa: PLC0415

        own = {"r", "target_modules", "rank_pattern", "alpha_pattern"}
        if clash := sorted(own & peft_options.keys()):
            raise ValueError(f"`peft_options` must leave {clash[0]!r} to the ranks of this file.")
        if scaling is not None and lora_alpha is not None:
            raise ValueError(f"`scaling` must be left out where `lora_alpha` is given, got {scaling} and {lora_alpha}.")
        power = 0.5 if peft_options.get("use_rslora") else 1.0
        alpha = lambda rank: lora_alpha if lora_alpha is not None else (scaling or 1.0) * rank**power  # noqa: E731
        own_names = self.located(model)
        patterns = {f"^{re.escape(own_names[name])}": rank for name, rank in self.module_ranks.items()}
        first = next(iter(self.module_ranks.values()))
        return peft.LoraConfig(
            r=first,
            lora_alpha=alpha(first),  # pyright: ignore[reportArgumentType] (a float will do)
            target_modules="|".join(map(re.escape, own_names.values())),
            rank_pattern=patterns,
            alpha_pattern={pattern: alpha(rank) for pattern, rank in patterns.items()},
            **peft_options,
        )


def _medians(ranks: Mapping[str, int], group: Callable[[str], str]) -> dict[str, int]:
    types: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        if rank:
            types.setdefault(group(name), []).append(rank)
    return {kind: int(median(own)) for kind, own in sorted(types.items())}


def _sides(module: nn.Module | None) -> tuple[int, ...] | None:
    """The sides of a module's weight as a checkpoint has it; kernels flattened."""
    weight = getattr(module, "weight", None)
    return tuple(weight.flatten(1).shape) if isinstance(weight, Tensor) and weight.dim() >= 2 else None
