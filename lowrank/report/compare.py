"""Compare the results of a run with published ones: a line per table that differs, verdict by verdict, and one line of counts.

Columns of times, memory, rounding noise and chaotic curves do not count; each of the others has a tolerance. Notebooks declare
both where they write a table, and run.json keeps it.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lowrank.io.checks import require
from lowrank.report.agreement import verdicts_agree
from lowrank.report.findings.results import format_claim
from lowrank.report.folders import published_folder
from lowrank.report.inference import INCONCLUSIVE
from lowrank.report.result_files import read_claims, read_run, read_table

TOLERANCE = 1e-3  # relative, of a number without a declared one
FLOOR = 1e-3  # values below this share of the largest of their column are compared with it, not with themselves
EQUAL, WITHIN, BEYOND = "equal", "within", "beyond"


@dataclass(frozen=True)
class Declaration:
    """Hold what counts in one table.

    **Arguments**

    - `ignored`: columns that do not count.
    - `tolerances`: column -> relative tolerance.
    - `tolerance`: relative tolerance of the numbers in all other columns; text must be equal.
    """

    ignored: frozenset[str] = frozenset()
    tolerances: dict[str, int | float] = field(default_factory=dict)
    tolerance: int | float = TOLERANCE


@dataclass(frozen=True)
class TableOutcome:
    """Hold how one table compares.

    **Arguments**

    - `name`: SET/NOTEBOOK/TABLE.
    - `status`: "equal", "within" or "beyond" the tolerance.
    - `worst`: the worst column, its difference and its tolerance, in words; empty if the table is equal.
    """

    name: str
    status: str
    worst: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.worst or self.status}"


@dataclass(frozen=True)
class VerdictOutcome:
    """Hold how the verdicts of one notebook with one set compare.

    **Arguments**

    - `agree`, `count`: how many verdicts agree, and of how many.
    - `close`: how many of those that agree are inconclusive on either side.
    - `lines`: a line for each verdict that does not agree, and one for claims that only one side has.
    """

    agree: int
    count: int
    close: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Hold how a folder of results compares with another.

    **Arguments**

    - `tables`: an outcome per table.
    - `verdicts`: an outcome per notebook and set.
    - `unpublished`: SET/NOTEBOOK of results that the reference lacks; they count for nothing.
    """

    tables: tuple[TableOutcome, ...]
    verdicts: tuple[VerdictOutcome, ...]
    unpublished: tuple[str, ...]

    def lines(self, *, everything: bool = False) -> list[str]:
        """List what does not agree, one line each: tables, then verdicts.

        **Arguments**

        - `everything`: list the tables within their tolerance, too. Default False.
        """
        shown = (BEYOND, WITHIN) if everything else (BEYOND,)
        tables = [str(table) for table in self.tables if table.status in shown]
        return tables + [line for verdict in self.verdicts for line in verdict.lines]

    def summary(self) -> str:
        """Say in one line how many tables and verdicts agree."""
        number = Counter(table.status for table in self.tables)
        agree, count, close = (sum(getattr(v, name) for v in self.verdicts) for name in ("agree", "count", "close"))
        return (
            f"{number[EQUAL]} tables equal, {number[WITHIN]} within tolerance, {number[BEYOND]} beyond; "
            f"{agree} of {count} verdicts agree with the published ones, {close} inconclusive"
        )


def read_declaration(
    run: dict[str, Any], other: dict[str, Any], table: str, tolerance: int | float | None
) -> Declaration:
    """Read what counts in a table from both sides' run.json. Tolerances are those of the first.

    **Arguments**

    - `run`: run.json of the new result.
    - `other`: run.json of the reference.
    - `table`: name of the table.
    - `tolerance`: replaces all declared ones, unless it is None.
    """
    ignored: set[str] = set()
    for side in (run, other):
        said = side.get("tables", {}).get(table, {})
        ignored |= {*said.get("measured", []), *said.get("unstable", [])}
    given = run.get("tables", {}).get(table, {}).get("tolerance", TOLERANCE)
    single, rest = (given, TOLERANCE) if isinstance(given, dict) else ({}, given)
    if tolerance is not None:
        single, rest = dict.fromkeys(single, tolerance), tolerance
    return Declaration(frozenset(ignored), single, rest)


