# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (lowrank)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 Whitening: the norm in which a weight should be truncated
#
# **Question.** Which rank-$r$ matrix $W_r$ should replace a weight $W$, if what matters is its output on real inputs $X$?
#
# **Method.** With $G = XX^\top$ and any $S$ with $SS^\top = G/N$, the minimiser of $\|(W-W_r)X\|_F$ is
# $$W_r = U_rU_r^\top W, \qquad \|(W-W_r)X\|_F^2 = N\textstyle\sum_{i>r}\sigma_i^2(WS),$$
# where $U_r$ holds the leading left singular vectors of $WS$. $S^{-1}$ cancels: no Cholesky factor and no inverse is needed.
# Chen et al., DRONE, NeurIPS 2021; Wang et al., SVD-LLM, ICLR 2025, arXiv:2403.07378.
#
# **Expected.** The second formula holds to rounding on every layer; whitened spectra fall faster than raw ones; the projector
# holds on any moments; a few tokens per input dimension are enough to estimate $G$.

# %% tags=["parameters"]
set_name = "digits-vit"  # the parameter set, which names the folder of results
task = "digits"  # a key of lowrank.tasks.registry.TASKS
task_options = {}  # options of that task's load function
steps = 600  # optimiser steps of the dense baseline; 0 takes the model as it comes
batch_size = 64  # samples
learning_rate = 4e-3  # peak
weight_decay = 0.05
precision = "fp32"  # of the training: fp32 or bf16
seed = 0
retrain = False  # train the dense baseline anew instead of loading the shipped one
calibration_samples = 768  # samples of the training split whose tokens give the second moments
theorem_samples = 256  # samples on which the theorem is measured
theorem_in_float64 = True  # also with a float64 copy of the model
rank_shares = [0.1, 0.25, 0.5]  # rank / min(out, in); beyond a half, two factors of a square weight store more than it
tokens_per_dimension = [0.5, 1, 2, 5, 10]  # calibration tokens / inputs of the layer
shrinkages = [0.0, 0.01, 0.1]  # ridge / mean eigenvalue of G/N
held_out_tokens = 4096  # tokens of the validation and of the test split that judge whiteness and calibration
repeats = 3  # draws of calibration tokens, and timed repeats

# %%
import copy
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from torch.linalg import svdvals

from lowrank import METHODS, Recipe, collect_statistics, factorize, load_task
from lowrank.calibration.hooks import collect_inputs
from lowrank.calibration.output_error import output_errors
from lowrank.factorization.alternatives import compare_alternatives, stress_cases
from lowrank.factorization.moments import output_norm, second_moment_eigh, shrink_moments, whitening_factor
from lowrank.factorization.running_moments import statistics_of_rows
from lowrank.factorization.spectra import effective_rank, stable_rank
from lowrank.io.hashing import hash_model
from lowrank.nn.batches import as_double
from lowrank.nn.targets import depth_and_kind
from lowrank.report.notebook import Report
from lowrank.report.style import colors_of, mark_data, write_plain_logs
from lowrank.tasks.baseline import distance, load_baseline, load_calibration

report = Report("01_whitening", globals())

# %% [markdown]
# ## First, two inputs by hand
#
# A weight of two outputs and two inputs, of which the first input is ten times as large as the second. Plain SVD keeps the
# direction with the larger weight; whitening keeps the one that carries the output.

# %% tags=["nbval-check-output"]
toy = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
sizes_of_inputs = torch.tensor([10.0, 1.0], dtype=torch.float64)
x = torch.eye(2, dtype=torch.float64) * sizes_of_inputs  # two tokens, one for each input
moment = statistics_of_rows(x)
for method in ("svd", "whitened"):
    kept = factorize(toy, 1, METHODS[method](moment, toy)).dense()
    print(f"{method}: keeps {kept.round(decimals=6).tolist()}, output error {((toy - kept) @ x.T).norm():.1f}")

