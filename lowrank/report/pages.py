"""Make the page of one executed notebook for the site: claims, parameters and provenance beside its cells."""

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from lowrank.report.findings.results import format_effect
from lowrank.report.inference import INCONCLUSIVE, REFUTED, SUPPORTED
from lowrank.report.result_files import read_claims, read_page, read_run

STYLES = {
    SUPPORTED: "supported",
    REFUTED: "refuted",
    INCONCLUSIVE: "inconclusive",
}  # verdict -> its class in the style sheet
WIDGET = "application/vnd.jupyter.widget-view+json"  # progress bars: they need a kernel, or scripts from the web


def escape(text: str) -> str:
    """Escape a text so that Markdown shows it unchanged, also in a cell of a table."""
    return re.sub(r"([\\`*_$<\[\]{}|])", r"\\\1", text)


def format_code(value: Any) -> str:
    """Format a JSON value as a code span that fits in a cell of a table."""
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", r"\|")


def format_table(table: pd.DataFrame) -> str:
    """Format a table in Markdown, every cell as it is."""
    return table.to_markdown(index=False, disable_numparse=True)


def format_verdicts(claims: pd.DataFrame, target: str = "") -> list[str]:
    """Format the verdict and the effect of each claim in Markdown; the style sheet sets off those that are not supported.

    **Arguments**

    - `claims`: a table of `read_claims`.
    - `target`: page that each verdict links to. Default "": no link.
    """
    link = f"({target})" if target else ""
    return [
        f"[{row.verdict}]{link}{{.{STYLES[row.verdict]}}}: {escape(format_effect(row))}" for _, row in claims.iterrows()
    ]


def count_claims(claims: pd.DataFrame) -> str:
    """Say in words how many claims are supported."""
    return f"{int((claims.verdict == SUPPORTED).sum())} of {len(claims)} supported"


def claims_section(folder: Path) -> str:
    """Make the section on the claims of one folder of results."""
    claims = read_claims(folder)
    table = pd.DataFrame({"claim": claims.claim.map(escape), "": format_verdicts(claims)})
    return f"## Claims: {count_claims(claims)}\n\n{format_table(table)}"


def parameters_section(cell: str, values: dict[str, Any]) -> str:
    """Make the section on parameters.

    **Arguments**

    - `cell`: source of the parameters cell; the comments of its lines become descriptions.
    - `values`: the values that were used, by name.
    """
    comments = dict(re.findall(r"^(\w+) = .*  # (.*)$", cell, flags=re.MULTILINE))
    rows = [(f"`{name}`", format_code(value), escape(comments.get(name, ""))) for name, value in values.items()]
    return f"## Parameters\n\n{format_table(pd.DataFrame(rows, columns=['parameter', 'value', 'meaning']))}"


def provenance_section(run: dict[str, Any]) -> str:
    """Make the section on commit, machine, versions, inputs, time and memory from the content of run.json."""
    changes = " with uncommitted changes" if run["git_dirty"] else ""
    rows = {
        "commit": f"`{run['git_commit'] or 'unknown'}`{changes}",
        "frozen choices": f"`{run['frozen']}`, a hash of parameters and code from before test was read",
        "device": escape(f"{run['device']}, {run['platform']}"),
        "Python": run["python"],
        "packages": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "inputs": ", ".join(f"{escape(name)} {format_code(value)}" for name, value in run["inputs"].items()),
        "wall time": f"{run['wall_s']} s",
        "peak memory": ", ".join(f"{megabytes} MB ({where})" for where, megabytes in run["peak_memory_mb"].items()),
    }
    facts = pd.DataFrame(rows.items(), columns=["", "from run.json"])
    stages = [(escape(stage), f"{seconds} s") for stage, seconds in run["stages_s"].items()]
    tables = [facts, pd.DataFrame(stages, columns=["stage", "wall time"])]
    return "\n\n".join(["## Where this came from", *(format_table(table) for table in tables)])


def tables_section(folder: Path) -> str:
    """Make the section with a link to each table, which lies beside the page in a folder with the notebook's name."""
    links = [f"[{path.stem}]({folder.name}/{path.name})" for path in sorted(folder.glob("*.csv"))]
    return f"## Tables as CSV\n\n{', '.join(links)}"


def _without_widgets(cell: Any) -> Any:
    if cell.cell_type == "code":
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return cell


def notebook_page(folder: Path, set_name: str, notebook: str) -> Any:
    """Make a page of an executed notebook.

    The title names the set. Claims follow the opening. A table replaces the two cells of parameters. Links to the
    tables and provenance end the page.

    **Arguments**

    - `folder`: folder of results, with the executed notebook, run.json and claims.csv.
    - `set_name`: the set, for the title.
    - `notebook`: stem of the notebook.

    **Returns** a notebook object.
    """
    run, page = read_run(folder, whole=True), read_page(folder / f"{notebook}.ipynb")
    opening, *cells = page.cells
    title, _, rest = opening.source.partition("\n")
    opening.source = f"{title} ({set_name})\n{rest}"
    shown = [opening, nbformat.v4.new_markdown_cell(claims_section(folder), id="claims")]
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags:
            section = parameters_section(cell.source, run["parameters"])
            shown.append(nbformat.v4.new_markdown_cell(section, id="parameters"))
        elif "injected-parameters" not in tags:
            shown.append(_without_widgets(cell))
    ends = {"tables": tables_section(folder), "provenance": provenance_section(run)}
    page.cells = [*shown, *(nbformat.v4.new_markdown_cell(text, id=name) for name, text in ends.items())]
    page.metadata.pop("widgets", None)
    return page