def relative_difference(values: pd.Series, reference: pd.Series) -> float:
    """Compute the largest relative difference of two columns of numbers.

    **Arguments**

    - `values`: the column.
    - `reference`: the column to compare with, of the same length.

    That of two values is their distance over the larger of the reference value and `FLOOR` times the largest finite one of its
    column. Two NaN are equal, and so are two equal infinities; a NaN or an infinity on one side differs infinitely.
    """
    one, other = values.to_numpy(float), reference.to_numpy(float)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    size = np.abs(other)
    largest = size[np.isfinite(size)].max(initial=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.abs(one - other) / np.maximum(size, FLOOR * largest)
    return float(np.where(same, 0.0, np.nan_to_num(found, nan=math.inf, posinf=math.inf)).max(initial=0.0))


def _compare_column(values: pd.Series, reference: pd.Series, declaration: Declaration) -> tuple[float, float, str]:
    """Return the difference of a column, the same over its tolerance (at most 1 is within), and both in words."""
    name = str(values.name)
    if {values.dtype.kind, reference.dtype.kind} <= set("iuf"):  # a fraction may be whole in all rows
        tolerance = declaration.tolerances.get(name, declaration.tolerance)
        found = relative_difference(values, reference)
        excess = found / tolerance if tolerance else math.inf if found else 0.0
        return found, excess, f"{name} differs by {found:.2g}, tolerance {tolerance:g}"
    same = (values.astype(str) == reference.astype(str)) | (values.isna() & reference.isna())
    count = int((~same).sum())
    return (
        float(count),
        math.inf if count else 0.0,
        f"{name} differs in {count} of {len(values)} rows, and must be equal",
    )


def compare_table(path: Path, reference: Path, declaration: Declaration) -> tuple[str, str]:
    """Compare two tables, row by row.

    **Arguments**

    - `path`: CSV file.
    - `reference`: CSV file to compare with.
    - `declaration`: what counts.

    **Returns** "equal", "within" or "beyond", and the worst column in words.
    """
    if path.read_bytes() == reference.read_bytes():
        return EQUAL, ""
    one, other = (read_table(file).drop(columns=[*declaration.ignored], errors="ignore") for file in (path, reference))
    if list(one) != list(other):
        here, there = ([name for name in side if name not in rest] for side, rest in ((one, other), (other, one)))
        return BEYOND, f"columns or their order differ; only here: {here}, only published: {there}"
    if len(one) != len(other) and len(one.columns):
        return BEYOND, f"{len(one)} rows, published {len(other)}"
    found = [_compare_column(one.loc[:, name], other.loc[:, name], declaration) for name in one]
    difference, excess, worst = max(found, key=lambda column: (column[1], column[0]), default=(0.0, 0.0, ""))
    if not difference:
        return EQUAL, ""
    return (WITHIN if excess <= 1 else BEYOND), worst


def _compare_tables(folder: Path, reference: Path, name: str, tolerance: int | float | None) -> Iterable[TableOutcome]:
    run, other = read_run(folder), read_run(reference)
    here, there = ({path.stem for path in side.glob("*.csv")} - {"claims"} for side in (folder, reference))
    for table in sorted(here | there):
        if table in here & there:
            declaration = read_declaration(run, other, table, tolerance)
            outcome = compare_table(folder / f"{table}.csv", reference / f"{table}.csv", declaration)
        else:
            outcome = BEYOND, "not published" if table in here else "only published"
        yield TableOutcome(f"{name}/{table}", *outcome)


def compare_verdicts(folder: Path, reference: Path, name: str) -> VerdictOutcome:
    """Compare the verdicts on claims. One that is inconclusive agrees with any other.

    **Arguments**

    - `folder`: one result, with claims.csv.
    - `reference`: the result to compare with.
    - `name`: SET/NOTEBOOK, which begins every line.
    """
    one, other = (read_claims(side).set_index("id") for side in (folder, reference))
    both = one.index.intersection(other.index)
    pairs = {key: (one.verdict[key], other.verdict[key]) for key in both}
    close = [key for key in both if INCONCLUSIVE in pairs[key]]
    flipped = [key for key in both if not verdicts_agree(*pairs[key])]
    lines = [
        f"{name}: {key}: published {format_claim(other.loc[key])}, here {format_claim(one.loc[key])}" for key in flipped
    ]
    if alone := len(one) + len(other) - 2 * len(both):
        lines.append(
            f"{name}: {len(one) - len(both)} claims are not published, {len(other) - len(both)} only published"
        )
    return VerdictOutcome(len(both) - len(flipped), len(both) + alone, len(close), tuple(lines))


def compare_folders(results: Path, reference: Path, tolerance: int | float | None = None) -> Comparison:
    """Compare two folders of results.

    **Arguments**

    - `results`: folder with SET/NOTEBOOK/run.json, tables and claims.
    - `reference`: folder to compare with. Runs that only it has do not count.
    - `tolerance`: relative, >= 0, instead of all declared ones; 0 asks for equal numbers. Default None: those declared.

    **Raises**

    - `ValueError`: no results in `results`, no folder `reference`, a negative or infinite tolerance.
    """
    require(tolerance is None or 0 <= tolerance < math.inf, "tolerance", "be >= 0 and finite", tolerance)
    names = [path.parent.relative_to(results) for path in sorted(results.glob("*/*/run.json"))]
    require(bool(names), "results", "be a folder with SET/NOTEBOOK/run.json", str(results))
    known = reference.is_dir() or reference == published_folder()  # a project may have published nothing yet
    require(known, "reference", "be a folder of results", str(reference))
    published = [name for name in names if (reference / name / "run.json").exists()]
    tables = [t for name in published for t in _compare_tables(results / name, reference / name, f"{name}", tolerance)]
    verdicts = [compare_verdicts(results / name, reference / name, f"{name}") for name in published]
    unpublished = [f"{name}" for name in names if name not in published]
    return Comparison(tuple(tables), tuple(verdicts), tuple(unpublished))