# %% [markdown]
# ## The dense baseline is measured, not quoted
#
# The table `baseline`: loss and metrics on the test split, the weights in the targeted layers, those in the whole model, and
# their ratio `targeted_share`: what a compression of the targeted layers can touch. With `retrain` it has a second row, of the
# model that comes with the library; `distance` is $\|w-w_0\|/\|w_0\|$ to its weights $w_0$, empty where there is none.

# %%
data = load_task(task, **task_options).open_test(report.freeze())
recipe = Recipe(steps, batch_size, learning_rate, weight_decay, precision=precision, seed=seed)
with report.stage("dense baseline"):
    baseline = load_baseline(data, recipe, retrain=retrain)
    model = baseline.model
    if baseline.shipped is None:
        models, shipped = {baseline.origin: model}, model if baseline.origin == "shipped" else None
    else:
        models, shipped = {"trained anew": model, "shipped": baseline.shipped}, baseline.shipped
    dense = {origin: data.evaluate(one, "test", batch_size) for origin, one in models.items()}
linears = data.linears(model)
weights = {name: layer.weight.detach() for name, layer in linears.items()}
targeted = sum(weight.numel() for weight in weights.values())
total = sum(p.numel() for p in model.parameters())
dtype = str(next(model.parameters()).dtype)
report.record(task=data.identity, rows=data.rows, metric=data.metric, baseline=baseline.origin)
report.record(model=hash_model(model), dtype=dtype)
sizes = {"targeted_weights": targeted, "model_weights": total, "targeted_share": targeted / total}
away = {origin: float("nan") if shipped is None else distance(one, shipped) for origin, one in models.items()}
rows = [{"model": origin} | dense[origin] | sizes | {"distance": away[origin]} for origin in models]
report.table(pd.DataFrame(rows), "baseline", split="test")

# %% tags=["nbval-check-output"]
print(f"{len(linears)} targeted layers, {targeted:,} of {total:,} weights; shapes (out, in):")
shapes = pd.Series([tuple(weight.shape) for weight in weights.values()])
print(shapes.value_counts(sort=False).to_string())

# %% [markdown]
# ## One pass gives every second moment
#
# The table `moments_by_layer` has one row per targeted layer: `tokens` counted (padding left out), tokens per input
# dimension, the numerical `moment_rank` of $G$ in float64, `condition` $=\lambda_{\max}/\lambda_{\min}$ over that rank, and
# `shares_with`: the layer whose matrix it shares because both receive the same tensor.

# %%
with report.stage("calibration moments"):
    moments = load_calibration(data, model, samples=calibration_samples, batch_size=batch_size, seed=seed)
eigenvalues = {name: second_moment_eigh(layer)[0] for name, layer in moments.items()}
rows, first = [], {}
for name, layer in moments.items():
    values, inputs = eigenvalues[name], len(layer.gram)
    above = values[values > values[-1] * inputs * torch.finfo(torch.float64).eps]
    leader = first.setdefault(layer.gram.data_ptr(), name)
    shared = leader if leader != name else ""
    rows.append((name, layer.tokens, layer.tokens / inputs, len(above), (above[-1] / above[0]).item(), shared))
columns = ["layer", "tokens", "tokens_per_dimension", "moment_rank", "condition", "shares_with"]
moment_table = pd.DataFrame(rows, columns=columns)
report.table(moment_table, "moments_by_layer", split="train", tolerance={"condition": 0.01})

# %% tags=["nbval-check-output"]
report.reading("moments_by_layer")

# %% [markdown]
# ## Whitened spectra fall faster than raw ones
#
# The table `spectrum_by_index` has one row per layer, matrix ($W$ or $WS$) and index share $i/k$: `relative_singular_value`
# is $\sigma_i/\sigma_1$. The figure shows the mean over depth for each kind of layer; the band is the range over depth. A
# spectrum that falls faster leaves less to discard at the same rank.

