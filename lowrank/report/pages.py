"""A page of the site for one executed notebook: its claims, parameters and provenance beside what it shows."""

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

WIDGET = "application/vnd.jupyter.widget-view+json"  # progress bars: they need a kernel, or scripts from the web


def escaped(text: str) -> str:
    """The text as Markdown shows it unchanged, in a cell of a table too."""
    return re.sub(r"([\\`*_$<\[\]{}|])", r"\\\1", text)


def code(value: Any) -> str:
    """A value of a JSON file as a code span that fits in a cell of a table."""
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", r"\|")


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, every cell as it is."""
    return table.to_markdown(index=False, disable_numparse=True)


def read_run(folder: Path) -> dict[str, Any]:
    """What a run left in run.json."""
    return json.loads((folder / "run.json").read_text(encoding="utf8"))


def read_claims(folder: Path) -> pd.DataFrame:
    """The claims of one run with what they came to, `holds` or `fails`, and the `number` beside it, empty where there is none."""
    table = pd.read_csv(folder / "claims.csv", dtype={"number": str}).reindex(columns=["claim", "holds", "number"])
    return table.assign(verdict=table.holds.map({True: "holds", False: "fails"}), number=table.number.fillna(""))


def verdicts(claims: pd.DataFrame, target: str = "") -> list[str]:
    """What claims came to in Markdown, failing ones set off, each a link where there is a target."""
    pairs = zip(claims.verdict, claims.number, strict=True)
    link = f"({target})" if target else ""
    return [f"[{', '.join(filter(None, pair))}]{link}{{.{pair[0]}}}" for pair in pairs]


def counted(claims: pd.DataFrame) -> str:
    """How many claims hold, in words."""
    return f"{int(claims.holds.sum())} of {len(claims)} hold"


def claims_section(folder: Path) -> str:
    claims = read_claims(folder)
    table = pd.DataFrame({"claim": claims.claim.map(escaped), "": verdicts(claims)})
    return f"## Claims: {counted(claims)}\n\n{markdown(table)}"


def parameters_section(cell: str, values: dict[str, Any]) -> str:
    """The values that were used, with the comments of the parameters cell."""
    comments = dict(re.findall(r"^(\w+) = .*  # (.*)$", cell, flags=re.MULTILINE))
    rows = [(f"`{name}`", code(value), escaped(comments.get(name, ""))) for name, value in values.items()]
    return f"## Parameters\n\n{markdown(pd.DataFrame(rows, columns=['parameter', 'value', 'what it is']))}"


def provenance_section(about: dict[str, Any]) -> str:
    """Where a result came from and what it took, from run.json."""
    changed = " with uncommitted changes" if about["git_dirty"] else ""
    rows = {
        "commit": f"`{about['git_commit'] or 'unknown'}`{changed}",
        "device": escaped(f"{about['device']}, {about['platform']}"),
        "Python": about["python"],
        "packages": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "went in": ", ".join(f"{escaped(name)} {code(value)}" for name, value in about["inputs"].items()),
        "wall time": f"{about['wall_s']} s",
        "peak memory": ", ".join(f"{megabytes} MB ({where})" for where, megabytes in about["peak_memory_mb"].items()),
    }
    facts = pd.DataFrame(rows.items(), columns=["", "as run.json has it"])
    stages = [(escaped(stage), f"{seconds} s") for stage, seconds in about["stages_s"].items()]
    tables = [facts, pd.DataFrame(stages, columns=["stage", "wall time"])]
    return "\n\n".join(["## Where this came from", *(markdown(table) for table in tables)])


def _without_widgets(cell: Any) -> Any:
    if cell.cell_type == "code":
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return cell


def notebook_page(folder: Path, set_name: str, notebook: str) -> Any:
    """The executed notebook as a page.

    The set is in the title; claims follow the opening; a table takes the place of the two cells of parameters; provenance
    ends it.

    **Arguments:** `folder`: of the results, with the executed notebook, run.json and claims.csv.

    **Returns:** a notebook object.
    """
    about, page = read_run(folder), nbformat.read(folder / f"{notebook}.ipynb", 4)
    opening, *cells = page.cells
    title, _, rest = opening.source.partition("\n")
    opening.source = f"{title} ({set_name})\n{rest}"
    shown = [opening, nbformat.v4.new_markdown_cell(claims_section(folder), id="claims")]
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags:
            section = parameters_section(cell.source, about["parameters"])
            shown.append(nbformat.v4.new_markdown_cell(section, id="parameters"))
        elif "injected-parameters" not in tags:
            shown.append(_without_widgets(cell))
    page.cells = [*shown, nbformat.v4.new_markdown_cell(provenance_section(about), id="provenance")]
    page.metadata.pop("widgets", None)
    return page
