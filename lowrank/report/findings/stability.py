"""What notebook 04 finds: whether bases settle in training, and what fixing them costs."""

from collections.abc import Iterator

from lowrank.report.findings.results import Claim, Reading, Results, Table, compare_arms
from lowrank.report.inference import mean_effect


def _means(results: Results) -> Table:
    """Return the means over layers, by variant, seed and epoch."""
    table = results.table("stability_by_layer")
    columns = ["stability", "r_similarity", "p_similarity"]
    return table[table.epoch > 0].groupby(["variant", "seed", "epoch"], sort=False)[columns].mean()


def _final(results: Results) -> Table:
    """Return the test scores of the last models, by seed and variant."""
    return results.scores(results.test("quality_by_epoch"), "seed", "variant")


def claims(results: Results) -> Iterator[Claim]:
    """Yield the claims of notebook 04."""
    means = _means(results)
    stability = means.stability.unstack("epoch")
    decaying, constant = stability.xs("dense"), stability.xs("constant rate")
    last = decaying.iloc[:, -1]
    text = "As published: stability rises by more than .01 from its lowest checkpoint to the last"
    yield Claim("stability/rises", text, mean_effect(last - decaying.min(axis=1), 0.01), "stability", 0.01)
    text = "As published: stability at the last checkpoint is at least .99"
    yield Claim("stability/settled", text, mean_effect(last, 0.99), "stability", 0.99)
    half = constant.loc[:, constant.columns >= constant.columns.max() / 2]
    text = "At a constant learning rate stability rises over the second half"
    yield Claim("stability/constant-rises", text, mean_effect(half.iloc[:, -1] - half.iloc[:, 0]), "stability")
    text = "At a constant learning rate the last stability is less than .05 below that with decay"
    effect = mean_effect((constant.iloc[:, -1] - last).dropna(), -0.05)
    yield Claim("stability/constant-close", text, effect, "stability", -0.05)
    ends = means.xs("dense").xs(last.name, level="epoch")
    text = "At the last checkpoint, what mixes the bases (P) has moved further than the bases have"
    yield Claim("stability/mixing-moves", text, mean_effect(ends.stability - ends.p_similarity), "stability")
    floors = results.table("similarity_by_epoch").iloc[0]
    for kind in ("r", "p"):
        lowest = means.xs("dense").groupby("seed")[f"{kind}_similarity"].min()
        text = f"{kind.upper()} similarity stays above that of independent weights at every checkpoint"
        yield Claim(f"stability/{kind}-floor", text, mean_effect(lowest - floors[f"{kind}_floor"]), "similarity")
    final, unit = _final(results), results.score.unit
    text = "OIALR ends at most 1 point below the dense training"
    yield from compare_arms(final, "OIALR", "dense", name="oialr/near-dense", text=text, unit=unit, margin=-1.0)
    text = "OIALR beats static low rank with as many stored parameters"
    yield from compare_arms(final, "OIALR", "static low rank", name="oialr/static", text=text, unit=unit)


def _read_layers(results: Results) -> str:
    table = results.table("stability_by_layer")
    table = table[(table.epoch == table.epoch.max()) & (table.variant == "dense")]
    by_layer = table.groupby("layer").stability.mean().dropna()
    return (
        f"At the last checkpoint, stability with a decaying rate goes from {by_layer.min():.4f} in {by_layer.idxmin()} to "
        f"{by_layer.max():.4f} in {by_layer.idxmax()}."
    )


def _read_epochs(results: Results) -> str:
    stability = _means(results).stability.groupby(["variant", "epoch"]).mean().unstack("variant")
    decaying, constant = stability["dense"], stability["constant rate"]
    return (
        f"Mean stability falls to {decaying.min():.3f} at epoch {decaying.idxmin():g} and ends at {decaying.iloc[-1]:.3f} with a "
        f"decaying rate, at {constant.iloc[-1]:.3f} with a constant one."
    )


def _read_similarity(results: Results) -> str:
    table = results.table("similarity_by_epoch")
    last = table[table.variant == "dense"].iloc[-1]
    return (
        f"At the last checkpoint R similarity is {last.r_similarity:.3f} and P similarity {last.p_similarity:.3f}; independent "
        f"weights have {last.r_floor:.3f} and {last.p_floor:.3f}."
    )


def _read_ranks(results: Results) -> str:
    table = results.table("rank_by_epoch")
    last = table[table.epoch == table.groupby("seed").epoch.transform("max")].groupby("layer").rank_share.mean()
    return f"At the end a layer keeps {last.mean():.0%} of its rank, from {last.min():.0%} ({last.idxmin()}) to {last.max():.0%}."


def _read_quality(results: Results) -> str:
    table = results.test("comparison").set_index("variant")
    parts = ", ".join(
        f"{name} {row[results.metric]:.3f} with {row.stored_share:.0%} stored and {row.trainable_share:.0%} trained"
        for name, row in table.iterrows()
    )
    return f"Test {results.metric}, mean over seeds: {parts}."


READINGS: dict[str, Reading] = {
    "stability_by_layer": _read_layers,
    "stability_by_epoch": _read_epochs,
    "similarity_by_epoch": _read_similarity,
    "rank_by_epoch": _read_ranks,
    "comparison": _read_quality,
}