# %%
grid = np.linspace(0, 1, 33)
spectra, rows = {}, []
for name, weight in weights.items():
    factor = whitening_factor(moments[name]).to(weight.device)
    spectra[name] = {"W": svdvals(weight.double()).cpu(), "WS": svdvals(weight.double() @ factor).cpu()}
    for matrix, values in spectra[name].items():
        relative = np.interp(grid, np.linspace(0, 1, len(values)), values / values[0])
        rows += [(*depth_and_kind(name), matrix, x, y) for x, y in zip(grid, relative, strict=True)]
columns = ["depth", "kind", "matrix", "index_share", "relative_singular_value"]
spectrum_table = pd.DataFrame(rows, columns=columns)
report.table(spectrum_table, "spectrum_by_index", split="train")
style = dict(x="index_share", y="relative_singular_value", hue="matrix", style="matrix", errorbar=("pi", 100))
drawn = sns.relplot(spectrum_table, kind="line", col="kind", col_wrap=4, height=2.3, aspect=1.2, **style)
drawn.set(yscale="log", ylim=(1e-4, 1.3), xlabel="index / min(out, in)", ylabel=r"$\sigma_i/\sigma_1$")
for axis in drawn.axes.flat:
    write_plain_logs(axis)
report.figure(drawn.set_titles("{col_name}"), "spectrum_by_index")

# %% tags=["nbval-check-output"]
report.reading("spectrum_by_index")

# %% [markdown]
# ## The discarded singular values are the output error
#
# The table `theorem_by_layer` has one row per layer, rank share and model dtype. `measured` is $\|(W-W_r)X\|_F$, summed over
# the activations as they stream by, without $G$; `predicted` is the norm of the discarded singular values of $WS$, times
# $\sqrt N$; `output` is $\|WX\|_F$. `difference` is $|\text{measured}-\text{predicted}|$ over `predicted`, or over `output`
# where $r$ reaches the rank of $WX$ and the prediction is zero. The theorem demands `difference` at the level of rounding.


# %%
def theorem(model, cast):
    """Measured and predicted error of every targeted layer at every rank share."""
    calls = lambda: map(cast, data.batches("train", batch_size, samples=theorem_samples, seed=seed))
    fresh = collect_statistics(model, calls(), data.layers, products=torch.float64)
    found, replaced = {}, {}
    for name, layer in data.linears(model).items():
        full = factorize(layer.weight, min(layer.weight.shape), METHODS["whitened"](fresh[name], layer.weight))
        found[name] = [full.truncate(max(1, round(share * full.rank))) for share in rank_shares]
        replaced[name] = [torch.zeros_like(layer.weight), *(factors.dense() for factors in found[name])]
    measured = output_errors(model, calls(), replaced)
    for name, factors in found.items():
        output, *errors = measured[name]
        for share, factor, error in zip(rank_shares, factors, errors, strict=True):
            scale = factor.error if factor.error > 0 else output
            yield name, share, factor.rank, error, factor.error, output, abs(error - factor.error) / scale


# %%
with report.stage("theorem"):
    found = {"float32": theorem(model, lambda batch: batch)}
    if theorem_in_float64:
        found["float64"] = theorem(copy.deepcopy(model).double(), as_double)
    rows = [(dtype, *row) for dtype, rows in found.items() for row in rows]
columns = ["dtype", "layer", "rank_share", "rank", "measured", "predicted", "output", "difference"]
theorem_table = pd.DataFrame(rows, columns=columns)
report.table(theorem_table, "theorem_by_layer", split="train", rows=4, unstable=["difference"])

# %% tags=["nbval-check-output"]
# Rounding is relative to the whole energy: an error that is a thousandth of the output has a millionth of it.
energy = (theorem_table.measured**2 - theorem_table.predicted**2).abs() / theorem_table.output**2
off = energy.groupby(theorem_table.dtype).max()
assert off["float32"] <= 1e-6, off
assert off.get("float64", 0.0) <= 1e-13, off
print(f"asserted for {len(weights)} layers x {len(rank_shares)} ranks in {', '.join(found)}")

