"""Write what a notebook leaves behind: figures, tables, claims and provenance. No other module writes results."""

import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image
from matplotlib.figure import Figure

from lowrank.io.checks import require
from lowrank.io.files import writing
from lowrank.io.provenance import environment, peak_memory_mb
from lowrank.report.folders import outputs_folder
from lowrank.report.parameters import read_defaults

SIGNIFICANT_DIGITS = 6
RESERVED = {"claims", "run"}  # names of files that `Report` writes itself
THEME: dict[str, Any] = {"context": "notebook", "style": "whitegrid", "palette": "colorblind"}


class Report:
    """Record one run of one notebook. Results of a former run are deleted.

    **Arguments**

    - `notebook`: stem of the notebook.
    - `namespace`: `globals()` of the notebook; the parameters are read from it.
    """

    def __init__(self, notebook: str, namespace: Mapping[str, Any]) -> None:
        self.parameters = {name: namespace[name] for name in read_defaults(notebook)}
        self.folder = outputs_folder(draft=True) / self.parameters["set_name"] / notebook
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.iterdir():
            stale.unlink()
        self.notebook = notebook
        self.tables: set[str] = set()
        self.claims: list[dict[str, object]] = []
        self.measured_columns: dict[str, list[str]] = {}
        self.measured_claims: list[str] = []
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

    def table(self, table: pd.DataFrame, name: str, rows: int = 12, *, measured: Sequence[str] = ()) -> pd.DataFrame:
        """Write a table as `name.csv`.

        **Arguments**

        - `table`: any table; its index is not written.
        - `name`: letters, digits and underscores, and neither "claims" nor "run".
        - `rows`: number of rows to return. Default 12.
        - `measured`: columns that depend on times or memory, which differ between any two runs, see
          `lowrank.report.compare`. Default none.

        **Returns** the first rows, to be shown.

        **Raises**

        - `ValueError`: a bad name, or a measured column that the table does not have.
        """
        is_plain = name.replace("_", "").isalnum() and name not in RESERVED
        require(is_plain, "name", "be letters, digits and underscores, and not 'claims' or 'run'", name)
        unknown = sorted(set(measured) - set(table))
        require(not unknown, "measured", "be columns of the table", unknown)
        if measured:
            self.measured_columns[name] = list(measured)
        table.to_csv(self.folder / f"{name}.csv", index=False, float_format=f"%.{SIGNIFICANT_DIGITS}g")
        self.tables.add(name)
        return table.head(rows)

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

    def claim(self, text: str, holds: Any, number: float | int | None = None, *, measured: bool = False) -> None:
        """Record a finding and print whether it holds. A claim that fails is a result, not an error.

        **Arguments**

        - `text`: the claim in one sentence.
        - `holds`: one truth value, or one for each case. All must be true, and the number of the claim is then the count
          of true ones.
        - `number`: the number that decides the claim. Default None: no number.
        - `measured`: the claim depends on times or memory, which differ between any two runs. Default False.
        """
        cases = np.asarray(holds)
        verdict, shown = bool(cases.all()), "" if number is None else f"{number:.3g}"
        if cases.ndim:
            shown = f"{int(cases.sum())} of {cases.size}"
        if measured:
            self.measured_claims.append(text)
        self.claims.append({"claim": text, "holds": verdict, "number": shown})
        pd.DataFrame(self.claims).to_csv(self.folder / "claims.csv", index=False)
        print(f"{'holds' if verdict else 'FAILS'}: {text}")

    def finish(self) -> pd.DataFrame:
        """Write run.json, and return the claims to be shown."""
        held = sum(bool(claim["holds"]) for claim in self.claims)
        run = {
            "set": self.parameters["set_name"],
            "notebook": self.notebook,
            "parameters": self.parameters,
            "inputs": self.inputs,
            "claims": {"held": held, "failed": len(self.claims) - held},
            "measured_columns": self.measured_columns,
            "measured_claims": self.measured_claims,
            "stages_s": self.stages,
            "wall_s": round(time.time() - self.started, 1),
            "peak_memory_mb": peak_memory_mb(),
            **environment(),
        }
        with writing(self.folder / "run.json") as partial:
            partial.write_text(json.dumps(run, indent=1) + "\n", encoding="utf8")
        return pd.DataFrame(self.claims, columns=["claim", "holds", "number"])


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
