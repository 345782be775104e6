"""What notebook 07 finds: how far π³ can be compressed, and what it gains in speed."""

from collections.abc import Iterator

import numpy as np

from lowrank.report.findings.results import Claim, Reading, Results, Table, compare_arms

TASKS = {"mono_depth": "abs_rel", "video_depth": "abs_rel", "pose": "ate", "points": "acc_mean"}  # less is better


def _errors(results: Results, name: str, columns: str, values: str = "abs_rel") -> Table:
    """Return 100 times the negative error relative to the dense model, or the error itself, by seed."""
    return -results.table(name).pivot_table(index="seed", columns=columns, values=values)


def claims(results: Results) -> Iterator[Claim]:
    """Yield the claims of notebook 07."""
    least = -np.log2(results.table("least_keep").set_index("seed").drop(columns="split", errors="ignore"))
    text = "Whitening keeps AbsRel within the tolerance at a smaller share than plain SVD"
    yield from compare_arms(least, "whitened", "svd", name="pi3/whitened-svd", text=text, unit="halvings")
    text = "Pivoted storage keeps AbsRel at a smaller share than factors do"
    yield from compare_arms(least, "pivoted", "whitened", name="pi3/pivots", text=text, unit="halvings")
    views = _errors(results, "abs_rel_by_calibration", "calibration")
    text = "Calibrating on several views at a time beats one view at a time"
    yield from compare_arms(views, "several views", "one view", name="pi3/several-views", text=text, unit="AbsRel")
    refined = _errors(results, "abs_rel_by_refinement", "model")
    text = "Refinement lowers the AbsRel of the compressed model"
    yield from compare_arms(refined, "refined", "compressed", name="pi3/refined", text=text, unit="AbsRel")
    adapted = _errors(results, "abs_rel_by_adaptation", "ranks")
    for other in ("one for all", "at random"):
        text = f"As published: ranks by the entropy of the images beat ranks {other} at the same mean share"
        yield from compare_arms(
            adapted, "by entropy", other, name=f"pi3/entropy-{other.split()[-1]}", text=text, unit="AbsRel"
        )
    for task, column in TASKS.items():
        errors = _errors(results, task, "model", column)
        text = f"Refined is better than compressed in {task.replace('_', ' ')} ({column})"
        yield from compare_arms(errors, "refined", "SVD-π³", name=f"pi3/refined-{task}", text=text, unit=column)


def _read_dense(results: Results) -> str:
    table = results.table("depth_without_compression").pivot(index="seed", columns="predictor", values="abs_rel")
    worst = (table["π³"] / table["constant depth"]).max()
    means = table.mean()
    return (
        f"AbsRel of the dense model {means['π³']:.3f}, of a constant depth {means['constant depth']:.3f} (mean over seeds); on "
        f"no seed is it more than {worst:.0%} of that."
    )


def _read_keeps(results: Results) -> str:
    least = results.table("least_keep").drop(columns=["seed", "split"], errors="ignore").mean()
    parts = ", ".join(f"{way} {share:.0%}" for way, share in least.sort_values().items())
    return (
        f"AbsRel stays within the tolerance down to these shares of the targeted parameters (mean over seeds): {parts}."
    )


def _read_targets(results: Results) -> str:
    table = results.table("abs_rel_by_targets")
    means = table.groupby(["way", "targets", "keep"])[["keep_model", "of_dense"]].mean().reset_index()
    within = means[means.of_dense <= 1 + results.parameters["tolerated"]]
    parts = []
    for (way, targets), rows in within.groupby(["way", "targets"], sort=False):
        row = rows.loc[rows.keep_model.idxmin()]
        parts.append(f"{way}, {targets}: {row.keep_model:.0%} of the model at {row.of_dense:.2f} x AbsRel")
    return f"The smallest model within the tolerance: {'; '.join(parts)}."


def _read_calibration(results: Results) -> str:
    table = results.table("abs_rel_by_calibration").groupby("calibration").abs_rel.mean()
    return f"AbsRel, mean over seeds and shares: {', '.join(f'{name} {value:.3f}' for name, value in table.items())}."


def _read_refinement(results: Results) -> str:
    table = results.table("abs_rel_by_refinement").groupby("model").abs_rel.mean()
    closed = 1 - (table["refined"] - table["original"]) / (table["compressed"] - table["original"])
    return (
        f"AbsRel {table['original']:.3f} dense, {table['compressed']:.3f} compressed, {table['refined']:.3f} refined: "
        f"refinement closes {closed:.0%} of the gap."
    )


def _read_adaptation(results: Results) -> str:
    table = results.table("abs_rel_by_adaptation").groupby("ranks").abs_rel.mean()
    return f"AbsRel at the same mean share, mean over seeds: {', '.join(f'{name} {value:.3f}' for name, value in table.items())}."


def _read_speed(results: Results) -> str:
    table = results.table("speed_up_by_views")
    smaller = table[table.model != "original"]
    row = smaller.loc[smaller.speed_up.idxmax()]
    reached = float(np.median((smaller.speed_up - 1) / (smaller.ceiling - 1).where(smaller.ceiling > 1)))
    return (
        f"The largest speed-up is {row.speed_up:.2f} x ({row.model}, {row.views:g} views), where operations allow "
        f"{row.ceiling:.2f} x; the median reaches {reached:.0%} of what they allow beyond 1."
    )


def _read_tasks(results: Results) -> str:
    parts = []
    for task, column in TASKS.items():
        means = results.table(task).groupby("model")[column].mean()
        parts.append(
            f"{task.replace('_', ' ')} {means['original']:.3f} / {means['SVD-π³']:.3f} / {means['refined']:.3f}"
        )
    return f"Error of the dense / compressed / refined model, mean over seeds: {', '.join(parts)}."


READINGS: dict[str, Reading] = {
    "depth_without_compression": _read_dense,
    "least_keep": _read_keeps,
    "abs_rel_by_targets": _read_targets,
    "abs_rel_by_calibration": _read_calibration,
    "abs_rel_by_refinement": _read_refinement,
    "abs_rel_by_adaptation": _read_adaptation,
    "speed_up_by_views": _read_speed,
    "mono_depth": _read_tasks,
}
