"""What notebook 03 finds: which norm, ranks and storage a truncated model should have, and what training adds."""

from collections.abc import Iterator

import numpy as np

from lowrank.report.findings.results import Claim, Reading, Results, Table, compare_arms
from lowrank.report.inference import Effect, bootstrap_effect, mean_effect

# better arm, worse arm, id, text; all at the headline keep, on test samples and draws of calibration samples
DUELS = (
    ("whitened", "svd", "whitened-svd", "Whitening adds less loss than plain SVD"),
    ("whitened", "asvd", "whitened-asvd", "Whitening adds less loss than ASVD's scaling"),
    ("whitened", "fwsvd", "whitened-fwsvd", "Whitening adds less loss than FWSVD's weighting"),
    (
        "two_sided",
        "whitened",
        "two-sided-whitened",
        "Weighting outputs by their gradients adds less loss than whitening",
    ),
    ("whitened, pivots", "whitened", "pivots-factors", "Whitening stored with pivots adds less loss than with factors"),
    ("best", "whitened, pivots", "best-pivots", "The best combination adds less loss than whitening with pivots"),
    ("ranks by spectrum", "pivot storage", "spectrum-uniform", "Ranks by the two-sided spectrum beat uniform ranks"),
    ("ranks by spectrum", "first block dense", "spectrum-first", "Ranks by the spectrum beat a dense first block"),
    (
        "ranks by spectrum",
        "linear over depth",
        "spectrum-linear",
        "Ranks by the spectrum beat shares on a line over depth",
    ),
    ("best", "ranks by spectrum", "measured-spectrum", "Ranks by measured loss beat ranks by spectrum"),
    ("retargeted", "best", "retargeted-best", "Retargeting the best combination lowers its added loss"),
    (
        "dense, 4 bits",
        "retargeted",
        "bits-retargeted",
        "Dense weights of 4 bits add less loss than the best combination, retargeted",
    ),
    ("packed layers split", "whitened", "split-packed", "Splitting packed projections lowers the added loss"),
)


def _samples(results: Results) -> Table:
    """Return the test losses by draw and sample (rows) and arm (columns)."""
    table = results.table("loss_by_sample").set_index(["draw", "sample"]).drop(columns="split")
    last = "ranks by measured loss"
    return table.rename(columns={last: "best"})


def _effect(differences: Table, margin: float = 0.0) -> Effect:
    """Return the effect over samples and draws of calibration samples."""
    return bootstrap_effect(differences.dropna().unstack("draw").dropna(axis=1).T.to_numpy(), margin)


def claims(results: Results) -> Iterator[Claim]:
    """Yield the claims of notebook 03."""
    arms = _samples(results)
    for better, worse, key, text in DUELS:
        if {better, worse} <= set(arms):
            yield Claim(
                f"compression/{key}", f"{text}, at the headline keep", _effect(arms[worse] - arms[better]), "nats"
            )
    if "best" in arms:
        last = arms["retargeted" if "retargeted" in arms else "best"]
        spared = results.parameters["headline_share"] * (arms.whitened - arms.dense) - (last - arms.dense)
        text = "The best training-free arm adds at most the share of whitening's loss that the set names, at the headline keep"
        yield Claim("compression/best-share", text, _effect(spared), "nats")
    alone = results.table("loss_by_layer_alone") if results.has("loss_by_layer_alone") else None
    if alone is not None:
        text = (
            "The two-sided spectrum orders layers as the divergence that each causes alone (rank correlation above .8)"
        )
        yield Claim("compression/order", text, _rank_correlation(alone, 0.8), "rank correlation", 0.8)
    yield from _refinement(results)


def _rank_correlation(alone: Table, margin: float) -> Effect:
    """Return Spearman's correlation over layers with Fisher's interval (Bonett and Wright, Psychometrika 65, 2000)."""
    from scipy import stats  # noqa: PLC0415

    r, n = float(alone[["predicted", "measured"]].corr("spearman").iloc[0, 1]), len(alone)
    if n < 5:
        return Effect(r, np.nan, np.nan, n, 1.0)
    error = ((1 + r * r / 2) / (n - 3)) ** 0.5
    z = np.arctanh(min(r, 1 - 1e-12))
    low, high = np.tanh([z - stats.norm.ppf(0.975) * error, z + stats.norm.ppf(0.975) * error])
    p = float(2 * stats.norm.sf(abs(z - np.arctanh(margin)) / error))
    return Effect(r, float(low), float(high), n, p)


def _refinement(results: Results) -> Iterator[Claim]:
    table = results.table("quality_by_refinement")
    ways = [name for name in table.refinement.unique() if name not in ("none", "dense, all weights")]
    if len(table) < 4 or not ways:
        return
    chosen = table[table["split"] == "validation"].groupby("refinement").loss.mean()
    best, order = chosen[ways].idxmin(), chosen[[name for name in ways if "then" in name]].idxmin()
    tested = table[table["split"] == "test"]
    loss = tested[tested.refinement != "none"].pivot(index="draw", columns="refinement", values="loss")
    start = tested[tested.refinement == "none"].iloc[0]
    half = start.loss - 0.5 * start.added_loss - loss[best]
    text = "The refinement picked on validation takes back at least half of the loss that truncation added"
    yield Claim("compression/refined-half", text, mean_effect(half), "nats")
    text = "One factor after the other by LoRA ends better than both together"
    yield from compare_arms(-loss, order, "both", name="compression/lora-order", text=text, unit="nats")
    if results.score.unit == "points":
        scores = results.scores(tested, "draw", "refinement")
        dense = results.score.factor * float(
            results.test("quality_by_keep").query("way == 'dense'")[results.metric].iloc[0]
        )
        text = "Refined from the refinement keep, the metric is within 1 point of the dense model's"
        yield Claim("compression/within-a-point", text, mean_effect(scores[best] - dense, -1.0), "points", -1.0)