# %% [markdown]
# ## At equal rank, whitening beats plain SVD on the outputs
#
# The table `output_error_by_rank` has one row per layer, method, rank share and split: `relative_error` is
# $\|(W-W_r)X\|_F/\|WX\|_F$ on the calibration tokens, for which `whitened` is the optimum, and on those of the test split. The
# figure shows the mean over depth for each kind of layer, on test tokens.

# %%
with report.stage("test moments"):
    judges = {
        "train": moments,
        "test": collect_statistics(model, data.batches("test", batch_size), data.layers, products=torch.float64),
    }
rows = []
for (name, weight), method in itertools.product(weights.items(), ("svd", "whitened")):
    full = factorize(weight, min(weight.shape), METHODS[method](moments[name], weight))
    for share in rank_shares:
        lost = weight.double() - full.truncate(max(1, round(share * full.rank))).dense().double()
        for split, judge in judges.items():
            error = output_norm(lost, judge[name]) / output_norm(weight, judge[name])
            rows.append((*depth_and_kind(name), method, share, error, split))
errors = pd.DataFrame(rows, columns=["depth", "kind", "method", "rank_share", "relative_error", "split"])
report.table(errors, "output_error_by_rank", split=None)
style = dict(x="rank_share", y="relative_error", hue="method", style="method", markers=True, errorbar=("pi", 100))
tested = errors[errors.split == "test"]
style |= dict(palette=colors_of(tested.method))
drawn = sns.relplot(tested, kind="line", col="kind", col_wrap=4, height=2.3, aspect=1.2, **style)
drawn.set(yscale="log", ylim=(1e-4, 1.3), xlabel="rank / min(out, in)", ylabel="relative test error")
for axis in drawn.axes.flat:
    write_plain_logs(axis)
    mark_data(axis, rank_shares)
report.figure(drawn.set_titles("{col_name}"), "output_error_by_rank")

# %% tags=["nbval-check-output"]
by_method = errors.pivot(index=["split", "depth", "kind", "rank_share"], columns="method", values="relative_error")
fitted = by_method.loc["train"]
assert (fitted.whitened <= fitted.svd * (1 + 1e-6)).all()  # it is the optimum
print("on calibration tokens, whitening loses to plain SVD nowhere")
report.reading("output_error_by_rank")

# %% [markdown]
# ## The projector needs no factor that may not exist
#
# Three ways to the same optimum: `cholesky + inverse` (float32 $G$, an absolute ridge where Cholesky fails, explicit inverse in
# float32), `eigen factor + inverse` (float64, pseudo-inverse), and the `projector`. One layer of each kind, at half its rank, on
# its moments `as measured`, with activations `scaled by 1e-4`, from `half as many tokens as inputs`, and with channels scaled
# `from 1 to 1e-6`. The table `recipe_error_by_moments`: `excess_error` is the error over the optimum, minus 1 (infinite: the
# recipe raised); `fraction_of_output` is the same excess over $\|WX\|_F$; `time_ms` the median time.

