"""What notebook 06 finds: whether spectral exponents say which layers to prune, to truncate, or to keep."""

from collections.abc import Iterator

from lowrank.report.findings.results import Claim, Reading, Results, Table, compare_arms, format_gain
from lowrank.report.inference import mean_effect

HIGH = 0.7  # sparsity from which the exponents are said to help
ESD = ("ESD, by block", "ESD, by layer")


def _pruned(results: Results) -> Table:
    """Return the test scores of unstructured pruning, by model, method, group and sparsity."""
    table = results.test("quality_by_sparsity")
    return results.scores(table[table.per != "2:4"], ["seed", "method", "per", "sparsity"], "rule")


def _twin(results: Results) -> Table:
    return results.scores(results.test("quality_by_keep"), ["seed", "keep"], "rule")


def _cases(results: Results) -> Table:
    """Return the test scores of the cases of the assignment, by case and objective."""
    table = results.test("quality_by_objective")
    scores = results.scores(table, "case", "objective")
    if "none kept" in scores:
        scores["none kept"] = scores["none kept"].dropna().iloc[0]
        scores = scores.drop(index=table.case[table.objective == "none kept"].iloc[0])
    return scores


def claims(results: Results) -> Iterator[Claim]:
    """Yield the claims of notebook 06. Models are what is counted: all budgets of one model make one number."""
    unit = results.score.unit
    by_case = _cases(results)
    for other in ("random", "uniform", "norm_2", "none kept"):
        text = f"Keeping the layers with the largest score whole beats {other} (cases of budgets)"
        yield from compare_arms(by_case, "significance", other, name=f"assignment/{other}", text=text, unit=unit)
    pruned = _pruned(results)
    high = pruned[pruned.index.get_level_values("sparsity") >= HIGH].groupby("seed").mean()
    for rule in ESD:
        text = f"As published: from sparsity {HIGH:g}, pruning ratios by {rule} beat uniform ones (models)"
        key = f"pruning/{rule.split()[-1]}"
        yield from compare_arms(high, rule, "uniform", name=key, text=text, unit=unit)
    text = f"From sparsity {HIGH:g}, reversed ratios are worse than uniform ones (models)"
    yield from compare_arms(high, "uniform", "reversed", name="pruning/reversed", text=text, unit=unit)
    methods = pruned["uniform"].unstack("method").groupby("seed").mean()
    text = "As published: Wanda beats magnitude at uniform ratios (models)"
    yield from compare_arms(methods, "wanda", "magnitude", name="pruning/wanda", text=text, unit=unit)
    twin = _twin(results).groupby("seed").mean()
    for rule in (*ESD, "whitened spectrum"):
        text = f"Ranks by {rule} beat one share for all (models)"
        yield from compare_arms(twin, rule, "uniform", name=f"ranks/{rule.split()[-1]}", text=text, unit=unit)
    gained = results.table("value_by_case")
    gained = gained[gained.strategy != "equal"]
    text = "In any order, devices take more of the score than in the given one (cases of unequal budgets)"
    yield Claim("assignment/order", text, mean_effect(100 * gained.gain.dropna()), "%")


def _read_scores(results: Results) -> str:
    table = results.table("score_by_layer")
    valid = table[table.status == "ok"].set_index("layer").alpha_peak
    return (
        f"{len(valid)} of {len(table)} layers have a valid exponent, from {valid.min():.2f} ({valid.idxmin()}) to "
        f"{valid.max():.2f} ({valid.idxmax()}); a small one is read as well trained."
    )


def _read_cases(results: Results) -> str:
    table = results.table("value_by_case")
    unequal = table[table.strategy != "equal"]
    more = int((unequal.gain > 1e-9).sum())
    return (
        f"The free order takes more than the fixed one in {more} of {len(unequal)} cases of unequal budgets, "
        f"{100 * unequal.gain.mean():.1f} % more on average."
    )


def _read_objectives(results: Results) -> str:
    scores = _cases(results).mean()
    gains = (scores["significance"] - scores.drop("significance")).sort_values()
    parts = ", ".join(f"{format_gain(gain)} against {name}" for name, gain in gains.items())
    return f"Kept by score, in {results.score.unit}, mean over cases: {parts}."


def _read_pruning(results: Results) -> str:
    pruned = _pruned(results)
    parts = []
    for sparsity, rows in pruned.groupby("sparsity"):
        gains = rows.sub(rows["uniform"], axis=0).drop(columns="uniform").mean()
        parts.append(f"{sparsity:g}: " + ", ".join(f"{rule} {format_gain(gain)}" for rule, gain in gains.items()))
    return f"Gain over uniform pruning in {results.score.unit}, by sparsity. {'. '.join(parts)}."


def _read_twin(results: Results) -> str:
    parts = []
    for keep, rows in _twin(results).groupby("keep"):
        gains = rows.sub(rows["uniform"], axis=0).drop(columns="uniform").mean()
        parts.append(f"keep {keep:g}: " + ", ".join(f"{rule} {format_gain(gain)}" for rule, gain in gains.items()))
    return f"Gain over one share for all in {results.score.unit}. {'. '.join(parts)}."


READINGS: dict[str, Reading] = {
    "score_by_layer": _read_scores,
    "value_by_case": _read_cases,
    "quality_by_objective": _read_objectives,
    "quality_by_sparsity": _read_pruning,
    "quality_by_keep": _read_twin,
}
