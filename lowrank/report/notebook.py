"""What a notebook leaves behind: figures, tables, claims, and where they came from. Only this room knows outputs/."""

import io
import json
import os
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

from lowrank.io.dependencies import ROOT
from lowrank.io.provenance import environment, peak_memory_mb
from lowrank.report.parameters import defaults

SIGNIFICANT_DIGITS = 6
THEME: dict[str, Any] = {"context": "notebook", "style": "whitegrid", "palette": "colorblind"}


def outputs_folder() -> Path:
    """`LOWRANK_OUTPUTS`, else `outputs/draft`: only the runner, once a notebook has run whole, writes to `outputs`."""
    named = os.environ.get("LOWRANK_OUTPUTS")
    return Path(named).resolve() if named else ROOT / "outputs" / "draft"


class Report:
    """The record of one run of one notebook.

    **Arguments:** `notebook`: its stem. `namespace`: `globals()` of the notebook, from which the parameters are read.
    """

    def __init__(self, notebook: str, namespace: Mapping[str, Any]) -> None:
        self.parameters = {name: namespace[name] for name in defaults(notebook)}
        self.folder = outputs_folder() / self.parameters["set_name"] / notebook
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
        """Says what went in: identities and hashes of data and models, dtype. Kept in run.json under `inputs`."""
        self.inputs |= inputs

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; its seconds are kept in run.json."""
        start = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + round(time.perf_counter() - start, 2)

    def table(self, table: pd.DataFrame, name: str, rows: int = 12, *, measured: Sequence[str] = ()) -> pd.DataFrame:
        """Writes `name.csv` and returns the first rows to be shown.

        **Arguments:** `measured`: columns that rest on times or memory, which no two runs share; see `lowrank.report.compare`.
        """
        self._named(name)
        if unknown := sorted(set(measured) - set(table)):
            raise ValueError(f"`measured` must be columns of the table, got {unknown}.")
        if measured:
            self.measured_columns[name] = list(measured)
        table.to_csv(self.folder / f"{name}.csv", index=False, float_format=f"%.{SIGNIFICANT_DIGITS}g")
        self.tables.add(name)
        return table.head(rows)

    def figure(self, figure: Figure | sns.axisgrid.Grid, name: str) -> Image:
        """Writes `name.png` and returns it to be shown. Its table, of the same name, must have been written before."""
        if name not in self.tables:
            raise ValueError(f"`name` must be that of a table written before the figure, got {name!r}.")
        drawn = figure.figure if isinstance(figure, sns.axisgrid.Grid) else figure
        save_figure(drawn, self.folder / f"{name}.png")
        return Image(filename=str(self.folder / f"{name}.png"))

    def claim(self, text: str, holds: Any, number: float | int | None = None, *, measured: bool = False) -> None:
        """Records a finding and says whether it held. A claim that fails is a result, not an error.

        **Arguments:** `holds`: a truth value, or one for each case, all of which must be true; in how many they are is then
        the number of the claim. `number`: the figure that decides otherwise. `measured`: it rests on times or memory, which
        no two runs share.
        """
        cases = np.asarray(holds)
        held, shown = bool(cases.all()), "" if number is None else f"{number:.3g}"
        if cases.ndim:
            shown = f"{int(cases.sum())} of {cases.size}"
        if measured:
            self.measured_claims.append(text)
        self.claims.append({"claim": text, "holds": held, "number": shown})
        pd.DataFrame(self.claims).to_csv(self.folder / "claims.csv", index=False)
        print(f"{'holds' if held else 'FAILS'}: {text}")

    def finish(self) -> pd.DataFrame:
        """Writes run.json and returns the claims to be shown."""
        held = sum(bool(claim["holds"]) for claim in self.claims)
        about = {
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
        (self.folder / "run.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf8")
        return pd.DataFrame(self.claims, columns=["claim", "holds", "number"])

    def _named(self, name: str) -> None:
        if not name.replace("_", "").isalnum() or name in {"claims", "run"}:
            raise ValueError(
                f"`name` must be letters, digits and underscores, and not 'claims' or 'run', got {name!r}."
            )


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG in a palette of 128 colours: a third of the size, in outputs/ and inside every notebook."""
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=100, bbox_inches="tight")
    plt.close(figure)
    PIL.Image.open(pixels).convert("RGB").quantize(128).save(path, optimize=True)
