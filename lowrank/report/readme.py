"""Fill the marked blocks of README.md and docs/ from the published results, so that no number in them is typed."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from lowrank.io.dependencies import ROOT
from lowrank.io.files import writing
from lowrank.report.bench_tables import benchmarks, sizing
from lowrank.report.errors import ReportError
from lowrank.report.findings.registry import FINDINGS, list_readings, read_finding
from lowrank.report.findings.results import format_effect, read_results
from lowrank.report.folders import published_folder
from lowrank.report.inference import REFUTED
from lowrank.report.model_tables import PRETRAINED, list_pretrained, pretrained_models
from lowrank.report.pages import escape
from lowrank.report.parameters import notebook_names
from lowrank.report.result_files import read_claims, read_run
from lowrank.report.scaling_tables import checked_lines, real_costs, several_gpus
from lowrank.report.selection_tables import layer_selection
from lowrank.report.tables import (
    adapters,
    baselines,
    comparison,
    fixed_bases,
    geometry,
    headline_metric,
    preparation,
    read_test,
    result_folders,
)

README = ROOT / "README.md"
# notebook -> claims of the first screen; each has a line, whatever its verdict
SHOWN_CLAIMS = {
    "03_svd_comparison": (
        "compression/bits-retargeted",
        "compression/best-pivots",
        "compression/retargeted-best",
        "compression/whitened-svd",
    ),
    "02_prehab": ("prehab/picked/all-after",),
    "04_stability": ("oialr/static",),
    "05_rank_config": ("adapters/threshold-uniform",),
    "06_layer_selection": ("pruning/block",),
    "07_pi3_efficiency": ("pi3/whitened-svd",),
}
SHOWN_ARMS = {  # of notebook 03, with their names on the first screen
    "dense": "dense",
    "svd": "plain SVD",
    "whitened": "whitening (SVD-LLM's truncation)",
    "whitened, pivots": "whitening with pivots (PIFA)",
    "ranks by measured loss": "best combination",
    "retargeted": "best combination, retargeted",
}


def _claims_of(notebook: str) -> dict[str, pd.DataFrame]:
    """Return set -> claims, by id."""
    return {name: read_claims(folder).set_index("id") for name, folder in result_folders(notebook).items()}


def findings(pretrained: bool = True) -> str:
    """List the claims of `SHOWN_CLAIMS` with their effects.

    **Arguments**

    - `pretrained`: those that were judged on pretrained models, and on these alone: the first screen is about them. Otherwise
      the others, which small models trained here answer. Default True.
    """
    lines = []
    for notebook, keys in SHOWN_CLAIMS.items():
        page = f"docs/results.md#{notebook[3:].replace('_', '-')}"
        found = _claims_of(notebook)
        for key in keys:
            judged = {name: claims.loc[key] for name, claims in found.items() if key in claims.index}
            if not judged:
                raise ReportError(f"{published_folder()} must have the claim {key!r} of {notebook}, and has none.")
            parts = {name: row for name, row in judged.items() if name in PRETRAINED} or judged
            if (parts is judged) == pretrained:
                continue
            sides = "; ".join(f"{name}: {format_effect(row)}, **{row.verdict}**" for name, row in parts.items())
            lines.append(f"- {next(iter(parts.values())).claim}. {sides} ([more]({page}))")
    return "\n".join(lines)


def headline() -> str:
    """Tabulate test loss and metric of a few arms at the headline keep of each pretrained model, of each set without one."""
    columns = {}
    folders = result_folders("03_svd_comparison")
    for name in list_pretrained() or folders:
        folder = folders[name]
        table, keep = read_test(folder, "quality_by_keep"), read_run(folder)["parameters"]["headline_keep"]
        metric = headline_metric(folder)
        rows = table[((table.keep - keep).abs() < 1e-9) | (table.way == "dense")].set_index("way")
        share = rows.loc["whitened", "keep_model"]
        columns[f"{name}, {share:.0%} of the model"] = {
            label: f"{rows.loss[way]:.3f} / {rows[metric][way]:.3g}"
            for way, label in SHOWN_ARMS.items()
            if way in rows.index
        }
    table = pd.DataFrame(columns).reindex(list(SHOWN_ARMS.values())).dropna(how="all")
    return table.fillna("").rename_axis("loss / metric").reset_index().to_markdown(index=False)


def claims() -> str:
    """Make a table for each notebook, with a row per claim, and its verdict and effect in a column per set."""
    parts = []
    for notebook in notebook_names():
        found = _claims_of(notebook)
        texts = pd.concat([rows.claim for rows in found.values()])
        texts = texts[~texts.index.duplicated()]
        cells = {
            name: pd.Series({key: f"{show_verdict(row.verdict)}: {format_effect(row)}" for key, row in rows.iterrows()})
            for name, rows in found.items()
        }
        table = pd.DataFrame(cells).reindex(texts.index).fillna("")
        table.insert(0, f"claim of {notebook}", texts)
        parts.append(table.to_markdown(index=False, disable_numparse=True))
    return "\n\n".join(parts)


def show_verdict(verdict: str) -> str:
    """Return a verdict in Markdown; what is refuted stands out."""
    return f"**{verdict}**" if verdict == REFUTED else verdict


def readings(notebook: str) -> str:
    """List what the tables of a notebook show, a paragraph per set.

    **Arguments**

    - `notebook`: its stem.
    """
    parts = []
    for name, folder in result_folders(notebook).items():
        results = read_results(folder)
        sentences = [read_finding(notebook, table, results) for table in list_readings(notebook, results)]
        parts.append("\n".join([f"**{name}**", "", *(f"- {escape(sentence)}" for sentence in sentences)]))
    return "\n\n".join(parts)


RESULTS = {
    "baselines": baselines,
    "comparison": comparison,
    "pretrained models": pretrained_models,
    "preparation": preparation,
    "fixed bases": fixed_bases,
    "adapters": adapters,
    "layer selection": layer_selection,
    "geometry": geometry,
} | {f"readings of {notebook}": partial(readings, notebook) for notebook in FINDINGS}
DOCS = ROOT / "docs"
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"findings": findings, "headline": headline, "other findings": partial(findings, pretrained=False)},
    DOCS / "results.md": RESULTS,
    DOCS / "claims.md": {"claims": claims},
    DOCS / "benchmarks.md": {"benchmarks": benchmarks},
    DOCS / "scaling.md": {
        "real costs": real_costs,
        "sizing": sizing,
        "checked lines": checked_lines,
        "several gpus": several_gpus,
    },
}


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
    """Write all pages anew, and return them."""
    texts = {page: fill_blocks(page) for page in PAGES}  # an error leaves all pages as they were
    for page, text in texts.items():
        with writing(page) as partial:
            partial.write_text(text, encoding="utf8")
    return list(texts)
