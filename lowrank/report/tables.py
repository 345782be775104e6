"""The tables of notebooks 01 to 05 and 07 in docs/results.md. Each function returns markdown, made from published results."""

from pathlib import Path

import numpy as np
import pandas as pd

from lowrank.io.checks import require
from lowrank.report.folders import published_folder
from lowrank.report.parameters import set_names
from lowrank.report.result_files import read_run, read_table

SHOWN_KEEPS = (0.8, 0.5, 0.4, 0.2)  # of the measured budgets, those that are shown
SHOWN_ERRORS = {"mono_depth": "abs_rel", "video_depth": "abs_rel", "pose": "ate", "points": "acc_mean"}


def result_folders(notebook: str) -> dict[str, Path]:
    """Find the results of one notebook: set -> folder. Variants of sets are left out.

    **Arguments**

    - `notebook`: its name without suffix, for example '01_whitening'.
    """
    folders = [path.parent for path in sorted(published_folder().glob(f"[a-z]*/{notebook}/run.json"))]
    return {folder.parent.name: folder for folder in folders if folder.parent.name in set_names()}


def read_test(folder: Path, name: str) -> pd.DataFrame:
    """Read the rows of a table that were measured on the test split.

    **Arguments**

    - `folder`: of results.
    - `name`: of the table, without suffix.

    **Raises**

    - `ValueError`: no row of the table was.
    """
    table = read_table(folder / f"{name}.csv")
    rows = table.query("split == 'test'").drop(columns="split").reset_index(drop=True)
    where = f"{folder.parent.name}/{folder.name}/{name}"
    require(len(rows) > 0, where, "have rows of the split 'test'", sorted(set(table["split"])))
    return rows


def headline_metric(folder: Path) -> str:
    """Return the name of the headline metric of one folder of results."""
    return read_run(folder)["inputs"]["metric"]


