"""Write what a notebook leaves behind: figures, tables, claims and provenance. No other module writes results."""

import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image
from matplotlib.figure import Figure

from lowrank.io.checks import SPLITS, require
from lowrank.io.dependencies import hash_code
from lowrank.io.files import writing
from lowrank.io.hashing import hash_options
from lowrank.io.provenance import environment, peak_memory_mb
from lowrank.report.agreement import VERDICTS
from lowrank.report.findings.recompute import write_claims
from lowrank.report.findings.registry import judge_results, read_finding
from lowrank.report.findings.results import Results
from lowrank.report.folders import close_results, open_results, outputs_folder
from lowrank.report.namespace import name_results, read_namespace
from lowrank.report.parameters import notebook_path
from lowrank.report.result_files import SIGNIFICANT_DIGITS

TOLERANCE = 1e-3  # relative; tables that no training in a notebook goes into agree between machines to this
RESERVED = {"claims", "run"}  # names of files that `Report` writes itself
THEME: dict[str, Any] = {"context": "notebook", "style": "whitegrid", "palette": "colorblind"}


class Report:
    """Record one run of one notebook. Results of a former run are replaced by `finish`.

    Parameters that are those of the set write to SET/NOTEBOOK, every other combination of parameters to a folder of its own,
    see `lowrank.report.namespace.name_results`.

    **Arguments**

    - `notebook`: stem of the notebook.
    - `namespace`: `globals()` of the notebook; the parameters are read from it, and checked against the parameters cell.

    **Raises**

    - `ParameterError`: a parameter that does not exist, whoever set it, or that has another type than its default.
    """

    def __init__(self, notebook: str, namespace: Mapping[str, Any]) -> None:
        self.parameters = read_namespace(notebook, namespace)
        self.set = name_results(notebook, self.parameters)
        self.final = outputs_folder(draft=True) / self.set / notebook
        self.folder = open_results(self.final)
        if self.set != self.parameters["set_name"]:
            print(f"These parameters are not those of {self.parameters['set_name']!r}: results go to {self.final}")
        self.notebook = notebook
        self.tables: dict[str, dict[str, Any]] = {}
        self.code = hash_code([notebook_path(notebook)])
        self.frozen: str | None = None
        self.stages: dict[str, float] = {}
        self.inputs: dict[str, Any] = {}
        self.started = time.time()
        sns.set_theme(**THEME)
        pd.set_option("display.max_colwidth", None)  # claims are shown whole

    def record(self, **inputs: Any) -> None:
        """Record what went in: identities and hashes of data and models, dtype. run.json keeps it as `inputs`."""
        self.inputs |= inputs

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage. run.json keeps its seconds; stages of one name are summed."""
        start = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + round(time.perf_counter() - start, 2)

    def freeze(self) -> str:
        """Freeze the choices of this run: from here on its tasks may read their test split.

        The choices are all parameters but the name of the set, and the code of the notebook, which has the rules by which it
        picks something on validation. Choices are committed before test is read: run.json keeps the commit beside the hash.

        **Returns** the hash of the choices, 16 hex digits, for `Task.open_test`.
        """
        self.frozen = hash_choices(self.notebook, self.parameters)
        return self.frozen

    def table(
        self,
        table: pd.DataFrame,
        name: str,
        *,
        split: str | None,
        rows: int = 12,
        measured: Sequence[str] = (),
        unstable: Sequence[str] = (),
        tolerance: int | float | Mapping[str, int | float] = TOLERANCE,
    ) -> pd.DataFrame:
        """Write a table as `name.csv`, and record how far its columns agree between machines.

        **Arguments**

        - `table`: any table; its index is not written.
        - `name`: letters, digits and underscores, and neither "claims" nor "run".
        - `split`: the split that the numbers were measured on, which becomes the last column. None for a table that has this
          column already, or that depends on no data.
        - `rows`: number of rows to return. Default 12.
        - `measured`: columns of times or memory, which differ between any two runs. Default none.
        - `unstable`: columns of rounding noise or of chaotic curves, which differ between two machines. Default none.
        - `tolerance`: relative, of all other numbers; or column -> tolerance, and `TOLERANCE` for the rest. Text must be equal.
          Default `TOLERANCE`.

        **Returns** the first rows, to be shown.

        **Raises**

        - `ValueError`: a bad name or split, test before `freeze`, or a column that the table does not have.
        """
        is_plain = name.replace("_", "").isalnum() and name not in RESERVED
        require(is_plain, "name", "be letters, digits and underscores, and not 'claims' or 'run'", name)
        tolerances = tolerance if isinstance(tolerance, Mapping) else {}
        unknown = sorted({*measured, *unstable, *tolerances} - set(table))
        require(not unknown, "columns", "be columns of the table", unknown)
        table = self._with_split(table, split)
        table.to_csv(self.folder / f"{name}.csv", index=False, float_format=f"%.{SIGNIFICANT_DIGITS}g")
        self.tables[name] = {
            "split": split,
            "tolerance": dict(tolerances) or tolerance,
            "measured": list(measured),
            "unstable": list(unstable),
        }
        return table.head(rows)

    def _with_split(self, table: pd.DataFrame, split: str | None) -> pd.DataFrame:
        """Return the table with a last column for its split; every split that it names must be one that may be read."""
        if split is not None:
            table = table.assign(split=split)
        named = set(table["split"]) if "split" in table else set()
        require(named <= set(SPLITS), "split", f"be among {SPLITS}", sorted(map(str, named - set(SPLITS))))
        allowed = self.frozen or "test" not in named
        require(bool(allowed), "split", "be 'train' or 'validation' before `freeze`", "test")
        return table

    def figure(self, figure: Figure | sns.axisgrid.Grid, name: str) -> Image:
        """Write a figure as `name.png`.

        **Arguments**

        - `figure`: a figure of matplotlib or a grid of seaborn; it is closed.
        - `name`: the name of a table that was written before, which has the figure's values.

        **Returns** the picture, to be shown.

        **Raises**

        - `ValueError`: no table has this name.
        """
        require(name in self.tables, "name", "be the name of a table written before the figure", name)
        path = self.folder / f"{name}.png"
        save_figure(figure.figure if isinstance(figure, sns.axisgrid.Grid) else figure, path)
        return Image(filename=str(path))

    @property
    def results(self) -> Results:
        """Return what was written so far, for claims and readings."""
        return Results(self.folder, self.parameters, self.inputs)

    def reading(self, name: str) -> None:
        """Print in a sentence what a table shows.

        **Arguments**

        - `name`: of a table that was written before and has a reading, see `lowrank.report.findings.registry`.

        **Raises**

        - `ValueError`: no such table.
        """
        require(name in self.tables, "name", "be the name of a table written before its reading", name)
        print(read_finding(self.notebook, name, self.results))

    def finish(self) -> pd.DataFrame:
        """Judge the claims, print their verdicts, write them and run.json, and put the results in the place of former ones.

        **Returns** the claims with effects and intervals, to be shown.
        """
        claims = judge_results(self.notebook, self.results)
        write_claims(claims, self.folder)
        print("\n".join(f"{verdict}: {claim}" for verdict, claim in zip(claims.verdict, claims.claim, strict=True)))
        run = {
            "set": self.set,
            "notebook": self.notebook,
            "parameters": self.parameters,
            "inputs": self.inputs,
            "notebook_code": self.code,
            "frozen": self.frozen,
            "claims": {verdict: int((claims.verdict == verdict).sum()) for verdict in VERDICTS},
            "tables": self.tables,
            "stages_s": self.stages,
            "wall_s": round(time.time() - self.started, 1),
            "peak_memory_mb": peak_memory_mb(),
            **environment(),
        }
        with writing(self.folder / "run.json") as partial:
            partial.write_text(json.dumps(run, indent=1) + "\n", encoding="utf8")
        if self.folder != self.final:  # else the last cell is run again
            close_results(self.folder, self.final)
            self.folder = self.final
        return claims.drop(columns="id").round(4)


def hash_choices(notebook: str, parameters: Mapping[str, Any]) -> str:
    """Hash the choices that a notebook is run with: its code, and all parameters but the name of the set.

    **Arguments**

    - `notebook`: its stem.
    - `parameters`: parameter name -> JSON value.

    **Returns** 16 hex digits.
    """
    values = {name: value for name, value in parameters.items() if name != "set_name"}
    return hash_options({"parameters": values, "code": hash_code([notebook_path(notebook)])})


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure as PNG and close it. A palette of 128 colors makes the file a third of the size.

    **Arguments**

    - `figure`: the figure.
    - `path`: the PNG file.
    """
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=100, bbox_inches="tight")
    plt.close(figure)
    PIL.Image.open(pixels).convert("RGB").quantize(128).save(path, optimize=True)
