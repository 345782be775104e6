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
# # 02 PREHAB: does a rank penalty prepare a model for truncation?
#
# **Question.** If a model is trained a little longer with a penalty on the rank of its whitened weights, does it lose less when
# its layers are truncated afterwards, and is that more than the extra training alone brings?
#
# **Method.** $W=W_0+DS^{-1}$, where $SS^\top=\mathbb E[xx^\top]$; train $D$ from 0 on $\text{task loss}+\lambda\,R(W_0S+D)$, fold
# $D$ into $W$, collect the statistics anew, truncate. Penalties $R$: stable rank, nuclear norm, entropy rank, and the energy
# beyond the target rank. Qin et al., Low-Rank Prehab, arXiv:2512.01980.
#
# **Expected.** By Eckart and Young no training brings a truncated layer closer to the *original* weight than truncating that
# weight does; only the task metric counts, and the control is the same training with $\lambda=0$.

# %% tags=["parameters"]
set_name = "digits-vit"  # the parameter set, which names the folder of results
task = "digits"  # a key of lowrank.tasks.registry.TASKS
task_options = {}  # options of that task's load function
steps = 600  # optimiser steps of the dense baseline; 0 takes the model as it comes
batch_size = 64  # samples
learning_rate = 4e-3  # peak, of the baseline
weight_decay = 0.05
precision = "fp32"  # of the training: fp32 or bf16
seed = 0
split_layers = []  # packed layers that are split into q, k and v first
calibration_samples = 1024  # samples of the training split whose tokens give the moments
strengths = {"stable_rank": 10.0, "nuclear": 10.0, "entropy_rank": 10.0, "tail": 100.0}  # lambda of each penalty
schedule = "cosine"  # of lambda over the first 30 % of the steps
target_keep = 0.1  # kept share whose ranks `tail` looks beyond, and where the claims are made
prehab_steps = 160  # optimiser steps with the penalty
prehab_batch = 64  # samples
prehab_learning_rate = 2e-3  # peak, of D
shrinkage = 0.01  # of the second moment inside S, relative to its mean eigenvalue
refresh = 10  # steps between singular value decompositions
others = False  # train all other parameters too
seeds = [0, 1, 2]  # of batches, dropout and calibration samples
keeps = [0.5, 0.4, 0.3, 0.2, 0.1]  # kept share of the targeted parameters
evaluation_samples = 450  # of the held-out split, the first ones
refine_steps = 40  # optimiser steps on the factors after truncation to `target_keep`
refine_learning_rate = 1e-3  # peak, of the factors

# %%
import copy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from lowrank import Configuration, PrehabConfig, Recipe, collect_statistics, load_task, prehab, split_packed
from lowrank.factorization.moments import output_norm
from lowrank.factorization.spectra import effective_rank, stable_rank, tail_energy
from lowrank.io.hashing import hash_model
from lowrank.nn.targets import depth_and_kind
from lowrank.report.notebook import Report
from lowrank.tasks.baseline import load_baseline, load_calibration
from lowrank.tasks.evaluation import evaluate
from lowrank.tasks.sweep import Sweep, SweepConfig
from lowrank.training.penalties import PENALTIES
from lowrank.training.refine import tune_factors

report = Report("02_prehab", globals())

# %% [markdown]
# ## One training for every penalty, one without
#
# Every model starts from the same dense baseline and the same statistics. `no training` is that model; `lambda = 0` is trained as
# long as the others, in the same coordinates, without a penalty. The penalty is the mean over layers of each layer's own in units
# of its value at the start, so a strength is the rise of the task loss that wiping the penalty out would be worth.

# %%
data = load_task(task, **task_options)
recipe = Recipe(steps, batch_size, learning_rate, weight_decay, precision=precision, seed=seed)
with report.stage("dense baseline"):
    model = load_baseline(data, recipe).model
if split_layers:
    split_packed(model, split_layers)
with report.stage("calibration"):
    statistics = load_calibration(data, model, samples=calibration_samples, batch_size=batch_size, seed=seed)


def quality_of(own):
    """Loss and metrics on the held-out samples."""
    return evaluate(
        own, data.batches("validation", batch_size, samples=evaluation_samples), data.objective, data.metrics
    )


dense, metric, untouched = quality_of(model), data.metric, hash_model(model)
dtype = str(next(model.parameters()).dtype)
report.record(task=data.identity, metric=metric, model=untouched, dtype=dtype)
variants = ["no training", "lambda = 0", *strengths]
colors = dict(zip(variants, ["0.6", "black", *sns.color_palette()], strict=False))