# %%
probes = {
    kind: name for _, kind, name in sorted((*depth_and_kind(name), name) for name in weights)
}  # the deepest of each
inputs = {name: len(moments[name].gram) for name in probes.values()}
train_tokens = int(max(tokens_per_dimension) * max(inputs.values()))
with report.stage("recipes"):
    calls = data.batches("train", batch_size, seed=seed + 1)
    sampled = collect_inputs(model, calls, probes.values(), train_tokens)
    rows = []
    for kind, name in probes.items():
        cases = stress_cases(moments[name], sampled[name][: inputs[name] // 2])
        weight, rank = weights[name].cpu(), min(weights[name].shape) // 2
        rows += [
            (kind, case, *row) for case in cases for row in compare_alternatives(weight, rank, cases[case], repeats)
        ]
columns = ["kind", "moments", "recipe", "excess_error", "fraction_of_output", "time_ms"]
recipe_table = pd.DataFrame(rows, columns=columns)
worst_recipes = recipe_table.groupby(["moments", "recipe"], sort=False).fraction_of_output.max().unstack()
noise = ["excess_error", "fraction_of_output"]  # what rounding leaves of a difference that is zero
report.table(recipe_table, "recipe_error_by_moments", split="train", measured=["time_ms"], unstable=noise)
worst_recipes.style.format("{:.1e}").set_caption("worst fraction_of_output over the layers")

# %% tags=["nbval-check-output"]
projector = recipe_table[recipe_table.recipe == "projector"]
assert (projector.fraction_of_output <= 1e-6).all(), projector
report.reading("recipe_error_by_moments")

# %% [markdown]
# ## $S^{-1}x$ is white, $S^\top x$ is not, and new tokens are only nearly white
#
# The table `whiteness_by_layer` has one row per kind of layer, transform and split: `deviation` is
# $\|E[zz^\top] - I\|_F/\sqrt k$ for the transformed inputs $z$, in the $k$ directions whose variance exceeds $10^{-6}$ of the
# largest. $S$ comes from the tokens of `train`. $S^\top x$ is scaled to mean variance 1, to give it its best chance.

# %%
with report.stage("whiteness"):
    held_out = {
        split: collect_inputs(model, data.batches(split, batch_size), probes.values(), held_out_tokens)
        for split in ("validation", "test")
    }
    rows = []
    for kind, name in probes.items():
        fitted = statistics_of_rows(sampled[name])
        values, vectors = second_moment_eigh(fitted)
        values, vectors = values[values > 1e-6 * values[-1]], vectors[:, values > 1e-6 * values[-1]]
        for split, x in {"train": sampled[name], "test": held_out["test"][name]}.items():
            for transform, scale in {"S^-1 x": values.rsqrt(), "S^T x": values.sqrt()}.items():
                z = x.double() @ (vectors * scale)
                second = z.T @ z / len(z)
                second /= second.diagonal().mean() if transform == "S^T x" else 1.0
                deviation = (second - torch.eye(len(second))).norm() / len(second) ** 0.5
                rows.append((kind, transform, len(second), deviation.item(), split))
whiteness = pd.DataFrame(rows, columns=["kind", "transform", "directions", "deviation", "split"])
report.table(whiteness, "whiteness_by_layer", split=None)

# %% tags=["nbval-check-output"]
deviation = whiteness.pivot(index=["split", "kind"], columns="transform", values="deviation")
assert (deviation.loc["train", "S^-1 x"] <= 1e-8).all(), deviation
print("S^-1 x is white to rounding on the tokens that S comes from")
tested = deviation.loc["test"].median()
print(f"on test tokens (median kind of layer): {tested['S^-1 x']:.3g} from white, S^T x {tested['S^T x']:.3g}")

# %% [markdown]
# ## A few tokens per input dimension are enough
#
# For each kind of layer, $G$ is estimated from `tokens_per_dimension` x inputs tokens of the training split, with a ridge of
# `shrinkage` x the mean eigenvalue, and the truncation to a quarter of the rank is judged on the tokens of another `split`. The
# table `held_out_error_by_tokens`: `excess` is that error over the one of the oracle, which knows the $G$ of that split, minus
# 1; one row per `draw` of tokens. The ridge of the last claim is the one with the lowest median on validation. The figure shows
# test; plain SVD, which needs no tokens, is the dashed line (median over layers).


# %%
def excess(weight, factors, targets):
    """The error of a truncated weight over that of the oracle, minus 1, on every split."""
    lost = weight - factors.dense()
    return {split: output_norm(lost, target) / oracle - 1 for split, (target, oracle) in targets.items()}


with report.stage("calibration tokens"):
    rows = []
    for kind, name in probes.items():
        weight, rank = weights[name].cpu(), min(weights[name].shape) // 4
        targets = {split: statistics_of_rows(tokens[name]) for split, tokens in held_out.items()}
        targets = {
            split: (target, factorize(weight, rank, METHODS["whitened"](target, weight)).error)
            for split, target in targets.items()
        }
        plain = excess(weight, factorize(weight, rank), targets)
        for share, draw in itertools.product(tokens_per_dimension, range(repeats)):
            generator = torch.Generator().manual_seed(seed + draw)
            chosen = torch.randperm(len(sampled[name]), generator=generator)[: max(1, int(share * inputs[name]))]
            estimate = statistics_of_rows(sampled[name][chosen])
            for shrinkage in shrinkages:
                factors = factorize(weight, rank, METHODS["whitened"](shrink_moments(estimate, shrinkage), weight))
                found = excess(weight, factors, targets)
                rows += [(kind, share, shrinkage, draw, found[split], plain[split], split) for split in targets]
columns = ["kind", "tokens_per_dimension", "shrinkage", "draw", "excess", "plain_svd_excess", "split"]
by_tokens = pd.DataFrame(rows, columns=columns)
report.table(by_tokens, "held_out_error_by_tokens", split=None)

# %%
tested = by_tokens[by_tokens.split == "test"]
drawn, axis = plt.subplots(figsize=(6.5, 3.8))
shown = tested.assign(shrinkage=tested.shrinkage.astype(str))
shown["excess"] *= 100
style = dict(x="tokens_per_dimension", y="excess", hue="shrinkage", style="shrinkage", markers=True, estimator="median")
sns.lineplot(shown, errorbar=("pi", 50), ax=axis, **style)
axis.axhline(100 * tested.plain_svd_excess.median(), ls="--", color="0.4", label="plain SVD")
axis.set(xscale="log", yscale="log", xlabel="calibration tokens / inputs", ylabel="test error over the oracle's, %")
write_plain_logs(axis)
mark_data(axis, tokens_per_dimension)
axis.set_title(f"median and middle half of {shown.kind.nunique()} kinds of layers x {repeats} draws", fontsize=11)
axis.legend(title="ridge / mean eigenvalue", bbox_to_anchor=(1.02, 1), loc="upper left")
report.figure(drawn, "held_out_error_by_tokens")

# %% tags=["nbval-check-output"]
report.reading("held_out_error_by_tokens")

# %% [markdown]
# ## Whitening lowers the effective and the stable rank
#
# The table `rank_by_layer` has one row per layer and matrix: `effective_rank` $=\exp H(\sigma/\sum\sigma)$ and `stable_rank`
# $=\sum\sigma^2/\sigma_1^2$, both as a share of $\min(\text{out},\text{in})$.

# %%
rows = [
    (*depth_and_kind(name), matrix, measure, function(values).item() / len(values))
    for name, pair in spectra.items()
    for matrix, values in pair.items()
    for measure, function in {"effective": effective_rank, "stable": stable_rank}.items()
]
ranks = pd.DataFrame(rows, columns=["depth", "kind", "matrix", "measure", "rank_share"])
report.table(ranks, "rank_by_layer", split="train")

# %% tags=["nbval-check-output"]
report.reading("rank_by_layer")

# %% [markdown]
# ## What this shows
#
# The output error of a truncated layer is known before a single truncated output is computed: it is the tail of the whitened
# spectrum, to rounding, also where the second moment is singular. The projector needs neither a factor that may not exist nor an
# inverse; the table of recipes says where that matters and where it does not. The claims below say which expectations are
# supported with these parameters. All errors here are those of single layers: what a compressed *model* loses is the subject of
# notebook 03, and whether training can prepare a model for it that of notebook 02.

# %% tags=["nbval-check-output"]
report.finish()