def _row(table: Table, way: str, keep: float) -> Table:
    return table[(table.way == way) & np.isclose(table.keep, keep)].iloc[0]


def _read_quality(results: Results) -> str:
    table, keep = results.test("quality_by_keep"), results.parameters["headline_keep"]
    dense = table[table.way == "dense"].iloc[0]
    names = [
        way for way in ("svd", "whitened", "whitened, pivots", "ranks by measured loss") if (table.way == way).any()
    ]
    rows = {way: _row(table, way, keep) for way in names}
    parts = ", ".join(f"{way} {row.loss:.3f} / {row[results.metric]:.3g}" for way, row in rows.items())
    share = rows["whitened"].keep_model
    return (
        f"At keep {keep:g} of the targeted layers, which is {share:.0%} of the model, test loss / {results.metric}: dense "
        f"{dense.loss:.3f} / {dense[results.metric]:.3g}, {parts}."
    )


def _read_parts(results: Results) -> str:
    table, keep = results.test("added_loss_by_part"), results.parameters["headline_keep"]
    table = table[np.isclose(table.keep, keep)].set_index("part").added_loss
    steps = ", ".join(f"{part} {value:.3g}" for part, value in table.items())
    gain = table.diff().idxmin()
    return f"Added loss at keep {keep:g}, part by part: {steps}. The largest step down is {gain!r}."


def _read_draws(results: Results) -> str:
    arms = _samples(results)
    added = arms.drop(columns="dense").sub(arms.dense, axis=0).groupby("draw").mean()
    names = [name for name in ("whitened", "whitened, pivots", "best", "retargeted") if name in added]
    if len(added) == 1:
        parts = ", ".join(f"{name} {added[name].iloc[0]:.3g}" for name in names)
        return f"With the one draw of calibration samples, the added test loss is: {parts}."
    parts = ", ".join(f"{name} {added[name].min():.3g} to {added[name].max():.3g}" for name in names)
    return f"Over {len(added)} draws of calibration samples, the added test loss goes from lowest to highest: {parts}."


def _read_policies(results: Results) -> str:
    table = results.test("added_loss_by_policy")
    wanted = results.parameters["headline_keep"]
    keep = min(table.keep.unique(), key=lambda keep: abs(keep - wanted))  # larger ones are not compared
    parts = []
    for method, rows in table[np.isclose(table.keep, keep)].groupby("method", sort=False):
        rows = rows.sort_values("added_loss")
        parts.append(f"{method}: " + ", ".join(f"{row.policy} {row.added_loss:.3g}" for row in rows.itertuples()))
    return f"Added test loss at keep {keep:g}, best first. {'. '.join(parts)}."


def _read_fractions(results: Results) -> str:
    row = results.test("quality_by_rank_fraction").iloc[-1]
    return (
        f"A rank fraction of {row.rank_fraction:g} reports {row.reported_keep:.0%} of the parameters; {row.keep_targeted:.0%} "
        "are stored once a layer whose factors would not be smaller stays dense."
    )


def _read_bits(results: Results) -> str:
    table = results.test("quality_by_bits").fillna({"bits": 0})
    parts = []
    for way, rows in table.groupby("way", sort=False):
        sizes = [
            f"{f'{row.bits:.0f} bits' if row.bits else 'as it is'} {row.weights_mb:.3g} MB {row.added_loss:+.3g}"
            for row in rows.itertuples()
        ]
        parts.append(f"{way}: " + ", ".join(sizes))
    return f"Size and added test loss, at keep {results.parameters['headline_keep']:g} where compressed. {'. '.join(parts)}."


def _read_refinement(results: Results) -> str:
    tested = results.test("quality_by_refinement").groupby("refinement", sort=False).loss.mean()
    if len(tested) == 1:
        return f"Nothing is trained in this set; the test loss where training would start is {tested.iloc[0]:.3f}."
    parts = ", ".join(f"{name} {loss:.3f}" for name, loss in tested.items())
    return f"Test loss, mean over draws of batches: {parts}."


def _read_efficiency(results: Results) -> str:
    table = results.table("efficiency_by_keep")
    smaller = table[table.storage != "dense"]
    slower = int((smaller.speedup < 1).sum())
    reached = (smaller.speedup / smaller.flop_ratio).median()
    return (
        f"Of {len(smaller)} compressed models and phases, {slower} are slower than dense; the median reaches {reached:.0%} of "
        "the speed-up that its operations would allow."
    )


READINGS: dict[str, Reading] = {
    "quality_by_keep": _read_quality,
    "added_loss_by_part": _read_parts,
    "loss_by_sample": _read_draws,
    "added_loss_by_policy": _read_policies,
    "quality_by_rank_fraction": _read_fractions,
    "quality_by_bits": _read_bits,
    "quality_by_refinement": _read_refinement,
    "efficiency_by_keep": _read_efficiency,
}
