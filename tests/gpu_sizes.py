"""Small sizes for `benchmarks/gpu.py`, and what its tables must hold."""

import csv
import json
from pathlib import Path

import gpu
import pi3_models

PI3 = json.dumps(pi3_models.TINY | {"decoder_depth": 2})
BLOCK = (
    "--hidden 64 --intermediate 96 --width 16 --vocabulary 50 --batch 2 --tokens 40 --batches 2 --rows 32 --multiples 1"
)
MODELS = "--height 8 --side 12 --repeats 1 --views 1 2 --dim 64 --depth 1 --image 32 --images 2"
TINY = [*f"{BLOCK} {MODELS} --pi3".split(), PI3]
ROWS = {"layers": 24, "pi3": 8, "oialr": 7, "exponents": 2, "compress": 4}


def check(folder: Path) -> None:
    """Check the tables: all rows are there, times are positive, and the library is as close to the dense model as the recipe."""
    tables = {}
    for path in folder.glob("*.csv"):
        with path.open(encoding="utf8") as file:
            tables[path.stem] = list(csv.DictReader(file))
    assert {name: len(rows) for name, rows in tables.items()} == ROWS
    assert all(float(row["seconds"]) > 0 for name in ("oialr", "exponents", "compress") for row in tables[name])
    assert all(float(row["speedup"]) > 0 and float(row["flop_ratio"]) > 1 for row in tables["layers"])
    change = {row["way"]: float(row["output_change"]) for row in tables["compress"]}
    assert change["whitened, factors"] < 1.05 * change["SVD-LLM's recipe"]
    record = json.loads((folder / "run.json").read_text(encoding="utf8"))
    assert set(record["seconds"]) == set(gpu.PARTS)
    assert record["left_out"] == []
    assert record["card"]
    assert record["versions"]["torch"]
