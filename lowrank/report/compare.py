"""Compare results that were made again with reference results, table by table.

Every table and every claim of the new folder must be in the reference. Times and memory differ between any two runs and do not
count: notebooks declare the columns and claims that depend on them (`measured`), and run.json keeps the list.
"""

import json
from pathlib import Path

import pandas as pd

from lowrank.io.checks import require


def read_measured(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Read from the run.json of one result what depends on times or memory: table -> columns, and claims."""
    run = json.loads((folder / "run.json").read_text(encoding="utf8"))
    return run.get("measured_columns", {}), run.get("measured_claims", [])


def _read_without(path: Path, columns: list[str], claims: list[str]) -> pd.DataFrame:
    table = pd.read_csv(path).drop(columns=columns, errors="ignore")
    return table.query("claim not in @claims").reset_index(drop=True) if claims else table


def _not_fractions(table: pd.DataFrame) -> list[pd.Series]:
    return [column for _, column in table.items() if column.dtype.kind != "f"]


def table_difference(
    path: Path, reference: Path, columns: list[str], claims: list[str], tolerance: float
) -> str | None:
    """Describe the first difference of two tables in one line.

    **Arguments**

    - `path`: CSV file.
    - `reference`: CSV file to compare with.
    - `columns`: columns that do not count.
    - `claims`: rows that do not count, by their column `claim`.
    - `tolerance`: relative tolerance of fractions, >= 0. Other values must be equal. If it is 0 and everything counts, the
      files must have equal bytes.

    **Returns** None if there is no difference.
    """
    if not reference.exists():
        return "not in the reference"
    if path.read_bytes() == reference.read_bytes():
        return None
    if not (columns or claims or tolerance):
        return "other bytes"
    one, two = (_read_without(file, columns, claims) for file in (path, reference))
    try:
        pd.testing.assert_frame_equal(one, two, rtol=tolerance, atol=0)
        for left, right in zip(_not_fractions(one), _not_fractions(two), strict=True):  # pandas lets them be close, too
            pd.testing.assert_series_equal(left, right, check_exact=True)
    except AssertionError as error:
        return " ".join(str(error).split())
    return None


def _compare_run(folder: Path, reference: Path, tolerance: float) -> dict[str, str | None]:
    """Return table -> difference, for all tables of one notebook with one set."""
    (columns, claims), (more_columns, more_claims) = read_measured(folder), read_measured(reference)
    found: dict[str, str | None] = {}
    for path in sorted(folder.glob("*.csv")):
        ignored = columns.get(path.stem, []) + more_columns.get(path.stem, [])
        ignored_claims = claims + more_claims if path.stem == "claims" else []
        found[path.stem] = table_difference(path, reference / path.name, ignored, ignored_claims, tolerance)
    return found


def differences(results: Path, reference: Path, tolerance: float = 0.0) -> tuple[int, list[str]]:
    """Compare two folders of results.

    **Arguments**

    - `results`: folder with SET/NOTEBOOK/run.json and tables.
    - `reference`: folder to compare with. Runs that only it has do not count.
    - `tolerance`: relative tolerance of fractions, >= 0. Default 0.

    **Returns** the number of tables compared, and one line for each difference.

    **Raises**

    - `ValueError`: no results in `results`, a negative tolerance.
    """
    require(tolerance >= 0, "tolerance", "be >= 0", tolerance)
    runs = sorted(results.glob("*/*/run.json"))
    require(bool(runs), "results", "be a folder with SET/NOTEBOOK/run.json", str(results))
    count, lines = 0, []
    for folder in (run.parent for run in runs):
        name = folder.relative_to(results)
        other = reference / name
        if not (other / "run.json").exists():
            lines.append(f"{name}: not in the reference")
            continue
        tables = _compare_run(folder, other, tolerance)
        count += len(tables)
        lines += [f"{name}/{table}: {difference}" for table, difference in tables.items() if difference]
        missing = {path.stem for path in other.glob("*.csv")} - set(tables)
        lines += [f"{name}/{table}: only in the reference" for table in sorted(missing)]
    return count, lines