def prepared(variant, draw):
    """A copy of the dense model, trained in one of the ways, and the rows of its training."""
    own = copy.deepcopy(model)
    if variant == "no training":
        return own, []
    chosen = {"penalty": variant, "strength": strengths[variant]} if variant in PENALTIES else {"strength": 0.0}
    shared = dict(target_keep=target_keep, schedule=schedule, shrinkage=shrinkage, refresh=refresh, others=others)
    how = Recipe(prehab_steps, prehab_batch, prehab_learning_rate, 0.0, precision=precision, seed=draw)
    batches = data.batches("train", prehab_batch, seed=draw + 1)
    config = PrehabConfig(steps=prehab_steps, **chosen, **shared)
    result = prehab(own, statistics, batches, config, recipe=how, loss=data.loss, progress=False)
    return result.model, result.history


# %% tags=["nbval-check-output"]
targeted = sum(layer.weight.numel() for layer in data.linears(model).values())
print(f"{len(statistics)} targeted layers, {targeted:,} of {sum(p.numel() for p in model.parameters()):,} parameters")
print(f"{len(variants)} variants x {len(seeds)} seeds, {prehab_steps} steps each")

# %% [markdown]
# ## Each model is folded, profiled anew, truncated, and refined
#
# One pass over variants and seeds fills all tables, so that one prepared model is in memory at a time. Truncation: plain SVD of
# $W$ (`raw`) and of $WS$ (`whitened`), uniform shares, factors. `stale` truncates with the statistics of the model before
# training. Refinement trains both factors of the whitened model at `target_keep` for `refine_steps`; `no training` is refined
# for `refine_steps` and once more for all steps together, which is the equal budget spent after truncation instead.


# %%
def truncated(sweep, method, keep):
    return sweep.compressed(Configuration(method), sweep.ranks(Configuration(method), keep))


def refined(start, steps, draw):
    """Quality of a truncated model after training its factors."""
    batches = data.batches("train", prehab_batch, seed=draw + 100)
    how = Recipe(steps, prehab_batch, refine_learning_rate, 0.0, precision=precision, seed=draw)
    tune_factors(start, batches, recipe=how, loss=data.loss, progress=False)
    return quality_of(start)


def layer_rows(sweep):
    """Spectra of the whitened weights, and how far the truncated layers are from the original weights."""
    ranks, own = sweep.ranks(Configuration("whitened"), target_keep), data.linears(sweep.model)
    for name, sigma in sweep.spectra("whitened").items():
        depth, kind = depth_and_kind(name)
        kept = sweep.factors("whitened")[name].truncate(ranks[name]).dense().to(own[name].weight)
        original = dict(data.linears(model))[name].weight
        error = output_norm(kept - original, statistics[name]) / output_norm(original, statistics[name])
        values = stable_rank(sigma), effective_rank(sigma), tail_energy(sigma, ranks[name])
        columns = ("stable_rank", "effective_rank", "tail_energy")
        about = {"layer": name, "depth": depth, "kind": kind, "distance_to_original": error, "sigma": sigma.numpy()}
        yield about | dict(zip(columns, map(float, values), strict=True))


# %%
logs, qualities, stales, layers, refinements = [], [], [], [], []
for variant in variants:
    for draw in seeds:
        about = {"variant": variant, "seed": draw}
        with report.stage("training"):
            own, history = prepared(variant, draw)
        logs += [about | row for row in history]
        with report.stage("statistics"):
            drawn = data.batches("train", batch_size, samples=calibration_samples, seed=draw)
            sweep = Sweep(own, data, collect_statistics(own, drawn, data.layers), SweepConfig(calibration_samples))
        with report.stage("truncation"):
            qualities.append(about | {"method": "whole", "keep": 1.0} | quality_of(own))
            for method, label in (("svd", "raw"), ("whitened", "whitened")):
                for keep in keeps:
                    found = quality_of(truncated(sweep, method, keep))
                    qualities.append(about | {"method": label, "keep": keep} | found)
            stale = Sweep(own, data, statistics, SweepConfig(calibration_samples))
            found = quality_of(truncated(stale, "whitened", target_keep))
            stales.append(about | {"keep": target_keep} | found)
        layers += [about | row for row in layer_rows(sweep)]
        with report.stage("refinement"):
            for after in (refine_steps, prehab_steps + refine_steps) if variant == "no training" else (refine_steps,):
                start = truncated(sweep, "whitened", target_keep)
                refinements.append(about | {"steps_after": after} | refined(start, after, draw))
assert hash_model(model) == untouched

