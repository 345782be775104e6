"""Read the files of one folder of results, each checked: run.json, claims.csv, tables and the executed notebook."""

from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from pydantic import Field

from lowrank.io.checks import require
from lowrank.io.schemas import Schema, read_file, read_json
from lowrank.report.agreement import VERDICTS

CLAIMS = "claims.csv"
SIGNIFICANT_DIGITS = 6  # of the numbers in tables
CLAIM_COLUMNS = ("id", "claim", "verdict", "effect", "low", "high", "unit", "n", "margin", "p")


class _TableRecord(Schema):
    """Hold what counts in a table, see `lowrank.report.compare.read_declaration`."""

    measured: list[str] = Field(default_factory=list)
    unstable: list[str] = Field(default_factory=list)
    tolerance: float | dict[str, float] = 0.0


class _RunRecord(Schema):
    """Hold what a comparison and a publication read of a run.json; older files lack some of it."""

    tables: dict[str, _TableRecord] = Field(default_factory=dict)
    git_commit: str | None = None
    git_dirty: bool | None = None


class _PageRecord(Schema):
    """Hold what a page shows of a run.json."""

    parameters: dict[str, Any]
    inputs: dict[str, Any]
    frozen: str | None
    git_commit: str | None
    git_dirty: bool | None
    device: str
    platform: str
    python: str
    versions: dict[str, str]
    wall_s: float
    peak_memory_mb: dict[str, float]
    stages_s: dict[str, float]


def read_run(folder: Path, *, whole: bool = False) -> dict[str, Any]:
    """Read the run.json of one folder of results.

    **Arguments**

    - `folder`: of results.
    - `whole`: whether it must have all that a page shows. Default False.

    **Raises**

    - `FileNotFoundError`: no such file.
    - `ValueError`: no JSON, or a field of another kind.
    """
    return read_json(folder / "run.json", "run.json", _PageRecord if whole else _RunRecord)


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file of results.

    **Raises**

    - `FileNotFoundError`: no such file.
    - `ValueError`: no table.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`results` must have the table {path}, and have none.")
    try:
        return pd.read_csv(path)
    except (ValueError, OverflowError) as error:  # pandas' own errors, and those of the encoding, are such
        reason = " ".join(str(error).split())
        raise ValueError(f"`results` must have tables in CSV, got {path}: {reason}") from error


def read_page(path: Path) -> Any:
    """Read an executed notebook.

    **Raises**

    - `FileNotFoundError`: no such file.
    - `ValueError`: no notebook, or one without cells.
    """
    text = read_file(path, "notebook")
    try:
        page = nbformat.reads(text, 4)
        nbformat.validate(page)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError, KeyError, TypeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"`notebook` must be an executed notebook, got {path}: {reason:.80}") from error
    if not page.cells:
        raise ValueError(f"`notebook` must have cells, got none in {path}.")
    return page


def read_claims(folder: Path) -> pd.DataFrame:
    """Read the claims of one folder of results.

    **Returns** a table as `lowrank.report.findings.results.judge_claims` makes it.

    **Raises**

    - `FileNotFoundError`: no such file.
    - `ValueError`: a column is missing, an id comes twice, or a row lacks its claim or has another word as its verdict.
    """
    table, where = read_table(folder / CLAIMS), str(folder / CLAIMS)
    missing = [name for name in CLAIM_COLUMNS if name not in table]
    require(not missing, where, f"have the columns {list(CLAIM_COLUMNS)}", sorted(table))
    for column, known in (("id", None), ("claim", None), ("verdict", VERDICTS)):
        wrong = [value for value in table[column] if not isinstance(value, str) or (known and value not in known)]
        rule = f"have a {column} in each row{f' among {list(known)}' if known else ''}"
        require(not wrong, where, rule, wrong[:3])
    for column in ("effect", "low", "high", "n"):
        require(
            table[column].dtype.kind in "if" or not len(table),
            where,
            f"have numbers as {column}",
            list(table[column][:3]),
        )
    twice = table.id[table.id.duplicated()].tolist()
    require(not twice, where, "have each id once", twice[:3])
    return table