def baselines() -> str:
    """Tabulate the dense models: metric, sizes, and the largest deviation from the theorem."""
    rows = []
    for name, folder in result_folders("01_whitening").items():
        table, run = read_test(folder, "baseline"), read_run(folder)
        metric, row = headline_metric(folder), table.iloc[0]
        worst = read_table(folder / "theorem_by_layer.csv").groupby("dtype").difference.max()
        rows.append(
            {
                "set": name,
                "dense model": f"{metric} {row[metric]:.3g}",
                "weights": f"{row.model_weights:,.0f}",
                "in targeted layers": f"{row.targeted_share:.1%}",
                "theorem, float32": f"{worst['float32']:.0e}",
                "theorem, float64": f"{worst['float64']:.0e}" if "float64" in worst else "",
                "run": f"{run['wall_s']:.0f} s on {run['device']}",
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False)


def comparison() -> str:
    """Tabulate held-out loss and headline metric, by set, configuration and kept share."""
    rows = []
    for name, folder in result_folders("03_svd_comparison").items():
        table = read_test(folder, "quality_by_keep")
        metric = headline_metric(folder)
        dense = table[table.way == "dense"].iloc[0]
        rows.append({"set": name, "way": "dense", "keep 1": f"{dense.loss:.3f} / {dense[metric]:.3g}"})
        for configuration, quality in table[table.way != "dense"].groupby("way", sort=False):
            by_keep = quality.set_index("keep")
            cells = {
                f"keep {keep}": f"{by_keep.loss[keep]:.3f} / {by_keep[metric][keep]:.3g}"
                for keep in SHOWN_KEEPS
                if keep in by_keep.index
            }
            rows.append({"set": "", "way": configuration} | cells)
    return pd.DataFrame(rows).fillna("").to_markdown(index=False)


def preparation() -> str:
    """Tabulate the metric after whitened truncation at the target keep, and after refinement, by kind of training before."""
    rows = []
    for name, folder in result_folders("02_prehab").items():
        kept = read_run(folder)["parameters"]["target_keep"]
        quality, refined = (read_test(folder, f"quality_by_{what}") for what in ("keep", "refinement"))
        metric = headline_metric(folder)
        truncated = quality[(quality.method == "whitened") & ((quality.keep - kept).abs() < 1e-9)]
        for when, table in (("truncated", truncated), ("and refined", refined)):
            scores = table.groupby("variant", sort=False)[metric].agg(["mean", "std"])
            cells = {variant: f"{row['mean']:.3g} ± {row['std']:.2g}" for variant, row in scores.iterrows()}
            rows.append({"set": f"{name}, {metric} at keep {kept}" if when == "truncated" else "", "": when} | cells)
    return pd.DataFrame(rows).fillna("").to_markdown(index=False)


def fixed_bases() -> str:
    """Tabulate metric, the three sizes, and time and memory of a training step, by kind of training."""
    rows = []
    for name, folder in result_folders("04_stability").items():
        table = read_test(folder, "comparison")
        metric = headline_metric(folder)
        table = table.set_index("variant")
        for row in table.reset_index().to_dict("records"):
            spread = "" if np.isnan(row["std"]) else f" ± {row['std']:.2g}"
            step, memory = (row[key] / table[key]["dense"] for key in ("step_ms", "memory_mb"))
            rows.append(
                {
                    "set": name if row["variant"] == table.index[0] else "",
                    "training": row["variant"],
                    "metric": f"{metric} {row[metric]:.3f}{spread}",
                    "trainable": f"{row['trainable']:,.0f} ({row['trainable_share']:.1%})",
                    "stored": f"{row['stored']:,.0f} ({row['stored_share']:.1%})",
                    "dense": f"{row['dense']:,.0f}",
                    "step, of dense": "" if np.isnan(step) else f"{step:.2f}",
                    "memory, of dense": "" if np.isnan(memory) else f"{memory:.2f}",
                }
            )
    return pd.DataFrame(rows).to_markdown(index=False)


def adapters() -> str:
    """Tabulate metric, gain over uniform ranks, and the cost of a step relative to full fine-tuning, by kind of adapter."""
    rows = []
    for name, folder in result_folders("05_rank_config").items():
        table = read_test(folder, "comparison").set_index("variant")
        gains = read_test(folder, "gain_by_variant").groupby("variant").gain.agg(["mean", "std"])
        quality = read_test(folder, "quality_by_variant")
        table["step_ms"] = quality.groupby("variant").step_ms.min()  # the machine may have been busy with other things
        metric = headline_metric(folder)
        for variant, row in table.drop(index="base").iterrows():
            gain = f"{gains['mean'][variant]:+.3g} ± {gains['std'][variant]:.2g}" if variant in gains.index else ""
            step, memory = (row[key] / table[key]["full"] for key in ("step_ms", "memory_mb"))
            rows.append(
                {
                    "set": name if variant == table.index[1] else "",
                    "variant": variant,
                    "metric": f"{metric} {row['mean']:.3g} ± {row['std']:.2g}",
                    "gain over uniform": gain,
                    "trainable": f"{row['trainable']:,.0f}",
                    "step, of full": f"{step:.2f}",
                    "memory, of full": f"{memory:.2f}",
                }
            )
    return pd.DataFrame(rows).to_markdown(index=False)


def geometry() -> str:
    """Tabulate the four tasks of π³ before and after, and the first forward pass, by set; then the measured speed-ups."""
    rows, first = [], []
    for name, folder in result_folders("07_pi3_efficiency").items():
        tables = {task: read_test(folder, task) for task in SHOWN_ERRORS}
        for place, model in enumerate(tables["mono_depth"].model.unique()):
            row = {"set": "" if place else name, "model": model}
            for task, column in SHOWN_ERRORS.items():
                for data, errors in tables[task].query("model == @model").groupby("data", sort=False):
                    row[f"{task}, {column}, {data}"] = f"{errors[column].mean():.3f} ± {errors[column].std():.3f}"
            rows.append(row)
        first.append(read_table(folder / "first_forward.csv").drop(columns="split", errors="ignore").assign(set=name))
    quality = pd.DataFrame(rows).fillna("").to_markdown(index=False)
    passes = pd.concat(first).to_markdown(index=False, floatfmt=".1f")
    return "\n\n".join([quality, passes, _speed_ups().to_markdown(index=False)])


def _speed_ups() -> pd.DataFrame:
    """Return the speed-ups at the published size, for every device on which they were measured."""
    speed = read_table(published_folder() / "bench" / "pi3.csv")
    speed["size"] = speed.width.astype(str) + " x " + speed.height.astype(str) + ", " + speed.precision
    measured = ["forward_ms", "frames_per_s", "speed_up", "ceiling", "share_of_ceiling"]
    table = pd.DataFrame(speed[["device", "views", "size", "model", *measured]]).astype(object)
    if speed.device.str.startswith("CPU").all():
        table.loc[len(table)] = ["a GPU", "1, 2, 11, 30", "700 x 364, bf16", *["not measured"] * 6]
    return table