# %% [markdown]
# ## The penalties fall, and the task loss says what that costs
#
# The table `log_by_step` has one row per variant, seed and refreshed step: `task_loss` on the batch, `penalty` in units of its
# start, `strength` $\lambda$, `gradient_ratio` of the penalty's gradient, times $\lambda$, to that of the task, and means over
# layers of the ranks of $WS$: `stable_rank`, `effective_rank`, `tail_energy` (beyond the rank of `target_keep`).

# %%
columns = ["variant", "seed", "step", "task_loss", "penalty", "strength", "gradient_ratio"]
log = pd.DataFrame(logs)
log = log[log.step % refresh == 0][[*columns, "stable_rank", "effective_rank", "tail_energy"]]
report.table(log, "log_by_step")
long = log.melt(["variant", "seed", "step"], ["task_loss", "penalty", "gradient_ratio", "tail_energy"])
style = dict(x="step", y="value", hue="variant", errorbar="sd", palette=colors)
grid = sns.relplot(long, kind="line", col="variable", height=2.9, aspect=1.05, facet_kws={"sharey": False}, **style)
grid.set_titles("{col_name}").set(xlabel="step", ylabel="")
grid.axes_dict["gradient_ratio"].set_yscale("log")
report.figure(grid, "log_by_step")

# %% [markdown]
# ## What is left after truncation
#
# The table `quality_by_keep` has one row per `variant`, `seed`, `method` of truncation and `keep`; `whole` is the model before
# truncation. Bands are one standard deviation over seeds; the dashed line is the dense model before any of this.

# %%
quality = pd.DataFrame(qualities)
report.table(quality, "quality_by_keep")
style = dict(x="keep", y=metric, hue="variant", errorbar="sd", marker="o", palette=colors)
grid = sns.relplot(quality[quality.method != "whole"], kind="line", col="method", height=3.8, aspect=1.15, **style)
for axis in grid.axes.flat:
    axis.axhline(dense[metric], ls="--", color="0.3")
    axis.set_yscale("linear" if data.headline.bounds else "log")
grid.set(xlabel="kept share of the targeted parameters", ylabel=f"held-out {metric}").set_titles("{col_name}")
report.figure(grid, "quality_by_keep")

# %% [markdown]
# Means and standard deviations over seeds where the claims are made, after whitened truncation to `target_keep`. A penalty beats
# its control where the means differ by more than the larger of the two standard deviations.


# %%
def summary(table):
    """Mean and standard deviation over seeds, by variant; higher is better in `score`."""
    scored = table.assign(score=table[metric] * data.headline.sign)
    return scored.groupby("variant", sort=False).score.agg(["mean", "std"]).fillna(0.0)


at_target = quality[(quality.method == "whitened") & np.isclose(quality.keep, target_keep)]
scores = summary(at_target)
report.table(scores.reset_index(), "score_by_variant")

# %% tags=["nbval-check-output"]
control = scores.loc["lambda = 0"]
for name in strengths:
    gain = scores.loc[name, "mean"] - control["mean"]
    beats = gain > max(scores.loc[name, "std"], control["std"])
    text = f"{name}: prepared and truncated it beats the same training without penalty"
    report.claim(f"{text}, by more than one standard deviation", beats, gain)
gain = scores.loc[list(strengths), "mean"].max() - scores.loc["no training", "mean"]
report.claim("the best penalty also beats truncation of the untrained model", gain > 0, gain)
raw = quality[(quality.method == "raw") & (quality.keep <= 0.3)].groupby(["variant", "keep"]).loss.mean()
white = quality[(quality.method == "whitened") & (quality.keep <= 0.3)].groupby(["variant", "keep"]).loss.mean()
report.claim("whitened truncation beats raw truncation in every variant at every keep <= 0.3", white < raw)

# %% [markdown]
# ## Spectra before and after, and what Eckart and Young forbid
#
# The table `ranks_by_layer`: stable, effective and tail rank of $WS$ for each layer, and `distance_to_original`, the output error
# of the truncated layer against the *original* weight on the original statistics. No penalty can bring that below the truncation
# of the original weight itself. The figure shows the spectrum of $WS$ over its largest value, mean over layers and seeds.

