"""Build the site from executed notebooks, docs/ and docstrings.

It goes to `_site/`, not to `outputs/`, which has results only: the site can be built from them at any time.
"""

import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pandas as pd

from lowrank.io.dependencies import ROOT
from lowrank.io.files import writing
from lowrank.report.errors import ReportError
from lowrank.report.folders import published_folder
from lowrank.report.pages import (
    count_claims,
    escape,
    format_table,
    format_verdicts,
    notebook_page,
)
from lowrank.report.parameters import SETS, jobs, notebook_names, set_names
from lowrank.report.reference import write_reference
from lowrank.report.result_files import read_claims, read_page, read_run

SITE = ROOT / "_site"
# The start page shows one figure of each notebook.
FIGURES = {
    "01_whitening": "held_out_error_by_tokens",
    "02_prehab": "quality_by_refinement",
    "03_svd_comparison": "added_loss_by_part",
    "04_stability": "stability_by_epoch",
    "05_rank_config": "gain_by_variant",
    "06_layer_selection": "quality_by_keep",
    "07_pi3_efficiency": "abs_rel_by_targets",
}


class SiteError(ReportError):
    """Report that the site cannot be built."""


Results = dict[str, dict[str, Path]]  # notebook -> set -> folder


def find_results(sets: list[str], folders: list[Path]) -> Results:
    """Find the folders of results of some sets.

    **Arguments**

    - `sets`: names of sets or variants, at least one.
    - `folders`: folders of results. All pages of a set come from the first one that has any result of it.

    **Returns** notebook -> set -> folder.

    **Raises**

    - `ParameterError`: no such set.
    - `SiteError`: no set, or a notebook of a set without results.
    """
    if not sets:
        raise SiteError("`sets` must name at least one set, got none.")
    results: Results = {notebook: {} for notebook in notebook_names()}
    for name, notebook in jobs(sets):
        home = next((folder for folder in folders if any(folder.glob(f"{name}/*/run.json"))), folders[0])
        folder = home / name / notebook
        needed = ("run.json", "claims.csv", f"{notebook}.ipynb")
        if missing := [file for file in needed if not (folder / file).is_file()]:
            raise SiteError(f'{folder} must have {missing[0]}, and has none: run `make report SETS="{name}"` first.')
        results[notebook][name] = folder
    return {notebook: folders for notebook, folders in results.items() if folders}


def page_path(name: str, notebook: str) -> str:
    """Return the path of a page from the start page, without suffix.

    **Arguments**

    - `name`: the set.
    - `notebook`: stem of the notebook.
    """
    return f"results/{name}/{notebook}"


def read_question(folder: Path, notebook: str) -> tuple[str, str]:
    """Read the title and the question of a notebook from its opening.

    **Arguments**

    - `folder`: folder of results with the executed notebook.
    - `notebook`: stem of the notebook.
    """
    opening = read_page(folder / f"{notebook}.ipynb").cells[0].source
    question = opening.partition("**Question.** ")[2].partition("\n\n")[0]
    return opening.partition("\n")[0].removeprefix("# "), question


def results_section(results: Results, source: Path) -> str:
    """Make the section with the question, a figure and the pages of each notebook.

    **Arguments**

    - `results`: notebook -> set -> folder. The figure comes from the first set.
    - `source`: the folder of Sphinx's sources; the figures are copied there.
    """
    parts = []
    for notebook, folders in results.items():
        first, folder = next(iter(folders.items()))
        title, question = read_question(folder, notebook)
        figure = f"{notebook}-{FIGURES[notebook]}.png"
        if not (picture := folder / f"{FIGURES[notebook]}.png").is_file():
            raise SiteError(f"{folder} must have {picture.name}, and has none: run the notebook again.")
        shutil.copy(picture, source / figure)
        pages = [
            f"[{name}]({page_path(name, notebook)}.ipynb) ({count_claims(read_claims(path))})"
            for name, path in folders.items()
        ]
        caption = f"`{FIGURES[notebook]}` of {first}."
        parts += [
            f"### {title}",
            question,
            f"![{FIGURES[notebook]}]({figure})",
            f"{caption} Claims by page: {', '.join(pages)}.",
        ]
    return "\n\n".join(parts)


def claims_section(results: Results) -> str:
    """Make a table per notebook with a row per claim and a column per set; each verdict links to its page."""
    parts = []
    for notebook, folders in results.items():
        columns = []
        for name, folder in folders.items():
            claims = read_claims(folder)
            verdicts = format_verdicts(claims, f"{page_path(name, notebook)}.ipynb")
            columns.append(pd.Series(verdicts, index=claims.claim.map(escape), name=name))
        table = pd.concat(columns, axis=1, sort=False).fillna("")
        parts.append(format_table(table.rename_axis(f"claim of {notebook}").reset_index()))
    return "\n\n".join(parts)


