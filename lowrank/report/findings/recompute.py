"""Judge the claims of results that are there, without running a notebook."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lowrank.io.checks import require
from lowrank.io.files import writing
from lowrank.report.findings.registry import judge_results
from lowrank.report.findings.results import format_claim, read_results
from lowrank.report.result_files import CLAIMS, SIGNIFICANT_DIGITS, read_claims


def write_claims(claims: pd.DataFrame, folder: Path) -> None:
    """Write the claims of one folder of results.

    **Arguments**

    - `claims`: from `lowrank.report.findings.results.judge_claims`.
    - `folder`: of results.
    """
    with writing(folder / CLAIMS) as partial:
        claims.to_csv(partial, index=False, float_format=f"%.{SIGNIFICANT_DIGITS}g")


def recompute_claims(results: Path, sets: list[str], *, write: bool = False) -> list[str]:
    """Judge all claims anew and print each with its effect; a claim that is not as in claims.csv is marked.

    **Arguments**

    - `results`: folder with SET/NOTEBOOK/run.json.
    - `sets`: names of sets or variants; empty for all.
    - `write`: write claims.csv anew where it changed. Default False.

    **Returns** SET/NOTEBOOK of the results whose claims changed.

    **Raises**

    - `ValueError`: no results of a set.
    """
    changed = []
    for folder in _find_runs(results, sets):
        name, claims = f"{folder.parent.name}/{folder.name}", judge_results(folder.name, read_results(folder))
        before = read_claims(folder) if (folder / CLAIMS).is_file() else claims.iloc[:0]
        former = {row.id: row for _, row in before.iterrows()}
        lines = {row.id: row for _, row in claims.iterrows()}
        changes = {key for key, row in lines.items() if key not in former or not _agree(row, former[key])}
        for key, row in lines.items():
            was = format_claim(former[key]) if key in former else "not there"
            print(f"{name}: {key}: {format_claim(row)}{f'; was {was}' if key in changes else ''}")
        gone = sorted(set(former) - set(lines))
        for key in gone:
            print(f"{name}: {key}: gone; was {format_claim(former[key])}")
        if changes or gone:
            changed.append(name)
            if write:
                write_claims(claims, folder)
    return changed


def _agree(one: Any, other: Any) -> bool:
    """Return whether two rows have the same words, and numbers that differ by no more than writing them rounds."""
    same = [one[name] == other[name] for name in ("claim", "verdict", "unit", "n")]
    numbers = ([row[name] for name in ("effect", "low", "high")] for row in (one, other))
    return all(same) and bool(np.isclose(*numbers, rtol=1e-4, atol=1e-9, equal_nan=True).all())


def _find_runs(results: Path, sets: list[str]) -> list[Path]:
    found = sorted(path.parent for path in results.glob("*/*/run.json"))
    for name in sets:
        here = sorted({folder.parent.name for folder in found})
        require(name in here, "sets", f"have results in {results}, among {here}", name)
    return [folder for folder in found if not sets or folder.parent.name in sets]
