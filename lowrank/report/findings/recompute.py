"""Judge the claims of results that are there, without running a notebook."""

from pathlib import Path

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
        before = read_claims(folder).set_index("id") if (folder / CLAIMS).is_file() else claims.iloc[:0].set_index("id")
        lines = claims.set_index("id").apply(format_claim, axis=1).to_dict() if len(claims) else {}
        former = before.apply(format_claim, axis=1).to_dict() if len(before) else {}
        for key, line in lines.items():
            mark = "" if former.get(key) == line else f"; was {former.get(key, 'not there')}"
            print(f"{name}: {key}: {line}{mark}")
        gone = sorted(set(former) - set(lines))
        for key in gone:
            print(f"{name}: {key}: gone; was {former[key]}")
        if lines != former:
            changed.append(name)
            if write:
                write_claims(claims, folder)
    return changed


def _find_runs(results: Path, sets: list[str]) -> list[Path]:
    found = sorted(path.parent for path in results.glob("*/*/run.json"))
    for name in sets:
        here = sorted({folder.parent.name for folder in found})
        require(name in here, "sets", f"have results in {results}, among {here}", name)
    return [folder for folder in found if not sets or folder.parent.name in sets]
