"""Whether results made again are the same: `python -m lowrank.report.compare MADE KNOWN [--tolerance T]`, say `/tmp/again outputs`.

Every table and every claim of the first folder must be in the second. Times and memory, which no two runs share, do not count:
notebooks say which columns and claims rest on them (`measured`), and run.json keeps it.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd


def measured(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Columns of tables, and claims, that rest on times or memory, as the run.json of one result says."""
    about = json.loads((folder / "run.json").read_text(encoding="utf8"))
    return about.get("measured_columns", {}), about.get("measured_claims", [])


def _counted(path: Path, columns: list[str], claims: list[str]) -> pd.DataFrame:
    table = pd.read_csv(path).drop(columns=columns, errors="ignore")
    return table.query("claim not in @claims").reset_index(drop=True) if claims else table


def _not_fractions(table: pd.DataFrame) -> list[pd.Series]:
    return [column for _, column in table.items() if column.dtype.kind != "f"]


def table_difference(made: Path, known: Path, columns: list[str], claims: list[str], tolerance: float) -> str | None:
    """What is not the same in two tables, in one line; None where all is.

    **Arguments:** `columns`, `claims`: what does not count. `tolerance`: relative, of numbers that are not whole; at 0 the files
    are compared byte for byte where all columns count.
    """
    if not known.exists():
        return "only made now"
    if made.read_bytes() == known.read_bytes():
        return None
    if not (columns or claims or tolerance):
        return "other bytes"
    one, two = (_counted(path, columns, claims) for path in (made, known))
    try:
        pd.testing.assert_frame_equal(one, two, rtol=tolerance, atol=0)
        for left, right in zip(_not_fractions(one), _not_fractions(two), strict=True):  # pandas lets them be close, too
            pd.testing.assert_series_equal(left, right, check_exact=True)
    except AssertionError as error:
        return " ".join(str(error).split())
    return None


def differences(made: Path, known: Path, tolerance: float = 0.0) -> tuple[int, list[str]]:
    """How many tables were compared, and a line for each that is not the same.

    **Raises:** `ValueError`: no result in `made`, a negative tolerance.
    """
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must be >= 0, got {tolerance}.")
    runs = sorted(made.glob("*/*/run.json"))
    if not runs:
        raise ValueError(f"`made` must hold results, SET/NOTEBOOK/run.json, got {str(made)!r}.")
    count, lines = 0, []
    for folder in (run.parent for run in runs):
        name = folder.relative_to(made)
        if not (known / name / "run.json").exists():
            lines.append(f"{name}: only made now")
            continue
        (columns, claims), (more_columns, more_claims) = measured(folder), measured(known / name)
        for path in sorted(folder.glob("*.csv")):
            left_out = columns.get(path.stem, []) + more_columns.get(path.stem, [])
            rows = claims + more_claims if path.stem == "claims" else []
            count += 1
            if found := table_difference(path, known / name / path.name, left_out, rows, tolerance):
                lines.append(f"{name}/{path.stem}: {found}")
        gone = {path.name for path in (known / name).glob("*.csv")} - {path.name for path in folder.glob("*.csv")}
        lines += [f"{name}/{Path(missing).stem}: not made now" for missing in sorted(gone)]
    return count, lines


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 the same, 1 not the same, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m lowrank.report.compare", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("made", type=Path, help="a folder of results, as outputs/")
    parser.add_argument("known", type=Path, help="those to compare with")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative, of fractions: for another machine")
    given = parser.parse_args(arguments)
    try:
        count, lines = differences(given.made, given.known, given.tolerance)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*lines, f"{count} tables compared, {len(lines)} differences"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
