"""Scores of every layer of a model as a file.

The file (`*_scores.json`, format "lowrank.scores/1") has the keys of the published schema, and `format`, `window`, `exact`,
`share_of_model`, the weights of the layers as a share of all parameters, and `left_out`, stacks of matrices without a score.
Each row of `layers` has the published keys, and `block`, `raw_metric` (null if there is none), `status`, and the norms of the
entries `norm_1`, `norm_2`, `norm_inf`. The published key of the score of a layer is `significance_score`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from lowrank.io.checks import require
from lowrank.io.records import read_record, write_record
from lowrank.io.schemas import Schema
from lowrank.io.weights import Source
from lowrank.nn.targets import BLOCKS
from lowrank.selection.layer_sizes import layer_sizes
from lowrank.selection.pruning_ratios import pruning_ratios

_FORMAT = "lowrank.scores/1"
_RATIO_KEYS = ("prunable", "epsilon", "mapping_type", "exact", "missing")  # settings that `pruning_ratios` needs


class _ScoredLayer(Schema):
    """Hold the fields of a row that are read again."""

    index: NonNegativeInt
    name: str
    block: str
    num_parameters: PositiveInt
    weight_shape: list[PositiveInt]
    raw_metric: float | None
    status: str
    pruning_ratio: float = Field(ge=0, le=1)
    significance_score: float = Field(ge=0, le=1)


class _ScoresRecord(Schema):
    layers: list[_ScoredLayer] = Field(min_length=1)
    layers_named: list[str] | None = None


@dataclass(frozen=True)
class Scores:
    """Hold the scores of the layers of a model.

    **Arguments**

    - `layers`: one row per layer, in the order of the model; see the docstring of the module for the keys.
    - `settings`: the other keys of the file: the model's name, the metric and the options of `ScoringConfig`.
    """

    layers: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Return the names of the layers."""
        return [row["name"] for row in self.layers]

    @property
    def values(self) -> list[float]:
        """Return the score of each layer in [0, 1], for `assign_layers`: 1 - its pruning ratio."""
        return [row["significance_score"] for row in self.layers]

    @property
    def costs(self) -> list[int]:
        """Return the number of parameters of each layer, for `assign_layers`."""
        return [row["num_parameters"] for row in self.layers]

    @property
    def ratios(self) -> dict[str, float]:
        """Return layer -> share to prune, for `lowrank.compression.pruning.prune`."""
        return {row["name"]: row["pruning_ratio"] for row in self.layers}

    def ratios_at(self, sparsity: float | int) -> dict[str, float]:
        """Compute the share of each layer to prune for another total, by the rule that made these scores.

        **Arguments**

        - `sparsity`: share of all weights to prune, in [0, 1).

        **Returns** layer -> share.

        **Raises**

        - `ValueError`: a share out of its range; scores whose settings do not say how they were made.
        """
        missing = [key for key in _RATIO_KEYS if key not in self.settings]
        require(not missing, "settings", "say how the scores were made", f"none for {missing}")
        sign = 1 if self.settings["prunable"] == "larger" else -1
        blocks = {row["name"]: row["block"] for row in self.layers}
        return pruning_ratios(
            {row["name"]: nan if row["raw_metric"] is None else sign * row["raw_metric"] for row in self.layers},
            dict(zip(self.names, self.costs, strict=True)),
            sparsity,
            self.settings["epsilon"],
            blocks if self.settings["mapping_type"] == "block_wise" else None,
            self.settings["exact"],
            self.settings["missing"],
        )

    def save(self, path: Path | str) -> None:
        """Write the file, whole or not at all; the same scores give the same bytes.

        **Arguments**

        - `path`: the file to write.
        """
        write_record(path, _FORMAT, self.settings | _summarize(self.layers) | {"layers": self.layers})

    @classmethod
    def load(cls, path: Path | str, model: Source | None = None) -> "Scores":
        """Read a file that `save` wrote.

        **Arguments**

        - `path`: the file.
        - `model`: check that the scores belong to this model, see `check`; None for no check.

        **Raises**

        - `FileNotFoundError`: no such file.
        - `ValueError`: the file is no JSON or has another format; a row lacks a key, has a value out of its range, or has the
          name of another row; another model.
        """
        record = read_record(path, _FORMAT, _ScoresRecord, "Scores.save")
        rows = record.pop("layers")
        repeated = sorted(name for name, count in Counter(row["name"] for row in rows).items() if count > 1)
        require(not repeated, "path", f"have one row per layer ({str(path)!r})", repeated)
        scores = cls(rows, {key: value for key, value in record.items() if key not in ("format", *_summarize(rows))})
        if model is not None:
            scores.check(model)
        return scores

    def check(self, model: Source) -> None:
        """Check that the layers are the same as in a model, by name and shape.

        **Arguments**

        - `model`: a model, a folder with safetensors, a safetensors file, or a Hub name.

        **Raises**

        - `ValueError`: a layer is missing in the model or in the scores, or has another shape.
        """
        sizes = layer_sizes(model, self.settings.get("layers_named", BLOCKS))
        scored = {row["name"]: tuple(row["weight_shape"]) for row in self.layers}
        for name in [*scored, *sizes]:
            if scored.get(name) != sizes.get(name):
                raise ValueError(
                    f"`model` must have the layers of these scores, got {sizes.get(name)} for {name!r}, which is "
                    f"{scored.get(name)} in the scores."
                )


def _summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the published keys that follow from the rows."""
    blocks: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        blocks.setdefault(row["block"], []).append(row)
    return {
        "total_parameters": sum(row["num_parameters"] for row in rows),
        "num_blocks": len(blocks),
        "num_prunable_layers": len(rows),
        "layers_per_block": len(rows) // len(blocks),
        "blocks": [_summarize_block(index, name, members) for index, (name, members) in enumerate(blocks.items())],
        "metadata": _summarize_columns(rows),
    }


def _summarize_block(index: int, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "block_index": index,
        "name": name,
        "start_layer_index": rows[0]["index"],
        "end_layer_index": rows[-1]["index"],
        "num_layers": len(rows),
        "total_parameters": sum(row["num_parameters"] for row in rows),
        "avg_significance": mean(row["significance_score"] for row in rows),
        "avg_pruning_ratio": mean(row["pruning_ratio"] for row in rows),
    }


def _summarize_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    columns = {
        "raw_metrics": [row["raw_metric"] for row in rows if row["raw_metric"] is not None],
        "pruning_ratios": [row["pruning_ratio"] for row in rows],
        "significance_scores": [row["significance_score"] for row in rows],
    }
    return {
        f"{column}_{kind}": function(values)
        for column, values in columns.items()
        for kind, function in (("min", min), ("max", max), ("mean", mean))
        if values
    }
