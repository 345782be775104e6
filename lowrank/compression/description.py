"""Say what the folder of a compressed model holds, from its records and the names and shapes of its tensors alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.compression.model_folder import FORMAT, METADATA
from lowrank.compression.record_schema import CompressedRecord
from lowrank.io.arguments import check_arguments
from lowrank.io.records import read_record
from lowrank.io.weights import open_weights

BESIDE = ("bias", "pivot_bias", "pivots")  # tensors of a layer that are no parameters of its weight


@check_arguments
def describe_folder(folder: Path | str) -> dict[str, Any]:
    """Describe a folder that `save_compressed` wrote; no model is built and no tensor is read.

    **Arguments**

    - `folder`: the folder.

    **Returns** JSON:

    - `folder`; `base`, the class or name of the base architecture and its library, None if the folder does not say.
    - `methods`, `storages`: those of its layers; `layers`, how many were targeted; `ranks`, the smallest and the largest.
    - `targeted_parameters`, `dense_targeted_parameters`, `keep_targeted`: of the weights of these layers, and their share.
    - `model_parameters`, `dense_model_parameters`, `keep_model`: of the whole model.
    - `bytes`: of the files with tensors.
    - `dense`: name -> parameters, the matrices that are stored as they were.

    **Raises**

    - `FileNotFoundError`: no such folder, or a missing file.
    - `ValueError`: a damaged file, or another format.
    """
    folder = Path(folder)
    record = read_record(folder / METADATA, FORMAT, CompressedRecord, "save_compressed", "folder")
    with open_weights(folder, "folder") as weights:
        sizes = {name: math.prod(shape) for name, shape in weights.shapes.items()}
        matrices = {name for name, shape in weights.shapes.items() if len(shape) == 2 and name.endswith(".weight")}
        stored = sum(path.stat().st_size for path in weights.files)
    rows = {name: row for name, row in record["layers"].items() if {"in", "out", "rank"} <= row.keys()}
    made = {name: _parts(name, sizes) for name, row in rows.items() if row.get("kind")}
    inside = {part for parts in made.values() for part in parts}
    after = {name: row.get("parameters", _count(made.get(name), row)) for name, row in rows.items()}
    before = sum(row["in"] * row["out"] for row in rows.values())
    ranks = [row["rank"] for row in rows.values()]
    targeted, model = sum(after.values()), record["parameters"]
    return {
        "folder": str(folder),
        "base": _name_base(record["base"]),
        "methods": sorted({row["method"] for row in rows.values() if "method" in row}),
        "storages": sorted({row.get("kind") or "dense" for row in rows.values()}),
        "layers": len(rows),
        "ranks": [min(ranks), max(ranks)] if ranks else [],
        "targeted_parameters": targeted,
        "dense_targeted_parameters": before,
        "keep_targeted": targeted / before if before else 1.0,
        "model_parameters": model,
        "dense_model_parameters": model - targeted + before,
        "keep_model": model / (model - targeted + before),
        "bytes": stored,
        "dense": {name: sizes[name] for name in sizes if name in matrices - inside},
    }


def _parts(layer: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the tensors of a layer that are parameters of its weight, name -> elements."""
    inside = {name: size for name, size in sizes.items() if name.startswith(f"{layer}.")}
    return {name: size for name, size in inside.items() if name.rpartition(".")[2] not in BESIDE}


def _count(parts: Mapping[str, int] | None, row: Mapping[str, Any]) -> int:
    """Return the parameters of a layer that has no row of `compress`: of its parts, if it is not stored as it was."""
    return row["in"] * row["out"] if parts is None else sum(parts.values())


def _name_base(base: Mapping[str, Any] | None) -> str | None:
    library = next((key for key in ("transformers", "timm") if (base or {}).get(key)), None)
    return None if base is None or library is None else f"{base[library]} ({library})"
