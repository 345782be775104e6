"""Read the files of one folder of results, each checked: run.json, claims.csv, tables and the executed notebook."""

from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from pydantic import Field

from lowrank.io.checks import require
from lowrank.io.schemas import Schema, read_file, read_json
from lowrank.report.claims import FAILS, HOLDS, VERDICTS

CLAIMS = "claims.csv"


class _TableRecord(Schema):
    """Hold what counts in a table, see `lowrank.report.compare.read_declaration`."""

    measured: list[str] = Field(default_factory=list)
    unstable: list[str] = Field(default_factory=list)
    tolerance: float | dict[str, float] = 0.0


class _RunRecord(Schema):
    """Hold what a comparison and a publication read of a run.json; older files lack some of it."""

    tables: dict[str, _TableRecord] = Field(default_factory=dict)
    measured_claims: list[str] = Field(default_factory=list)
    measured_columns: dict[str, list[str]] = Field(default_factory=dict)
    git_commit: str | None = None
    git_dirty: bool | None = None


class _PageRecord(Schema):
    """Hold what a page shows of a run.json."""

    parameters: dict[str, Any]
    inputs: dict[str, Any]
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
        return pd.read_csv(path, dtype={"number": str} if path.name == CLAIMS else None)
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

    **Returns** a table with the columns `claim`, `verdict` (one of `lowrank.report.claims.VERDICTS`) and `number` (a text, empty
    if there is none).
    """
    table = read_table(folder / CLAIMS)
    if "holds" in table:  # this can go when `sst2-minilm` and `cifar10-minivit` are executed again
        table = table.assign(verdict=table.holds.map({True: HOLDS, False: FAILS}))
    table = table.reindex(columns=["claim", "verdict", "number"]).fillna({"number": ""})
    for column, known in (("claim", None), ("verdict", VERDICTS)):
        wrong = [value for value in table[column] if not isinstance(value, str) or (known and value not in known)]
        rule = f"have a {column} in each row{f' among {list(known)}' if known else ''}"
        require(not wrong, str(folder / CLAIMS), rule, wrong[:3])
    return table
