"""LoRA ranks of modules as a JSON file and as the exact `peft.LoraConfig`.

The file (`lora_rank_config.json`, format "lowrank.rank_config/1") has these keys: `format`; `model`, a name or null;
`layer_ranks`, type of layer -> median rank; `module_ranks`, module -> exact rank; `modules`, module -> `out`, `in`, `raw_rank`,
`energy` and `relative_error` at the final rank, `status`; `parameters` of the adapter; `compression_ratio`, these divided by the
parameters of the weights; `analysis_metadata`, the rule and its numbers; `hashes` of `base` and `tuned`; `versions`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt
from torch import nn

from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require, whole_number
from lowrank.io.records import read_record, write_record
from lowrank.io.schemas import Schema
from lowrank.lora.deltas import DeltaSpectrum
from lowrank.lora.module_names import find_modules
from lowrank.lora.rank_rule import RankRule, median_ranks
from lowrank.lora.ranks import rank_for_delta
from lowrank.nn.targets import is_conv1d

DEFAULT_RULE = RankRule()
_FORMAT = "lowrank.rank_config/1"
_RANK_OPTIONS = {"r", "target_modules", "rank_pattern", "alpha_pattern"}  # of peft, which `lora_config` sets


class _ModuleRecord(Schema):
    out: PositiveInt
    inputs: PositiveInt = Field(alias="in")


class _RankRecord(Schema):
    """Hold the fields of the file that are read again: those of `RankConfig`."""

    module_ranks: dict[str, int]
    modules: dict[str, _ModuleRecord]
    analysis_metadata: dict[str, Any]
    model: str | None
    hashes: dict[str, str]
    versions: dict[str, str]


@check_arguments
@dataclass(frozen=True)
class RankConfig:
    """Hold exact LoRA ranks by module and how they were chosen; see the docstring of the module for the file.

    **Arguments**

    - `module_ranks`: module -> rank >= 1; modules without an adapter are left out.
    - `modules`: module -> figures at its rank, for all modules whose weights changed.
    - `analysis_metadata`: the rule and its numbers.
    - `model`: name of the model, or None.
    - `hashes`: 'base' and 'tuned' -> hash of the checkpoint.
    - `versions`: package -> version.
    """

    module_ranks: dict[str, int]
    modules: dict[str, dict[str, Any]]
    analysis_metadata: dict[str, Any]
    model: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    @check_arguments
    def from_spectra(
        cls,
        spectra: Mapping[str, DeltaSpectrum],
        rule: RankRule = DEFAULT_RULE,
        *,
        model: str | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> "RankConfig":
        """Choose ranks by a rule.

        **Arguments**

        - `spectra`: module -> spectrum of its change, see `lowrank.lora.deltas.delta_spectra`. Unchanged modules are left out.
        - `rule`: how ranks are chosen.
        - `model`, `hashes`: kept in the file.

        **Raises**

        - `ValueError`: no spectrum; every change is zero.
        """
        changed = {name: spectrum for name, spectrum in sorted(spectra.items()) if spectrum.total > 0}
        if not changed:
            raise ValueError("`spectra` must have a layer that changed, got none.")
        return cls.from_ranks(changed, rule.choose_ranks(changed), rule.metadata, model=model, hashes=hashes)

    @classmethod
    @check_arguments
    def from_ranks(
        cls,
        spectra: Mapping[str, DeltaSpectrum],
        ranks: Mapping[str, int | float],
        metadata: Mapping[str, Any],
        *,
        model: str | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> "RankConfig":
        """Take ranks as they are and compute their figures.

        **Arguments**

        - `spectra`: module -> spectrum of its change.
        - `ranks`: module -> whole number in [0, min(out, in)], of any type; 0 for no adapter.
        - `metadata`: how the ranks were chosen, kept as `analysis_metadata`.
        - `model`, `hashes`: kept in the file.

        **Raises**

        - `ValueError`: a rank for a module without a spectrum; a rank that its shape does not allow.
        """
        for name, rank in ranks.items():
            largest = len(spectra[name].sigma) if name in spectra else 0
            if not 0 <= rank <= largest:
                raise ValueError(f"`ranks` must be in [0, {largest}] for {name!r}, got {rank}.")
        whole = {name: whole_number(rank, f"ranks[{name!r}]", 0) for name, rank in ranks.items()}
        threshold = metadata.get("svd_threshold", DEFAULT_RULE.threshold)
        rows = {name: _describe(spectrum, whole.get(name, 0), threshold) for name, spectrum in sorted(spectra.items())}
        kept = {name: rank for name, rank in sorted(whole.items()) if rank}
        versions = {package: version(package) for package in ("torch", "safetensors")}
        return cls(kept, rows, dict(metadata), model, dict(hashes or {}), versions)

    @property
    def layer_ranks(self) -> dict[str, int]:
        """Return type of layer -> median rank of its modules, as in the published file; `module_ranks` has the exact ones."""
        return median_ranks(self.module_ranks)

    @property
    def parameters(self) -> int:
        """Count the parameters of the adapter: r (out + in) for each module."""
        return sum(
            rank * (self.modules[name]["out"] + self.modules[name]["in"]) for name, rank in self.module_ranks.items()
        )

    @property
    def compression_ratio(self) -> float:
        """Divide the parameters of the adapter by those of all modules that changed; may exceed 1."""
        return self.parameters / (sum(row["out"] * row["in"] for row in self.modules.values()) or 1)

    @check_arguments
    def save(self, path: Path | str) -> None:
        """Write the file, whole or not at all; the same config gives the same bytes.

        **Arguments**

        - `path`: the file to write.
        """
        figures = {
            "layer_ranks": self.layer_ranks,
            "parameters": self.parameters,
            "compression_ratio": self.compression_ratio,
        }
        write_record(path, _FORMAT, asdict(self) | figures)

    @classmethod
    @check_arguments
    def load(cls, path: Path | str) -> "RankConfig":
        """Read a file that `save` wrote.

        **Arguments**

        - `path`: the file.

        **Raises**

        - `FileNotFoundError`: no such file.
        - `ValueError`: the file is no JSON or has another format; a key is missing or of another type; a rank is no int >= 1 or
          exceeds its module.
        """
        record = read_record(path, _FORMAT, _RankRecord, "RankConfig.save")
        for name, rank in record["module_ranks"].items():
            row = record["modules"].get(name, {"out": 0, "in": 0})
            largest = min(row["out"], row["in"])
            if not 1 <= rank <= largest:
                raise ValueError(
                    f"`path` must have ranks in [1, {largest}] for {name!r}, got {rank!r} in {str(path)!r}."
                )
        return cls(**{key: record[key] for key in _RankRecord.model_fields})

    @check_arguments
    def find_modules(self, model: nn.Module) -> dict[str, str]:
        """Find the modules of this file in a model, see `lowrank.lora.module_names.find_modules`.

        **Arguments**

        - `model`: the model of the adapter.

        **Returns** name in the file -> name in the model.

        **Raises**

        - `ValueError`: a module that the model does not have, or has in another shape, or has twice.
        """
        shapes = {name: (self.modules[name]["out"], self.modules[name]["in"]) for name in self.module_ranks}
        return find_modules(model, shapes)

    @check_arguments
    def lora_config(
        self,
        model: nn.Module,
        *,
        scaling: float | int | None = None,
        lora_alpha: float | int | None = None,
        **peft_options: Any,
    ) -> Any:
        """Build the `peft.LoraConfig` with exactly these ranks.

        By default every module has the same scaling, whatever its rank. Names are anchored, so that `layers.1` matches neither
        `layers.11` nor a second tower.

        **Arguments**

        - `model`: the model of the adapter.
        - `scaling`: the factor that peft multiplies B A by, > 0; None for 1.
        - `lora_alpha`: > 0, one alpha for all modules instead of one scaling. B A is multiplied by alpha / r, or with
          `use_rslora` by alpha / sqrt(r), r the rank of the module. None for `scaling`.
        - `peft_options`: other options of `peft.LoraConfig`.

        **Returns** a `peft.LoraConfig`.

        **Raises**

        - `ValueError`: no module with a rank; a module that the model does not have or has in another shape; an option that this
          method sets; both `scaling` and `lora_alpha`, or one that is not finite and > 0; the output projection of an
          `nn.MultiheadAttention`, which an adapter would not change.
        """
        import peft  # noqa: PLC0415

        if clash := sorted(_RANK_OPTIONS & peft_options.keys()):
            raise ValueError(f"`peft_options` must leave {clash[0]!r} to the ranks of this file.")
        if scaling is not None and lora_alpha is not None:
            raise ValueError(f"`scaling` must be left out if `lora_alpha` is set, got {scaling} and {lora_alpha}.")
        for name, number in (("scaling", scaling), ("lora_alpha", lora_alpha)):
            require(number is None or 0 < number < inf, name, "be None or finite and > 0", number)
        least = min((row["out"] + row["in"] for row in self.modules.values()), default=0)
        rule = f"give a module a rank of at least 1, which costs {least} parameters or more here"
        require(bool(self.module_ranks), "module_ranks", rule, self.module_ranks)
        power = 0.5 if peft_options.get("use_rslora") else 1.0
        unit = 1.0 if scaling is None else scaling
        alpha = lambda rank: lora_alpha if lora_alpha is not None else unit * rank**power  # noqa: E731
        names = self.find_modules(model)
        _refuse_read(model, names.values())
        if all(is_conv1d(model.get_submodule(name)) for name in names.values()):
            peft_options.setdefault("fan_in_fan_out", True)  # peft finds out itself, but warns
        patterns = {f"^{re.escape(names[name])}": rank for name, rank in self.module_ranks.items()}
        first = next(iter(self.module_ranks.values()))
        return peft.LoraConfig(
            r=first,
            lora_alpha=alpha(first),  # pyright: ignore[reportArgumentType] (peft takes a float too)
            target_modules="|".join(map(re.escape, names.values())),
            rank_pattern=patterns,
            alpha_pattern={pattern: alpha(rank) for pattern, rank in patterns.items()},
            **peft_options,
        )


def _refuse_read(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse modules whose weight the parent reads: an adapter beside it would never be called."""
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"`model` must call the modules of this file, got {name!r}, whose weight {type(parent).__name__} reads itself."
            )


def _describe(spectrum: DeltaSpectrum, rank: int, threshold: float | int) -> dict[str, Any]:
    """Return the row of `modules` for one module."""
    energy = spectrum.energy(rank)
    return {
        "out": spectrum.shape[0],
        "in": spectrum.shape[1],
        "raw_rank": rank_for_delta(spectrum.sigma, threshold, 1, len(spectrum.sigma)),
        "energy": energy,
        "relative_error": max(0.0, 1 - energy) ** 0.5,
        "status": spectrum.status,
    }
