"""Fill the marked blocks of README.md and docs/ from the published results, so that no number in them is typed."""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lowrank.io.dependencies import ROOT
from lowrank.io.files import writing
from lowrank.report.bench_tables import benchmarks, sizing
from lowrank.report.claims import FAILS
from lowrank.report.errors import ReportError
from lowrank.report.folders import published_folder
from lowrank.report.parameters import notebook_names
from lowrank.report.result_files import read_claims
from lowrank.report.selection_tables import draw_objectives, layer_selection
from lowrank.report.tables import (
    adapters,
    baselines,
    comparison,
    fixed_bases,
    geometry,
    preparation,
    result_folders,
)

README = ROOT / "README.md"


def claims() -> str:
    """Make a table for each notebook, with a row per claim and its verdict in a column per set."""
    parts = []
    for notebook in notebook_names():
        found = {name: read_claims(folder).set_index("claim") for name, folder in result_folders(notebook).items()}
        table = pd.DataFrame({name: rows.verdict for name, rows in found.items()}).replace(FAILS, f"**{FAILS}**")
        table.index = table.index.str.replace("|", r"\|")  # a bar would end the cell
        parts.append(table.fillna("").rename_axis(f"claim of {notebook}").reset_index().to_markdown(index=False))
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
PAGES = {README: BLOCKS, ROOT / "docs" / "cluster.md": {"sizing": sizing}}


def fill_blocks(page: Path) -> str:
    """Return the text of a page with new content between each `<!-- NAME -->` and `<!-- /NAME -->`.

    **Arguments**

    - `page`: one of `PAGES`.

    **Raises**

    - `ValueError`: the page lacks a block.
    - `ReportError`: the published results lack what a block shows.
    """
    text = page.read_text(encoding="utf8")
    for name, make in PAGES[page].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(pattern, text, flags=re.DOTALL):
            raise ValueError(f"{page.name} must have a block <!-- {name} --> ... <!-- /{name} -->.")
        content = _make(page, name, make)
        text = re.sub(pattern, lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    return text


def _make(page: Path, name: str, make: Callable[[], str]) -> str:
    """Make a block. Its tables are read by the names of their columns and rows, any of which a file may lack."""
    try:
        return make()
    except (LookupError, AttributeError, TypeError, pd.errors.UndefinedVariableError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ReportError(
            f"{published_folder()} must have what {name!r} of {page.name} shows, and lacks {reason}."
        ) from error


def fill_pages() -> list[Path]:
    """Write all pages and the figure of the README anew, and return the pages."""
    texts = {page: fill_blocks(page) for page in PAGES}  # an error leaves all pages as they were
    picture = published_folder() / "summary" / "quality_by_objective.png"
    _make(README, picture.name, lambda: str(draw_objectives(picture)))
    for page, text in texts.items():
        with writing(page) as partial:
            partial.write_text(text, encoding="utf8")
    return list(texts)
