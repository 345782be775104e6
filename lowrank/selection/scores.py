"""Which layers matter: scores of every layer of a model as a file, and the runs of layers that budgets buy.

The file (`*_scores.json`, format "lowrank.scores/1") has the keys of the published schema, and `format`, `window`, `exact`; each
row of `layers` has besides the published ones `block`, `raw_metric` (null where there is none), `status`, and the entrywise norms
`norm_1`, `norm_2`, `norm_inf`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from lowrank.io.records import read_record, write_record
from lowrank.io.weights import CONFIG, Source, named, opened
from lowrank.nn.targets import BLOCKS, is_conv1d

FORMAT = "lowrank.scores/1"
ROW = {
    "index",
    "name",
    "block",
    "num_parameters",
    "weight_shape",
    "raw_metric",
    "status",
    "pruning_ratio",
    "significance_score",
}


@dataclass(frozen=True)
class Scores:
    """`layers`: one row for each layer, in the order of the model. `about`: how they came about, the other keys of the file."""

    layers: list[dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [row["name"] for row in self.layers]

    @property
    def values(self) -> list[float]:
        """Significance, for `assign_layers`."""
        return [row["significance_score"] for row in self.layers]

    @property
    def costs(self) -> list[int]:
        """Parameters, for `assign_layers`."""
        return [row["num_parameters"] for row in self.layers]

    @property
    def ratios(self) -> dict[str, float]:
        """Layer -> share to prune, for `lowrank.compression.pruning.prune`."""
        return {row["name"]: row["pruning_ratio"] for row in self.layers}

    def save(self, path: Path | str) -> None:
        """Writes the file, whole or not at all; the same scores give the same bytes."""
        write_record(path, FORMAT, self.about | _summary(self.layers) | {"layers": self.layers})

    @classmethod
    def load(cls, path: Path | str, model: Source | None = None) -> "Scores":
        """Reads what `save` wrote. `model`: the one that it should be of, by names and shapes of its layers.

        **Raises:** `FileNotFoundError`. `ValueError`: no JSON, another format, a row without a key or with a cost that is no
        integer >= 1, another model.
        """
        about = read_record(path, FORMAT, ("layers",), "Scores.save")
        rows = about.pop("layers")
        if not rows:
            raise ValueError(f"`path` must have rows under 'layers', got none in {str(path)!r}.")
        for row in rows:
            if lacking := sorted(ROW - row.keys()):
                raise ValueError(f"`path` must have {lacking[0]!r} in every row, got none in row {row.get('index')}.")
            if type(row["num_parameters"]) is not int or row["num_parameters"] < 1:
                raise ValueError(
                    f"`path` must have integers >= 1 as num_parameters, got {row['num_parameters']!r} for {row['name']!r}."
                )
        scores = cls(rows, {key: value for key, value in about.items() if key not in ("format", *_summary(rows))})
        if model is not None:
            scores.check(model)
        return scores

    def check(self, model: Source) -> None:
        """**Raises:** `ValueError`: a layer that the model lacks or has in another shape, or one of the model's without a row."""
        sizes = layer_sizes(model, self.about.get("layers_named", BLOCKS))
        own = {row["name"]: tuple(row["weight_shape"]) for row in self.layers}
        for name in [*own, *sizes]:
            if own.get(name) != sizes.get(name):
                raise ValueError(
                    f"`model` must have the layers of these scores: {name!r} is {own.get(name)} there, {sizes.get(name)} here."
                )


def layer_sizes(model: Source, layers: Iterable[str] = BLOCKS) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of the layers of a model, from the model itself (on the meta device too) or the headers of its files;
    never guessed from their number.

    Linear layers, GPT-2's `Conv1D` and convolutions, in the order of the model. Of files this is known where a config.json beside
    them names a class of transformers that has their tensors; else it is every weight of two or more dimensions, by name.

    **Returns:** layer -> `(out, in, *kernel)`.

    **Raises:** `ValueError`: no such layer. `FileNotFoundError`: as `lowrank.io.weights.opened`.
    """
    entries = list(layers)
    with opened(model, "model") as held:
        shapes, files = held.shapes, held.files
    sizes = {name: shapes[f"{name}.weight"] for name in named(shapes, entries)}
    modules = model if isinstance(model, nn.Module) else _skeleton(files[0].parent / CONFIG)
    if modules is not None:
        kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
        known = [name for name, module in modules.named_modules() if isinstance(module, kinds) or is_conv1d(module)]
        if ordered := [name for name in known if name in sizes]:
            return {name: sizes[name] for name in ordered}
    if not sizes:
        raise ValueError(f"`layers` must name weights of the model, got none for {entries}.")
    return {name: sizes[name] for name in sorted(sizes, key=_by_number)}


def _skeleton(config: Path) -> nn.Module | None:
    """The architecture that a folder's config.json names, without weights; None where transformers does not have it."""
    import transformers  # noqa: PLC0415

    names = json.loads(config.read_text(encoding="utf8")).get("architectures") if config.exists() else None
    kind: Any = getattr(transformers, names[0], None) if names else None
    if kind is None:
        return None
    with init_empty_weights():
        return kind(transformers.AutoConfig.from_pretrained(config.parent))


def _by_number(name: str) -> list[Any]:
    """Sorts `layers.2` before `layers.11`: shards hold names in no useful order."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The published keys that follow from the rows."""
    blocks: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        blocks.setdefault(row["block"], []).append(row)
    about = [
        {
            "block_index": index,
            "name": name,
            "start_layer_index": own[0]["index"],
            "end_layer_index": own[-1]["index"],
            "num_layers": len(own),
            "total_parameters": sum(row["num_parameters"] for row in own),
            "avg_significance": mean(row["significance_score"] for row in own),
            "avg_pruning_ratio": mean(row["pruning_ratio"] for row in own),
        }
        for index, (name, own) in enumerate(blocks.items())
    ]
    raw = [row["raw_metric"] for row in rows if row["raw_metric"] is not None]
    columns = {"raw_metrics": raw, "pruning_ratios": [row["pruning_ratio"] for row in rows]}
    columns["significance_scores"] = [row["significance_score"] for row in rows]
    extremes = {
        f"{what}_{kind}": function(own)
        for what, own in columns.items()
        for kind, function in (("min", min), ("max", max), ("mean", mean))
        if own
    }
    return {
        "total_parameters": sum(row["num_parameters"] for row in rows),
        "num_blocks": len(blocks),
        "num_prunable_layers": len(rows),
        "layers_per_block": len(rows) // len(blocks),
        "blocks": about,
        "metadata": extremes,
    }
