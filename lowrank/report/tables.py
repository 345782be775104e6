"""report.tables"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import MaxNLocator

from lowrank.io.dependencies import ROOT
from lowrank.report.notebook import THEME, save_figure
from lowrank.report.parameters import set_names

OUTPUTS = ROOT / "outputs"


def _results(notebook: str) -> dict[str, Path]:
    """Set -> folder of results of one notebook, for every set that has been executed; variants are no sets."""
    found = {path.parent.parent.name: path.parent for path in sorted(OUTPUTS.glob(f"[a-z]*/{notebook}/run.json"))}
    return {name: folder for name, folder in found.items() if name in set_names()}


def baselines() -> str:
    """The dense models: metrics, sizes, and the largest deviation from the theorem."""
    rows = []
    for name, folder in _results("01_whitening").items():
        row = pd.read_csv(folder / "baseline.csv").iloc[0]
        about = json.loads((folder / "run.json").read_text(encoding="utf8"))
        metric = next(key for key in ("accuracy", "perplexity") if key in row)
        worst = pd.read_csv(folder / "theorem_by_layer.csv").groupby("dtype").difference.max()
        rows.append(
            {
                "set": name,
                "dense model": f"{metric} {row[metric]:.3g}",
                "weights": f"{row.model_weights:,.0f}",
                "in targeted layers": f"{row.targeted_share:.1%}",
                "theorem, float32": f"{worst['float32']:.0e}",
                "theorem, float64": f"{worst['float64']:.0e}" if "float64" in worst else "",
                "run": f"{about['wall_s']:.0f} s on {about['device']}",
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False)


SHOWN_KEEPS = (0.8, 0.5, 0.4, 0.2)  # of the budgets that were measured, those in the README


def comparison() -> str:
    """Held-out loss of each way of compressing, by set and share kept; the dense model and the headline metric besides."""
    rows = []
    for name, folder in _results("03_svd_comparison").items():
        table = pd.read_csv(folder / "quality_by_keep.csv")
        metric = next(key for key in ("accuracy", "perplexity") if key in table)
        dense = table[table.way == "dense"].iloc[0]
        rows.append({"set": name, "way": "dense", "keep 1": f"{dense.loss:.3f} / {dense[metric]:.3g}"})
        for way, found in table[table.way != "dense"].groupby("way", sort=False):
            by_keep = found.set_index("keep")
            cells = {
                f"keep {keep}": f"{by_keep.loss[keep]:.3f} / {by_keep[metric][keep]:.3g}"
                for keep in SHOWN_KEEPS
                if keep in by_keep.index
            }
            rows.append({"set": "", "way": way} | cells)
    return pd.DataFrame(rows).fillna("").to_markdown(index=False)


def preparation() -> str:
    """Metric after whitened truncation at the target keep, and after refinement of that, by kind of training before."""
    rows = []
    for name, folder in _results("02_prehab").items():
        kept = json.loads((folder / "run.json").read_text(encoding="utf8"))["parameters"]["target_keep"]
        quality, refined = (pd.read_csv(folder / f"quality_by_{what}.csv") for what in ("keep", "refinement"))
        metric = next(key for key in ("accuracy", "perplexity", "matthews", "f1", "pearson") if key in quality)
        truncated = quality[(quality.method == "whitened") & ((quality.keep - kept).abs() < 1e-9)]
        for when, table in (("truncated", truncated), ("and refined", refined)):
            found = table.groupby("variant", sort=False)[metric].agg(["mean", "std"])
            cells = {variant: f"{row['mean']:.3g} ± {row['std']:.2g}" for variant, row in found.iterrows()}
            rows.append({"set": f"{name}, {metric} at keep {kept}" if when == "truncated" else "", "": when} | cells)
    return pd.DataFrame(rows).fillna("").to_markdown(index=False)


def fixed_bases() -> str:
    """Metric, the three sizes, and the time and memory of a training step, by kind of training."""
    rows = []
    for name, folder in _results("04_stability").items():
        table = pd.read_csv(folder / "comparison.csv").set_index("variant")
        metric = table.columns[0]
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
    """Metric, gain over uniform ranks seed by seed, and the cost of a step over that of full fine-tuning, by kind of adapter."""
    rows = []
    for name, folder in _results("05_rank_config").items():
        table = pd.read_csv(folder / "comparison.csv").set_index("variant")
        gains = pd.read_csv(folder / "gain_by_variant.csv").groupby("variant").gain.agg(["mean", "std"])
        quality = pd.read_csv(folder / "quality_by_variant.csv")
        table["step_ms"] = quality.groupby("variant").step_ms.min()  # the machine may have been busy with other things
        metric = next(key for key in ("accuracy", "perplexity") if key in quality)
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


def _objectives() -> pd.DataFrame:
    """The judged cases of every set, one under the other."""
    tables = [
        pd.read_csv(d / "quality_by_objective.csv").assign(set=n) for n, d in _results("06_layer_selection").items()
    ]
    return pd.concat(tables).query("objective != 'none kept'")


def layer_selection() -> str:
    """By set: the significance that each objective takes and what keeping its layers does to the loss; then pruning by rule."""
    rows: dict[str, dict[str, str]] = {}
    for name, of_set in _objectives().groupby("set", sort=False):
        for objective, own in of_set.groupby("objective", sort=False):
            added = f"{own.added_loss.mean():+.3f} ± {own.added_loss.std():.3f}"
            rows.setdefault(str(objective), {})[str(name)] = f"{own.significance_share.mean():.2f} / {added}"
    parts = [pd.DataFrame(rows).T.rename_axis("maximised: taken / added loss").reset_index().to_markdown(index=False)]
    cells: dict[str, dict[str, str]] = {}
    for name, folder in _results("06_layer_selection").items():
        table = pd.read_csv(folder / "quality_by_sparsity.csv")
        metric = next(key for key in ("accuracy", "perplexity") if key in table)
        table = table.query("method == 'wanda' and per == 'row'")
        for share in sorted(set(table.sparsity))[-2:]:
            for rule, rows_of_rule in table.query("sparsity == @share").groupby("rule", sort=False):
                own = rows_of_rule[metric]
                spread = f" ± {own.std():.2g}" if len(own) > 1 else ""
                cells.setdefault(str(rule), {})[f"{name}, {metric} at {share}"] = f"{own.mean():.3g}{spread}"
    parts.append(pd.DataFrame(cells).T.rename_axis("ratios").reset_index().to_markdown(index=False))
    return "\n\n".join(parts)


def draw_objectives(path: Path) -> None:
    """The figure of `layer_selection`: all sets, all objectives."""
    sns.set_theme(**THEME)
    found, drawn_as = _objectives(), dict[str, Any](errorbar="sd", linestyle="none", dodge=0.5, markersize=5)
    drawn, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for axis, column in zip(axes, ("significance_share", "added_loss"), strict=True):
        sns.pointplot(found, x=column, y="objective", hue="set", ax=axis, **drawn_as)
        axis.grid(axis="x")
        axis.set_ylabel("what the assignment maximises")
    axes[0].set_xlabel("significance taken / the most that can be")
    axes[0].get_legend().remove()
    axes[1].set_xlabel("loss over that of pruning all layers alike")
    axes[1].axvline(0, ls="--", color="0.3")
    axes[1].xaxis.set_major_locator(MaxNLocator(4))
    sns.move_legend(axes[1], "upper left", bbox_to_anchor=(1.02, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(drawn, path)


def geometry() -> str:
    """Four tasks of π³ before and after, in each set; the published table of one forward pass; the speed-up at the published
    size on every device that it was measured on."""
    shown = {"mono_depth": "abs_rel", "video_depth": "abs_rel", "pose": "ate", "points": "acc_mean"}
    rows, first = [], []
    for name, folder in _results("07_pi3_efficiency").items():
        tables = {task: pd.read_csv(folder / f"{task}.csv") for task in shown}
        for place, model in enumerate(tables["mono_depth"].model.unique()):
            row = {"set": "" if place else name, "model": model}
            for task, column in shown.items():
                for data, own in tables[task].query("model == @model").groupby("data", sort=False):
                    row[f"{task}, {column}, {data}"] = f"{own[column].mean():.3f} ± {own[column].std():.3f}"
            rows.append(row)
        first.append(pd.read_csv(folder / "first_forward.csv").assign(set=name))
    parts = [pd.DataFrame(rows).fillna("").to_markdown(index=False)]
    parts.append(pd.concat(first).to_markdown(index=False, floatfmt=".1f"))
    speed = pd.read_csv(OUTPUTS / "bench" / "pi3.csv")
    speed["size"] = speed.width.astype(str) + " x " + speed.height.astype(str) + ", " + speed.precision
    columns = [
        "device",
        "views",
        "size",
        "model",
        "forward_ms",
        "frames_per_s",
        "speed_up",
        "ceiling",
        "share_of_ceiling",
    ]
    table = speed[columns].astype(object)
    if speed.device.str.startswith("CPU").all():
        table.loc[len(table)] = ["a GPU", "1, 2, 11, 30", "700 x 364, bf16", *["not measured"] * 6]
    parts.append(table.to_markdown(index=False))
    return "\n\n".join(parts)


def benchmarks() -> str:
    """The measured ratios of `make bench`: those of layers side by side, the others one to a row."""
    found = [pd.read_csv(path) for path in sorted((OUTPUTS / "bench").glob("*.csv"))]
    table = pd.concat(part for part in found if "value" in part)
    parts = [table.assign(value=[f"{value:.3g}" for value in table.value]).to_markdown(index=False)]
    for layers in (part for part in found if "speedup" in part):
        layers["cell"] = layers.speedup.map("{:.2f}".format) + layers.share.map(" ({:.0%})".format)
        layers["way"] = layers.storage + layers.multiple.map(", multiples of {}".format)
        case = ["layer", "keep", "tokens", "dtype", "device"]
        wide = layers.pivot(index=case, columns="way", values="cell")[layers.way.unique()]
        parts.append(wide.reset_index().to_markdown(index=False))
    return "\n\n".join(parts)
