"""Fills the marked blocks of README.md and docs/ from outputs/: `python -m lowrank.report.readme`. No number in them is typed."""

import re
import sys
from pathlib import Path

import pandas as pd

from lowrank.io.dependencies import ROOT
from lowrank.report.parameters import notebook_names
from lowrank.report.sizing import sizing
from lowrank.report.tables import (
    OUTPUTS,
    _results,
    adapters,
    baselines,
    benchmarks,
    comparison,
    draw_objectives,
    fixed_bases,
    geometry,
    layer_selection,
    preparation,
)

README = ROOT / "README.md"


def claims() -> str:
    """One row per claim of each notebook, one column per set: whether it held there."""
    parts = []
    for notebook in notebook_names():
        held = {
            name: pd.read_csv(folder / "claims.csv").set_index("claim").holds
            for name, folder in _results(notebook).items()
        }
        table = pd.DataFrame(held).map({True: "holds", False: "**fails**"}.get).fillna("")
        table.index = table.index.str.replace("|", r"\|")  # a bar would end the cell
        parts.append(table.rename_axis(f"claim of {notebook}").reset_index().to_markdown(index=False))
    return "\n\n".join(parts)


BLOCKS = {
    "claims": claims,
    "baselines": baselines,
    "comparison": comparison,
    "preparation": preparation,
    "fixed bases": fixed_bases,
    "adapters": adapters,
    "layer selection": layer_selection,
    "geometry": geometry,
    "benchmarks": benchmarks,
}
PAGES = {README: BLOCKS, ROOT / "docs" / "cluster.md": {"sizing": lambda: sizing(OUTPUTS / "bench" / "sizing.csv")}}


def filled(page: Path) -> str:
    """The text of a page with what stands between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    text = page.read_text(encoding="utf8")
    for name, make in PAGES[page].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(pattern, text, flags=re.DOTALL):
            raise ValueError(f"{page.name} must have a block <!-- {name} --> ... <!-- /{name} -->.")
        content = make()
        text = re.sub(pattern, lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    draw_objectives(OUTPUTS / "summary" / "quality_by_objective.png")
    for path in PAGES:
        path.write_text(filled(path), encoding="utf8")
    sys.exit(0)
