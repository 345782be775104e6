"""What the benchmarks share: the table of results, the peak memory of a part of a process. Models are in `recipes`."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pandas as pd
import pytest

from lowrank.io.dependencies import ROOT
from lowrank.io.files import writing
from lowrank.io.provenance import environment

BENCH = ROOT / "outputs" / "bench"


def recorder(name: str, *columns: str) -> tuple[Callable[..., None], object]:
    """Return `row(...)`, which takes the values of the columns, and a fixture that writes all rows when a module ends.

    The rows go to outputs/bench/`name`.csv; commit, date, processor, versions and load of the machine go to run.json beside it.

    **Arguments**

    - `name`: of the table.
    - `columns`: by default `what`, `case`, `figure`, `value`, and `spread`, which may be left out.
    """
    rows: list[dict[str, object]] = []

    def row(*values: object) -> None:
        names = columns or ("what", "case", "figure", "value", "spread")[: len(values)]
        rows.append(dict(zip(names, values, strict=True)))

    @pytest.fixture(scope="module", autouse=True)
    def table() -> Iterator[None]:
        load = os.getloadavg()  # before the benchmark adds its own
        yield
        if rows:
            provenance = environment() | {"load_before": [round(value, 2) for value in load]}
            record_run(name, provenance)
            numbers = pd.DataFrame(rows).assign(device=provenance["device"])
            numbers.to_csv(BENCH / f"{name}.csv", index=False, float_format="%.3g")

    return row, table


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, str]:
    """Return the median ratio of the times of two functions that took turns, and the least and the largest of a round.

    **Arguments**

    - `ours`, `theirs`: seconds, one per round; the ratio is the first over the second.
    """
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> tuple[float, str]:
    """Return the median of the values of several rounds, and the least and the largest of them.

    **Arguments**

    - `values`: one per round.
    """
    return median(values), f"{min(values):.3g} to {max(values):.3g}"


def record_run(name: str, provenance: dict[str, object]) -> None:
    """Write where a table comes from into outputs/bench/run.json, beside the entries of the other tables.

    **Arguments**

    - `name`: of the table.
    - `provenance`: JSON values by name.
    """
    path = BENCH / "run.json"
    entries = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    with writing(path) as partial:
        partial.write_text(json.dumps(entries | {name: provenance}, indent=1, sort_keys=True) + "\n", encoding="utf8")


@contextmanager
def peak_megabytes() -> Iterator[Callable[[], float]]:
    """Resident memory of this process, at its most since the start of the block, over what it was then. Linux."""

    def read(key: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024 / 1e6

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = read("VmRSS")
    yield lambda: read("VmHWM") - before
