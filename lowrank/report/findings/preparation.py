"""What notebook 02 finds: whether a penalty in training prepares a model for truncation."""

from collections.abc import Iterator

import numpy as np

from lowrank.report.findings.results import Claim, Reading, Results, Table, compare_arms, format_gain

CONTROLS = ("no training", "lambda = 0", "all steps after")


def _truncated(results: Results) -> Table:
    """Return the rows of the models truncated by whitening at the target keep."""
    table = results.table("quality_by_keep")
    return table[(table.method == "whitened") & np.isclose(table.keep, results.parameters["target_keep"])]


def _scores(results: Results, table: Table) -> Table:
    """Return (split, seed) x variant, more is better; what has one seed stands for all."""
    scores = results.scores(table, ["split", "seed"], "variant")
    filled = scores.groupby("split").transform(
        lambda column: column.fillna(column.mean() if column.count() == 1 else np.nan)
    )
    return filled[table.variant.unique()]


def _pick(scores: Table) -> str:
    """Return the penalty with the best mean on validation."""
    penalties = [name for name in scores if name not in CONTROLS]
    return str(scores.loc["validation", penalties].mean().round(9).idxmax())


def claims(results: Results) -> Iterator[Claim]:
    """Yield the claims of notebook 02."""
    unit = results.score.unit
    truncated, refined = _scores(results, _truncated(results)), _scores(results, results.table("quality_by_refinement"))
    for when, scores in (("truncated", truncated), ("truncated and refined", refined)):
        for name in (name for name in scores if name not in CONTROLS):
            text = f"Penalty {name}: {when}, it beats the same training without a penalty"
            key = f"prehab/{name}/{when.split()[-1]}"
            yield from compare_arms(scores.loc["test"], name, "lambda = 0", name=key, text=text, unit=unit)
    text = "The penalty picked on validation, truncated, beats truncation without any training before"
    scores = truncated.loc["test"]
    yield from compare_arms(
        scores, _pick(truncated), "no training", name="prehab/picked/untrained", text=text, unit=unit
    )
    text = "The penalty picked on validation, refined, beats spending all steps after truncation"
    scores = refined.loc["test"]
    yield from compare_arms(
        scores, _pick(refined), "all steps after", name="prehab/picked/all-after", text=text, unit=unit
    )
    if results.has("quality_by_statistics"):
        stale = results.table("quality_by_statistics")
        stale = stale[(stale["split"] == "test") & (stale.variant != "no training")]
        text = "After training, fresh statistics beat those of before (mean over the trainings)"
        scores = results.scores(stale, "seed", "statistics")
        yield from compare_arms(scores, "fresh", "stale", name="prehab/fresh-statistics", text=text, unit=unit)


def _read(results: Results, scores: Table, when: str) -> str:
    test, picked, unit = scores.loc["test"].mean(), _pick(scores), results.score.unit
    against = {name: test[picked] - test[name] for name in CONTROLS if name in test}
    parts = ", ".join(f"{format_gain(gain)} {unit} against {name!r}" for name, gain in against.items())
    return f"{when}, the penalty picked on validation is {picked}. On test, mean over seeds: {parts}."


def _read_truncated(results: Results) -> str:
    return _read(results, _scores(results, _truncated(results)), "Truncated")


def _read_refined(results: Results) -> str:
    return _read(results, _scores(results, results.table("quality_by_refinement")), "Refined after truncation")


def _read_ranks(results: Results) -> str:
    table = results.table("ranks_by_layer").groupby("variant").tail_energy.mean()
    parts = ", ".join(f"{name} {table[name]:.2%}" for name in table.index)
    return f"Energy of WS beyond the target rank, mean over layers and seeds: {parts}."


def _read_statistics(results: Results) -> str:
    table = results.table("quality_by_statistics")
    table = table[table.variant != "no training"].groupby("statistics").loss.mean()
    return f"With stale statistics the test loss is {table['stale'] - table['fresh']:+.3g} nats, mean over trainings and seeds."


READINGS: dict[str, Reading] = {
    "quality_by_keep": _read_truncated,
    "ranks_by_layer": _read_ranks,
    "quality_by_statistics": _read_statistics,
    "quality_by_refinement": _read_refined,
}
