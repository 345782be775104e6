"""The report as a site: `python -m lowrank.report.site SET ...` makes `_site/` of executed notebooks, docs/ and docstrings.

Not in `outputs/`, which holds results only: the site can be made of them at any time.
"""

import argparse
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
from lowrank.report.pages import counted, escaped, markdown, notebook_page, read_claims, read_run, verdicts
from lowrank.report.parameters import SETS, ParameterError, jobs, notebook_names, set_names
from lowrank.report.reference import write_reference
from lowrank.report.run import results_folder

SITE = ROOT / "_site"
# The figure of each notebook that the start page shows.
FIGURES = {
    "01_whitening": "held_out_error_by_tokens",
    "02_prehab": "quality_by_keep",
    "03_svd_comparison": "quality_by_keep",
    "04_stability": "stability_by_epoch",
    "05_rank_config": "gain_by_variant",
    "06_layer_selection": "quality_by_objective",
    "07_pi3_efficiency": "abs_rel_by_keep",
}


class SiteError(RuntimeError):
    """A site that cannot be built."""


Results = dict[str, dict[str, Path]]  # notebook -> set -> folder


def executed(sets: list[str], outputs: Path) -> Results:
    """The folders of results of the given sets.

    **Raises:** `ParameterError`: no such set. `SiteError`: no set is given, or one of its notebooks has no results.
    """
    if not sets:
        raise SiteError("`sets` must name at least one set, got none.")
    found: Results = {notebook: {} for notebook in notebook_names()}
    for name, notebook in jobs(sets):
        folder = outputs / name / notebook
        if missing := [
            file for file in ("run.json", "claims.csv", f"{notebook}.ipynb") if not (folder / file).is_file()
        ]:
            raise SiteError(f'{folder} must have {missing[0]}, and has none: run `make report SETS="{name}"` first.')
        found[notebook][name] = folder
    return {notebook: folders for notebook, folders in found.items() if folders}


def page(name: str, notebook: str) -> str:
    """Where the page of a notebook with a set is, seen from the start page."""
    return f"results/{name}/{notebook}"


def question(folder: Path, notebook: str) -> tuple[str, str]:
    """Title and question of a notebook, as its opening has them."""
    opening = nbformat.read(folder / f"{notebook}.ipynb", 4).cells[0].source
    asked = opening.partition("**Question.** ")[2].partition("\n\n")[0]
    return opening.partition("\n")[0].removeprefix("# "), asked


def results_section(results: Results, source: Path) -> str:
    """Each notebook with its question, a figure of the first set, and its pages."""
    parts = []
    for notebook, folders in results.items():
        first, folder = next(iter(folders.items()))
        title, asked = question(folder, notebook)
        figure = f"{notebook}-{FIGURES[notebook]}.png"
        shutil.copy(folder / f"{FIGURES[notebook]}.png", source / figure)
        pages = [
            f"[{name}]({page(name, notebook)}.ipynb) ({counted(read_claims(path))})" for name, path in folders.items()
        ]
        caption = f"`{FIGURES[notebook]}` of {first}."
        parts += [
            f"### {title}",
            asked,
            f"![{FIGURES[notebook]}]({figure})",
            f"{caption} Claims by page: {', '.join(pages)}.",
        ]
    return "\n\n".join(parts)


def claims_section(results: Results) -> str:
    """A table per notebook: a row per claim, a column per set, each verdict a link to the page that shows it."""
    parts = []
    for notebook, folders in results.items():
        columns = []
        for name, folder in folders.items():
            claims = read_claims(folder)
            found = verdicts(claims, f"{page(name, notebook)}.ipynb")
            columns.append(pd.Series(found, index=claims.claim.map(escaped), name=name))
        table = pd.concat(columns, axis=1, sort=False).fillna("")
        parts.append(markdown(table.rename_axis(f"claim of {notebook}").reset_index()))
    return "\n\n".join(parts)


def about_set(name: str) -> str:
    """What a set is: the comment that its file begins with."""
    lines = (SETS / f"{name}.yaml").read_text(encoding="utf8").splitlines()
    comment = itertools.takewhile(lambda line: line[:1] == "#", lines)
    return " ".join(line.removeprefix("# ") for line in comment).replace("|", r"\|")


def sets_section(results: Results) -> str:
    """The sets of the site, and the machines and time that their notebooks took."""
    rows = []
    for name in dict.fromkeys(name for folders in results.values() for name in folders):
        runs = [read_run(folders[name]) for folders in results.values() if name in folders]
        devices = escaped(", ".join(sorted({run["device"] for run in runs})))
        rows.append((name, about_set(name), devices, f"{sum(run['wall_s'] for run in runs):.0f} s"))
    return markdown(pd.DataFrame(rows, columns=["set", "what it is", "run on", "wall time"]))


def catalogue() -> str:
    """Every set that there is."""
    return markdown(pd.DataFrame([(name, about_set(name)) for name in set_names()], columns=["set", "what it is"]))


def toctrees(results: Results) -> str:
    """The navigation: a part per set, a page per notebook."""
    parts: dict[str, list[str]] = {}
    for notebook, folders in results.items():
        for name, folder in folders.items():
            title = question(folder, notebook)[0].partition(":")[0]
            parts.setdefault(name, []).append(f"{title} <{page(name, notebook)}>")
    return "\n\n".join(
        "\n".join(["```{toctree}", ":hidden:", f":caption: {name}", "", *pages, "```"]) for name, pages in parts.items()
    )


def write_source(results: Results, source: Path) -> None:
    """Everything that Sphinx reads, in a new folder: docs/, the README, which they include parts of, and generated pages."""
    shutil.copytree(ROOT / "docs", source)
    shutil.copy(ROOT / "README.md", source / "README.md")
    for path in source.glob("*.md"):  # the marks of filled blocks would be text: `<` is one in docstrings
        text = re.sub(r"^<!-- .* -->\n", "", path.read_text(encoding="utf8"), flags=re.MULTILINE)
        path.write_text(text, encoding="utf8")
    for notebook, folders in results.items():
        for name, folder in folders.items():
            path = source / f"{page(name, notebook)}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
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


def build(sets: list[str], outputs: Path, target: Path) -> Path:
    """Builds the site, which takes the place of an older one only when it is whole.

    **Returns:** the start page.

    **Raises:** `ParameterError`, `SiteError`: see `executed`; `SiteError` also where Sphinx fails or warns, which it prints.
    """
    results = executed(sets, outputs)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as folder:
        work = Path(folder)
        write_source(results, work / "source")
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(work / "doctrees")]
        done = subprocess.run([*command, str(work / "source"), str(work / "html")], check=False)
        if done.returncode:
            raise SiteError("Sphinx failed or warned, see above.")
        if target.exists():
            target.rename(work / "replaced")
        (work / "html").rename(target)
    return target / "index.html"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 results are missing or the site cannot be built."""
    parser = argparse.ArgumentParser(prog="python -m lowrank.report.site", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help="a file of params/, without .yaml, that was executed")
    try:
        print(build(parser.parse_args(arguments).sets, results_folder(), SITE))
    except (ParameterError, SiteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
