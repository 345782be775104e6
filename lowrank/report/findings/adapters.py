"""What notebook 05 finds: whether ranks read off a weight change make better adapters."""

from collections.abc import Iterator

from lowrank.report.findings.results import Claim, Reading, Results, Table, compare_arms, format_gain

# better arm, worse arm, id, text
DUELS = (
    ("threshold", "uniform", "threshold-uniform", "Ranks by threshold beat uniform ranks of equal size"),
    ("threshold", "random", "threshold-random", "Ranks by threshold beat random ranks of equal size"),
    ("budget", "uniform", "budget-uniform", "Ranks by budget beat uniform ranks of equal size"),
    ("budget", "random", "budget-random", "Ranks by budget beat random ranks of equal size"),
    ("threshold, warm", "uniform, warm", "warm-threshold", "Started warm, ranks by threshold beat uniform ones"),
    ("budget, warm", "uniform, warm", "warm-budget", "Started warm, ranks by budget beat uniform ones"),
    ("uniform", "random", "uniform-random", "Uniform ranks beat random ranks of equal size"),
    ("budget", "EVA", "budget-eva", "Ranks by budget beat those of EVA"),
    ("PiSSA", "uniform", "pissa-uniform", "PiSSA's start beats LoRA's at uniform ranks, each at its own learning rate"),
    ("uniform, warm", "uniform", "warm-cold", "A warm start, which has seen more data, helps uniform ranks"),
    ("threshold", "full", "threshold-full", "As published: an adapter by threshold beats full fine-tuning"),
)


def _scores(results: Results) -> Table:
    return results.scores(results.test("quality_by_variant"), "seed", "variant")


def claims(results: Results) -> Iterator[Claim]:
    """Yield the claims of notebook 05."""
    scores, unit = _scores(results), results.score.unit
    for better, worse, key, text in DUELS:
        yield from compare_arms(scores, better, worse, name=f"adapters/{key}", text=text, unit=unit)


def _read_spectra(results: Results) -> str:
    table = results.table("spectrum_by_layer")
    full, signal = table[["out", "in"]].min(axis=1), int((table.status == "signal").sum())
    return (
        f"90 % of the energy of a weight change takes {(table.rank_90 / full).median():.0%} of the full rank, 50 % takes "
        f"{(table.rank_50 / full).median():.0%} (medians over {len(table)} layers); {signal} layers have more than noise."
    )


def _read_sizes(results: Results) -> str:
    table = results.table("size_by_threshold")
    parts = ", ".join(f"{row.threshold:g}: {row.over_weights:.1%}" for row in table.itertuples())
    return f"Parameters of the adapter over those of the weights, by threshold: {parts}."


def _read_ranks(results: Results) -> str:
    table = results.table("rank_by_layer")
    table = table[table.rule.isin(["uniform", "threshold", "budget"])].groupby("rule", sort=False)["rank"]
    parts = ", ".join(f"{rule} {low} to {high}" for rule, low, high in table.agg(["min", "max"]).itertuples())
    return f"Ranks from the smallest to the largest layer: {parts}."


def _read_gains(results: Results) -> str:
    scores = _scores(results)
    gains = (
        scores.sub(scores["uniform"], axis=0).drop(columns=["uniform", "base"], errors="ignore").mean().sort_values()
    )
    parts = ", ".join(f"{name} {format_gain(gain)}" for name, gain in gains[::-1].items())
    return f"Gain over uniform ranks in {results.score.unit}, mean over seeds, best first: {parts}."


def _read_sizes_and_steps(results: Results) -> str:
    table = results.test("comparison").set_index("variant")
    one, full = table.loc["threshold"], table.loc["full"]
    return (
        f"An adapter by threshold trains {one.trainable / full.trainable:.1%} of the parameters, in "
        f"{one.step_ms / full.step_ms:.0%} of the time of a full step and {one.memory_mb / full.memory_mb:.0%} of its memory."
    )


READINGS: dict[str, Reading] = {
    "spectrum_by_layer": _read_spectra,
    "size_by_threshold": _read_sizes,
    "rank_by_layer": _read_ranks,
    "gain_by_variant": _read_gains,
    "comparison": _read_sizes_and_steps,
}
