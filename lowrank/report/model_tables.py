"""The tables of pretrained models: every training-free arm at every budget, beside weights of fewer bits."""

from typing import Any

import pandas as pd

from lowrank.report.result_files import read_run
from lowrank.report.tables import headline_metric, read_test, result_folders

PRETRAINED = ("wikitext2-gemma270m", "cifar10-dinov2", "sst2-minilm")  # sets whose model was pretrained by others
ARMS = {  # of notebook 03, with their names in tables
    "svd": "plain SVD",
    "asvd": "ASVD's scaling",
    "fwsvd": "FWSVD's weighting",
    "whitened": "whitening (SVD-LLM without update)",
    "whitened, pivots": "whitening with pivots (PIFA)",
    "two_sided": "outputs weighed by gradients",
    "pivot storage": "the same with pivots",
    "ranks by spectrum": "and ranks by spectrum",
    "ranks by measured loss": "and ranks by measured loss",
    "retargeted": "and retargeted",
}
Z = 1.96  # standard errors of a 95 % interval


def list_pretrained() -> list[str]:
    """List the published sets of pretrained models, in the order of `PRETRAINED`."""
    found = result_folders("03_svd_comparison")
    return [name for name in PRETRAINED if name in found]


def pretrained_models() -> str:
    """Tabulate the loss that each arm adds to each pretrained model on test, by kept share of the targeted weights."""
    parts = []
    for name in list_pretrained():
        folder = result_folders("03_svd_comparison")[name]
        table, bits, metric = (
            read_test(folder, "quality_by_keep"),
            read_test(folder, "quality_by_bits"),
            headline_metric(folder),
        )
        dense = table[table.way == "dense"].iloc[0]
        columns: dict[str, dict[str, str]] = {}
        for keep, rows in table[table.way.isin(ARMS)].groupby("keep", sort=False):
            share, size = rows.keep_model.max(), rows.weights_mb.max()
            title = f"keep {keep:g}: {share:.0%} of the model, {size:.3g} MB"
            columns[title] = {ARMS[row["way"]]: _show(row, metric) for row in records(rows)}
        shown = pd.DataFrame(columns).reindex(
            [label for label in ARMS.values() if any(label in c for c in columns.values())]
        )
        rounded = [
            f"{row['bits']:.0f} bits, {row['weights_mb']:.3g} MB: {_show(row, metric)}"
            for row in records(bits[(bits.way == "dense") & bits.bits.notna()])
        ]
        run = read_run(folder)
        spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in run["stages_s"].items() if seconds >= 1)
        parts += [
            f"**{name}**: dense loss {dense.loss:.4g} ({metric} {dense[metric]:.4g}), {dense.weights_mb:.4g} MB. Dense with "
            f"fewer bits: {'; '.join(rounded)}. On {run['device']}: {spent}.",
            shown.fillna("")
            .rename_axis("added loss ± 95 %")
            .reset_index()
            .to_markdown(index=False, disable_numparse=True),
        ]
    return "\n\n".join(parts) or "No such set is published yet."


def records(table: Any) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    return table.to_dict("records")


def _show(row: dict[str, Any], metric: str) -> str:
    return f"{row['added_loss']:+.3g} ± {Z * row['added_error']:.1g} ({row[metric]:.3g})"