def describe_set(name: str) -> str:
    """Return the comment at the top of a set file."""
    lines = (SETS / f"{name}.yaml").read_text(encoding="utf8").splitlines()
    comment = itertools.takewhile(lambda line: line[:1] == "#", lines)
    return " ".join(line.removeprefix("# ") for line in comment).replace("|", r"\|")


def sets_section(results: Results) -> str:
    """Make the table of the sets of the site, with the machines and the time that their notebooks took."""
    rows = []
    for name in dict.fromkeys(name for folders in results.values() for name in folders):
        runs = [read_run(folders[name], whole=True) for folders in results.values() if name in folders]
        devices = escape(", ".join(sorted({run["device"] for run in runs})))
        rows.append((name, describe_set(name), devices, f"{sum(run['wall_s'] for run in runs):.0f} s"))
    return format_table(pd.DataFrame(rows, columns=["set", "description", "run on", "wall time"]))


def catalogue() -> str:
    """Make the table of all sets of the project."""
    rows = [(name, describe_set(name)) for name in set_names()]
    return format_table(pd.DataFrame(rows, columns=["set", "description"]))


def toctrees(results: Results) -> str:
    """Make the navigation: a part per set, a page per notebook."""
    parts: dict[str, list[str]] = {}
    for notebook, folders in results.items():
        for name, folder in folders.items():
            title = read_question(folder, notebook)[0].partition(":")[0]
            parts.setdefault(name, []).append(f"{title} <{page_path(name, notebook)}>")
    return "\n\n".join(
        "\n".join(["```{toctree}", ":hidden:", f":caption: {name}", "", *pages, "```"]) for name, pages in parts.items()
    )


def _copy_figures(text: str, source: Path) -> str:
    """Copy the published figures that a page shows to the sources of Sphinx, and return the page with their new paths."""

    def copy(match: re.Match[str]) -> str:
        target = source / "outputs" / match[1]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(published_folder() / match[1], target)
        return f"](outputs/{match[1]})"

    return re.sub(r"\]\((?:\.\./)?outputs/([^)]*\.png)\)", copy, text)


def write_source(results: Results, source: Path) -> None:
    """Write the sources of Sphinx: docs/, the README, which pages of docs/ include in part, and generated pages.

    **Arguments**

    - `results`: notebook -> set -> folder.
    - `source`: the folder to make.
    """
    shutil.copytree(ROOT / "docs", source)
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    (source / "README.md").write_text(readme.replace("](docs/", "]("), encoding="utf8")  # its links, seen from docs/
    for path in source.glob("*.md"):  # the marks of filled blocks would be text: `<` is one in docstrings
        text = re.sub(r"^<!-- .* -->\n", "", path.read_text(encoding="utf8"), flags=re.MULTILINE)
        path.write_text(_copy_figures(text, source), encoding="utf8")
    for notebook, folders in results.items():
        for name, folder in folders.items():
            path = source / f"{page_path(name, notebook)}.ipynb"
            tables = path.with_suffix("")
            tables.mkdir(parents=True)
            for table in folder.glob("*.csv"):
                shutil.copy(table, tables)
            nbformat.write(notebook_page(folder, name, notebook), path)
    fragments = {
        "results": results_section(results, source),
        "claims": claims_section(results),
        "sets": sets_section(results),
        "catalogue": catalogue(),
        "toctrees": toctrees(results),
    }
    for name, text in fragments.items():
        (source / f"{name}.txt").write_text(text + "\n", encoding="utf8")
    write_reference(source / "reference")


def build_site(sets: list[str], folders: list[Path], target: Path) -> Path:
    """Build the site, and replace an older one only when the new one is whole.

    **Arguments**

    - `sets`: names of sets or variants that have results, at least one.
    - `folders`: folders of results; the first one that has any result of a set counts for it.
    - `target`: the folder of the site.

    **Returns** the start page.

    **Raises**

    - `ParameterError`: no such set.
    - `SiteError`: no set; a notebook of a set without results; Sphinx failed or warned, and printed why.
    """
    results = find_results(sets, folders)
    with tempfile.TemporaryDirectory() as folder:
        source, doctrees, html = (Path(folder, name) for name in ("source", "doctrees", "html"))
        write_source(results, source)
        command = [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "-d",
            str(doctrees),
            str(source),
            str(html),
        ]
        if subprocess.run(command, check=False).returncode:
            raise SiteError("Sphinx failed or warned, see above.")
        with writing(target) as partial:
            shutil.move(html, partial)
    return target / "index.html"
