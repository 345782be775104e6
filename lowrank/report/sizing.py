"""What a compression costs against the size of the model, as docs/cluster.md shows it."""

from pathlib import Path

import pandas as pd

NOT_ADDED = ["forward pass", "save"]  # their bytes are those of the model and of the file, and come to no peak


def sizing(path: Path) -> str:
    """Three tables of `bench_sizing`: seconds by stage and size; memory and the check of the fit; the published shapes."""
    table = pd.read_csv(path)
    measured, predicted, large = (table.query("kind == @kind") for kind in ("measured", "predicted", "extrapolated"))
    stages, models = list(table.stage.unique()), list(measured.model.unique())
    seconds = measured.pivot(index="stage", columns="model", values="seconds")[models].map("{:.3g} s".format)
    largest = measured.query("model == @models[-1]").set_index("stage")
    fit = pd.DataFrame(
        {
            "seconds grow with": largest.work_of,
            "ns each": largest.ns_per_work.map("{:.3g}".format),
            "predicted / measured seconds": (predicted.set_index("stage").seconds / largest.seconds).map(
                "{:.2f}".format
            ),
            "measured peak, MB": largest.peak_mb.map("{:.3g}".format),
            "by the formula, MB": (largest.bytes / 1e6).map("{:.3g}".format).drop(NOT_ADDED),
        }
    ).fillna("")
    cells = large.seconds.map(_time) + (large.bytes / 1e9).map(", {:,.3g} GB".format)
    wide = large.assign(cell=cells).pivot(index="stage", columns="model", values="cell")[large.model.unique()]
    tables = {"stage": seconds, f"stage, {models[-1]}": fit, "extrapolated": wide}
    ordered = [part.reindex([s for s in stages if s in part.index]).rename_axis(name) for name, part in tables.items()]
    return "\n\n".join(part.reset_index().to_markdown(index=False) for part in ordered)


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