# %%
by_layer = pd.DataFrame(layers)
report.table(by_layer.drop(columns="sigma"), "ranks_by_layer")
shares = np.linspace(0, 1, 41)
rows = [
    (row.variant, share, value)
    for row in by_layer.itertuples()
    for share, value in zip(shares, np.interp(shares, np.linspace(0, 1, len(row.sigma)), row.sigma), strict=True)
    if row.sigma[0] > 0
    for value in [value / row.sigma[0]]
]
spectrum = pd.DataFrame(rows, columns=["variant", "index_share", "sigma_share"])
spectrum = spectrum.groupby(["variant", "index_share"], sort=False).sigma_share.mean().reset_index()
report.table(spectrum, "spectrum_by_index")
drawn, axis = plt.subplots(figsize=(7, 3.8))
sns.lineplot(spectrum, x="index_share", y="sigma_share", hue="variant", palette=colors, ax=axis)
axis.set(yscale="log", ylim=(1e-4, 1.2), xlabel="index of the singular value / their number", ylabel="sigma / sigma_1")
axis.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
report.figure(drawn, "spectrum_by_index")

# %% tags=["nbval-check-output"]
same = by_layer[by_layer.seed == seed].pivot(index="layer", columns="variant", values="distance_to_original")
assert (same[variants].min(axis=1) >= same["no training"] * (1 - 1e-3)).all()
print("no prepared layer is closer to the original weight than its own truncation")
tails = by_layer.groupby("variant").tail_energy.mean()
report.claim("every penalty lowers the energy beyond the target rank", tails[list(strengths)] < tails["lambda = 0"])

# %% [markdown]
# ## Statistics grow stale
#
# Training moves the inputs of every layer, so the moments have to be collected anew before truncation. The table
# `quality_by_statistics` sets the prepared models truncated to `target_keep` with `fresh` statistics beside the same with the
# `stale` ones of the model before training.

# %%
columns = ["variant", "seed", "keep", "statistics", "loss", metric]
stale = pd.concat([at_target.assign(statistics="fresh"), pd.DataFrame(stales).assign(statistics="stale")])[columns]
report.table(stale, "quality_by_statistics")
drawn, axis = plt.subplots(figsize=(7, 3.4))
sns.pointplot(stale, x="loss", y="variant", hue="statistics", errorbar="sd", dodge=0.3, linestyle="none", ax=axis)
axis.set(xlabel=f"held-out loss at keep {target_keep}", ylabel="")
axis.legend(title="statistics", bbox_to_anchor=(1.02, 1), loc="upper left")
report.figure(drawn, "quality_by_statistics")

# %% tags=["nbval-check-output"]
loss = stale.groupby(["variant", "statistics"]).loss.mean().unstack().loc[variants[1:]]
report.claim("fresh statistics beat stale ones after every training", loss.fresh < loss.stale)

# %% [markdown]
# ## Does it pay, when the steps could be spent after truncation?
#
# The table `quality_by_refinement`: whitened models at `target_keep` whose factors were trained for `steps_after` more steps.
# `all steps after` spends the whole budget of a prepared model on the factors of the untrained one.

# %%
refinement = pd.DataFrame(refinements)
late = (refinement.variant == "no training") & (refinement.steps_after > refine_steps)
refinement.loc[late, "variant"] = "all steps after"
report.table(refinement, "quality_by_refinement", rows=21)
drawn, axis = plt.subplots(figsize=(7, 3.4))
style = dict(y="variant", errorbar="sd", linestyle="none", ax=axis)
sns.pointplot(at_target, x=metric, color="0.6", label="truncated", **style)
sns.pointplot(refinement, x=metric, label="and refined", **style)
axis.axvline(dense[metric], ls="--", color="0.3", label="dense")
axis.set(xlabel=f"held-out {metric} at keep {target_keep}", ylabel="")
axis.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
report.figure(drawn, "quality_by_refinement")

# %% tags=["nbval-check-output"]
after = summary(refinement)
for name in strengths:
    gain = after.loc[name, "mean"] - after.loc["lambda = 0", "mean"]
    beats = gain > max(after.loc[name, "std"], after.loc["lambda = 0", "std"])
    text = f"{name}: still better than without penalty once both are refined, by more than one standard deviation"
    report.claim(text, beats, gain)
gain = after.loc[list(strengths), "mean"].max() - after.loc["all steps after", "mean"]
report.claim("preparing with the best penalty beats spending all steps after truncation", gain > 0, gain)

# %% [markdown]
# ## What this shows
#
# Truncation after a rank penalty is to be compared with truncation after the same training without one, and at the same total
# number of steps with training after truncation. The claims say, penalty by penalty, which of the three is worth it here. A
# penalty that looks only at the singular values beyond the target rank asks for what truncation will do; one that lowers all of
# them, or the ratio to the largest, pays for more than it needs. The price is the task loss of the whole model, which rises with
# the strength: a prepared model is made for one budget. Notebook 03 compares what can be done without any training.

# %%
report.finish()
