"""What notebook 01 finds: whitened truncation against plain SVD, and how many tokens it needs."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from lowrank.report.findings.results import Claim, Reading, Results, Table
from lowrank.report.inference import mean_effect

ENOUGH = 5  # tokens per input dimension
CLOSE = 10.0  # % over the error of the oracle


def _ratios(results: Results) -> Table:
    """Return log2 of plain SVD's error over whitening's on test tokens, by layer, mean over ranks that leave an error."""
    errors = results.test("output_error_by_rank")
    errors = errors.pivot(index=["depth", "kind", "rank_share"], columns="method", values="relative_error")
    errors = errors[(errors > 1e-6).all(axis=1)]
    return np.log2(errors.svd / errors.whitened).groupby(["depth", "kind"]).mean()


def _excess(results: Results) -> Table:
    """Return the error over the oracle's in %, mean over draws, by split, kind and tokens (rows) and shrinkage (columns)."""
    table = results.table("held_out_error_by_tokens")
    index = ["split", "kind", "tokens_per_dimension"]
    return 100 * table.pivot_table(index=index, columns="shrinkage", values="excess")


def claims(results: Results) -> Iterator[Claim]:
    """Yield the claims of notebook 01."""
    text = "At equal rank, whitening at least halves plain SVD's output error on test tokens (mean over layers)"
    yield Claim("whitening/halves-error", text, mean_effect(_ratios(results), 1.0), "halvings", 1.0)
    excess = _excess(results)
    tokens = excess.index.get_level_values("tokens_per_dimension")
    if ENOUGH in tokens:
        at_five = excess[0.0].xs(("test", ENOUGH), level=("split", "tokens_per_dimension"))
        text = f"{ENOUGH} calibration tokens per input dimension come within {CLOSE:g} % of the oracle's error (kinds of layers)"
        yield Claim("whitening/few-tokens", text, mean_effect(CLOSE - at_five), "% of the oracle's error")
    few = excess[tokens < ENOUGH]
    if len(few) and few.shape[1] > 1:
        best = few.loc["validation"].drop(columns=0.0).groupby("tokens_per_dimension").mean().idxmin(axis=1)
        test = few.loc["test"].reset_index("tokens_per_dimension")
        gains = pd.Series([row[0.0] - row[best[row.tokens_per_dimension]] for _, row in test.iterrows()], test.index)
        text = f"Below {ENOUGH} tokens per dimension, the ridge picked on validation lowers the error (kinds of layers)"
        effect = mean_effect(gains.groupby("kind").mean())
        yield Claim("whitening/ridge", text, effect, "% of the oracle's error")
    ranks = results.table("rank_by_layer").pivot(
        index=["measure", "depth", "kind"], columns="matrix", values="rank_share"
    )
    for measure, pair in ranks.groupby("measure"):
        text = f"Whitening lowers the {measure} rank (mean over layers)"
        yield Claim(f"whitening/{measure}-rank", text, mean_effect(100 * (pair.W - pair.WS)), "% of the full rank")


def _read_moments(results: Results) -> str:
    table = results.table("moments_by_layer")
    shared = int(table.shares_with.isna().sum())
    least = table.loc[table.tokens_per_dimension.idxmin()]
    return (
        f"{len(table)} layers share {shared} distinct moments. The layer with the fewest tokens, {least.layer}, has "
        f"{least.tokens_per_dimension:.0f} per input dimension; condition numbers go up to {table.condition.max():.0e}."
    )


def _read_spectra(results: Results) -> str:
    table = results.table("spectrum_by_index")
    half = table[np.isclose(table.index_share, 0.5)].groupby("matrix").relative_singular_value.median()
    return (
        f"Halfway down the spectrum (median layer), singular values have fallen to {half['W']:.2g} of the largest for W, and to "
        f"{half['WS']:.2g} for WS."
    )


def _read_errors(results: Results) -> str:
    ratios = _ratios(results)
    worst, best = ratios.idxmin(), ratios.idxmax()
    return (
        f"On test tokens, plain SVD's error is {2 ** ratios.mean():.2f} x whitening's (geometric mean over layers): from "
        f"{2 ** ratios.min():.2f} x in block {worst[0]}, {worst[1]}, to {2 ** ratios.max():.2f} x in block {best[0]}, {best[1]}."
    )


def _read_recipes(results: Results) -> str:
    table = results.table("recipe_error_by_moments")
    cholesky = table[table.recipe == "cholesky + inverse"]
    raised = int(np.isinf(cholesky.excess_error).sum())
    off = int((cholesky.fraction_of_output > 1e-3).sum()) - raised
    return (
        f"The Cholesky recipe raised on {raised} of {len(cholesky)} moments and lost more than 0.1 % of the output on "
        f"{max(off, 0)} others; the projector did neither on any."
    )


def _read_tokens(results: Results) -> str:
    excess = _excess(results)[0.0].loc["test"].groupby("tokens_per_dimension").mean()
    parts = [f"{value:.3g} % with {tokens:g} tokens per dimension" for tokens, value in excess.items()]
    return f"Error over the oracle's, mean over kinds of layers, no ridge: {', '.join(parts)}."


def _read_ranks(results: Results) -> str:
    table = results.table("rank_by_layer").groupby(["measure", "matrix"]).rank_share.mean().unstack()
    parts = [f"{measure} rank {row['W']:.1%} -> {row['WS']:.1%}" for measure, row in table.iterrows()]
    return f"From W to WS, as shares of the full rank, mean over layers: {', '.join(parts)}."


READINGS: dict[str, Reading] = {
    "moments_by_layer": _read_moments,
    "spectrum_by_index": _read_spectra,
    "output_error_by_rank": _read_errors,
    "recipe_error_by_moments": _read_recipes,
    "held_out_error_by_tokens": _read_tokens,
    "rank_by_layer": _read_ranks,
}
