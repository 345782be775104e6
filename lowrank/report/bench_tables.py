"""The tables of `make bench` in docs/benchmarks.md and docs/scaling.md, made from the files in outputs/bench."""

import pandas as pd

from lowrank.report.folders import published_folder
from lowrank.report.result_files import read_table

NOT_ADDED = ["forward pass", "save"]  # their bytes belong to the model and to the file, and add to no peak


def benchmarks() -> str:
    """Tabulate the measured ratios, one to a row; then those of single layers side by side."""
    tables = [read_table(path) for path in sorted((published_folder() / "bench").glob("*.csv"))]
    ratios = pd.concat(table for table in tables if "value" in table)
    shown = ratios.assign(value=[f"{value:.3g}" for value in ratios.value], spread=ratios.get("spread", ""))
    parts = [shown[["what", "case", "figure", "value", "spread", "device"]].fillna("").to_markdown(index=False)]
    for layers in (table for table in tables if "speedup" in table):
        layers["cell"] = layers.speedup.map("{:.2f}".format) + layers.share.map(" ({:.0%})".format)
        layers["way"] = layers.storage + layers.multiple.map(", multiples of {}".format)
        case = ["layer", "keep", "tokens", "dtype", "device"]
        wide = layers.pivot(index=case, columns="way", values="cell")[layers["way"].unique()]
        parts.append(wide.reset_index().to_markdown(index=False))
    return "\n\n".join(parts)


def sizing() -> str:
    """Tabulate the cost of a compression: seconds by stage and model, the check of the fit, then models of published shapes."""
    table = read_table(published_folder() / "bench" / "sizing.csv")
    stages = list(table.stage.unique())
    measured, predicted, large = (table.query("kind == @kind") for kind in ("measured", "predicted", "extrapolated"))
    models = list(measured.model.unique())
    seconds = measured.pivot(index="stage", columns="model", values="seconds")[models].map("{:.3g} s".format)
    cells = large.seconds.map(format_seconds) + (large.bytes / 1e9).map(", {:,.3g} GB".format)
    wide = large.assign(cell=cells).pivot(index="stage", columns="model", values="cell")[large.model.unique()]
    fit = _check_fit(measured.query("model == @models[-1]").set_index("stage"), predicted.set_index("stage"))
    tables = {"stage": seconds, f"stage, {models[-1]}": fit, "extrapolated": wide}
    ordered = [part.reindex([s for s in stages if s in part.index]).rename_axis(name) for name, part in tables.items()]
    return "\n\n".join(part.reset_index().to_markdown(index=False) for part in ordered)


def _check_fit(largest: pd.DataFrame, predicted: pd.DataFrame) -> pd.DataFrame:
    """Compare the largest model as measured with its prediction from the smaller ones, both by stage."""
    return pd.DataFrame(
        {
            "seconds grow with": largest.work_of,
            "ns each": largest.ns_per_work.map("{:.3g}".format),
            "predicted / measured seconds": (predicted.seconds / largest.seconds).map("{:.2f}".format),
            "measured peak, MB": largest.peak_mb.map("{:.3g}".format),
            "by the formula, MB": (largest.bytes / 1e6).map("{:.3g}".format).drop(NOT_ADDED),
        }
    ).fillna("")


def format_seconds(seconds: float) -> str:
    """Write a duration in seconds, from an hour on in hours."""
    return f"{seconds:,.0f} s" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
