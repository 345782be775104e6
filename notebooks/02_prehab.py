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
seed = 0  # of the baseline
retrain = False  # train the dense baseline anew instead of loading the shipped one
split_layers = []  # packed layers that are split into q, k and v first
calibration_samples = 768  # samples of the training split whose tokens give the moments
strengths = {"stable_rank": 10.0, "nuclear": 10.0, "entropy_rank": 10.0, "tail": 100.0}  # lambda of each penalty
schedule = "cosine"  # of lambda over the first 30 % of the steps
target_keep = 0.1  # kept share whose ranks `tail` looks beyond, and where the claims are made
prehab_steps = 160  # optimiser steps with the penalty
prehab_batch = 64  # samples
prehab_learning_rate = 2e-3  # peak, of D
shrinkage = 0.01  # of the second moment inside S, relative to its mean eigenvalue
refresh = 10  # steps between singular value decompositions
others = False  # train all other parameters too
seeds = [0, 1, 2, 3, 4]  # of batches, dropout and calibration samples
keeps = [0.5, 0.4, 0.3, 0.2, 0.1]  # kept share of the targeted parameters
evaluation_samples = 450  # of validation and of test, the first ones, at most
refine_steps = 40  # optimiser steps on the factors after truncation to `target_keep`
refine_learning_rate = 1e-3  # peak, of the factors

# %%
import copy
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch

from lowrank import Configuration, PrehabConfig, Recipe, collect_statistics, load_task, prehab, split_packed
from lowrank.factorization.moments import output_norm
from lowrank.factorization.spectra import effective_rank, stable_rank, tail_energy
from lowrank.io.hashing import hash_model
from lowrank.nn.targets import depth_and_kind
from lowrank.report.notebook import Report
from lowrank.report.style import colors_of, write_plain_logs
from lowrank.tasks.baseline import load_baseline, load_calibration
from lowrank.tasks.evaluation import evaluate
from lowrank.tasks.sweep import Sweep, SweepConfig
from lowrank.training.penalties import PENALTIES
from lowrank.training.refine import tune_factors

report = Report("02_prehab", globals())

# %% [markdown]
# ## First, four spectra by hand
#
# Each penalty is a number between 0 and the rank that says how far a spectrum is from low rank. Training pushes it down; the
# energy beyond the target rank is what truncation will cost.

# %% tags=["nbval-check-output"]
for label, values in {"flat": [1, 1, 1, 1], "falling": [4, 2, 1, 0.5], "rank 1": [4, 0, 0, 0]}.items():
    sigma = torch.tensor(values, dtype=torch.float64)
    ranks = f"stable rank {stable_rank(sigma):.2f}, entropy rank {effective_rank(sigma):.2f}"
    print(f"{label}: {ranks}, energy beyond rank 1: {tail_energy(sigma, 1):.2f}")

# %% [markdown]
# ## One training for every penalty, one without
#
# Every model starts from the same dense baseline. `no training` is that model; `lambda = 0` is trained as long as the others, in
# the same coordinates, without a penalty. The penalty is the mean over layers of each layer's own in units
# of its value at the start, so a strength is the rise of the task loss that wiping the penalty out would be worth. Each seed
# draws its own calibration samples, which give the statistics before and after training alike.
#
# Validation picks the best penalty, test says how good it is. Models are compared by their metric, or by the loss, its logarithm,
# if the metric is a perplexity.

# %%
data = load_task(task, **task_options).open_test(report.freeze())
recipe = Recipe(steps, batch_size, learning_rate, weight_decay, precision=precision, seed=seed)
with report.stage("dense baseline"):
    baseline = load_baseline(data, recipe, retrain=retrain)
model = baseline.model
if split_layers:
    split_packed(model, split_layers)


def quality_rows(own, about, splits=("test",)):
    """Loss and metrics of a model, one row per split."""
    for split in splits:
        batches = data.batches(split, batch_size, samples=min(evaluation_samples, data.rows[split]))
        yield about | evaluate(own, batches, data.objective, data.metrics) | {"split": split}


metric, untouched, dtype = data.metric, hash_model(model), str(next(model.parameters()).dtype)
(dense,) = quality_rows(model, {})
# Training amplifies rounding, so other machines get other models.
coarse = {"loss": 0.3} | dict.fromkeys(data.metrics, 0.08 if data.headline.bounds else 0.3)
report.record(task=data.identity, rows=data.rows, metric=metric, model=untouched, dtype=dtype, baseline=baseline.origin)

# %%
variants = ["no training", "lambda = 0", *strengths]
colors = colors_of(variants)


def prepared(variant, draw, statistics):
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
linears = data.linears(model)
targeted = sum(layer.weight.numel() for layer in linears.values())
print(f"{len(linears)} targeted layers, {targeted:,} of {sum(p.numel() for p in model.parameters()):,} parameters")
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


def refined(start, steps, draw, about):
    """Quality of a truncated model after training its factors, one row per split."""
    batches = data.batches("train", prehab_batch, seed=draw + 100)
    how = Recipe(steps, prehab_batch, refine_learning_rate, 0.0, precision=precision, seed=draw)
    tune_factors(start, batches, recipe=how, loss=data.loss, progress=False)
    yield from quality_rows(start, about | {"steps_after": steps}, ("validation", "test"))


def layer_rows(sweep, statistics):
    """Spectra of the whitened weights, and how far the truncated layers are from the original weights."""
    ranks, own = sweep.ranks(Configuration("whitened"), target_keep), data.linears(sweep.model)
    for name, sigma in sweep.spectra("whitened").items():
        depth, kind = depth_and_kind(name)
        kept = sweep.factors("whitened")[name].truncate(ranks[name]).dense().to(own[name].weight)
        original = linears[name].weight
        error = output_norm(kept - original, statistics[name]) / output_norm(original, statistics[name])
        values = stable_rank(sigma), effective_rank(sigma), tail_energy(sigma, ranks[name])
        columns = ("stable_rank", "effective_rank", "tail_energy")
        about = {"layer": name, "depth": depth, "kind": kind, "distance_to_original": error, "sigma": sigma.numpy()}
        yield about | dict(zip(columns, map(float, values), strict=True))


# %%
logs, qualities, stales, layers, refinements = [], [], [], [], []
sampled = dict(samples=calibration_samples, batch_size=batch_size)
for draw, variant in itertools.product(seeds, variants):
    about = {"variant": variant, "seed": draw}
    with report.stage("calibration"):
        before = load_calibration(data, model, seed=draw, **sampled)
    with report.stage("training"):
        own, history = prepared(variant, draw, before)
    logs += [about | row for row in history]
    with report.stage("statistics"):
        batches = data.batches("train", seed=draw, **sampled)
        after = collect_statistics(own, batches, data.layers, products=torch.float64)  # as `before`
    sweep, stale = (Sweep(own, data, moments, SweepConfig(calibration_samples)) for moments in (after, before))
    with report.stage("truncation"):
        qualities += quality_rows(own, about | {"method": "whole", "keep": 1.0})
        for (method, label), keep in itertools.product({"svd": "raw", "whitened": "whitened"}.items(), keeps):
            chosen = method == "whitened" and np.isclose(keep, target_keep)
            row, splits = about | {"method": label, "keep": keep}, ("validation", "test") if chosen else ("test",)
            qualities += quality_rows(truncated(sweep, method, keep), row, splits)
        stales += quality_rows(truncated(stale, "whitened", target_keep), about | {"keep": target_keep})
    layers += [about | row for row in layer_rows(sweep, before)]
    with report.stage("refinement"):
        for later in (refine_steps, prehab_steps + refine_steps) if variant == "no training" else (refine_steps,):
            refinements += refined(truncated(sweep, "whitened", target_keep), later, draw, about)
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
unstable = ["task_loss", "gradient_ratio"]
report.table(log, "log_by_step", split="train", unstable=unstable, tolerance=0.1)
long = log.melt(["variant", "seed", "step"], ["task_loss", "penalty", "gradient_ratio", "tail_energy"])
style = dict(x="step", y="value", hue="variant", errorbar="sd", palette=colors)
grid = sns.relplot(long, kind="line", col="variable", height=2.9, aspect=1.05, facet_kws={"sharey": False}, **style)
titles = {"task_loss": "task loss", "penalty": "penalty / its start", "gradient_ratio": "gradient of penalty / of task"}
for column, axis in grid.axes_dict.items():
    axis.set_title(titles.get(column, "energy beyond the target rank"))
grid.set(xlabel="step", ylabel="")
grid.axes_dict["gradient_ratio"].set_yscale("log")
write_plain_logs(grid.axes_dict["gradient_ratio"])
report.figure(grid, "log_by_step")

# %% [markdown]
# ## What is left after truncation
#
# The table `quality_by_keep` has one row per `variant`, `seed`, `keep` and `split` for the `whole` model before truncation and
# after `whitened` truncation; only where the claims are made it has rows of validation too. `quality_by_keep_raw` has the same
# for `raw` truncation, which swings with the last digits of the training. Validation picks the penalty; test compares it.

# %%
quality = pd.DataFrame(qualities)
raw = quality.method == "raw"
report.table(quality[raw], "quality_by_keep_raw", split=None, unstable=list(coarse))
report.table(quality[~raw], "quality_by_keep", split=None, tolerance=coarse)

# %%
report.reading("quality_by_keep")

# %% [markdown]
# ## Spectra before and after, and what Eckart and Young forbid
#
# The table `ranks_by_layer`: stable, effective and tail rank of $WS$ for each layer, and `distance_to_original`, the output error
# of the truncated layer against the *original* weight on the original statistics. No penalty can bring that below the truncation
# of the original weight itself. The figure shows the spectrum of $WS$ over its largest value, mean over layers and seeds.

# %%
by_layer = pd.DataFrame(layers)
report.table(by_layer.drop(columns="sigma"), "ranks_by_layer", split="train", tolerance=0.2)
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
report.table(spectrum, "spectrum_by_index", split="train", tolerance=0.3)
drawn, axis = plt.subplots(figsize=(7, 3.8))
sns.lineplot(spectrum, x="index_share", y="sigma_share", hue="variant", palette=colors, ax=axis)
axis.set(yscale="log", ylim=(1e-4, 1.2), xlabel="index of the singular value / their number")
axis.set(ylabel=r"$\sigma_i/\sigma_1$ of WS", title=f"mean over layers and {len(seeds)} seeds")
write_plain_logs(axis)
axis.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
report.figure(drawn, "spectrum_by_index")

# %% tags=["nbval-check-output"]
same = by_layer.pivot(index=["layer", "seed"], columns="variant", values="distance_to_original")
assert (same[variants].min(axis=1) >= same["no training"] * (1 - 1e-3)).all()
print("no prepared layer is closer to the original weight than its own truncation")

# %% tags=["nbval-check-output", "after-training"]
report.reading("ranks_by_layer")

# %% [markdown]
# ## Statistics grow stale
#
# Training moves the inputs of every layer, so the moments have to be collected anew before truncation. The table
# `quality_by_statistics` sets the prepared models truncated to `target_keep` with `fresh` statistics beside the same with the
# `stale` ones of the model before training, on the same calibration samples.

# %%
columns = ["variant", "seed", "keep", "statistics", "loss", metric]
fresh = quality[(quality.method == "whitened") & np.isclose(quality.keep, target_keep) & (quality.split == "test")]
stale = pd.concat([fresh.assign(statistics="fresh"), pd.DataFrame(stales).assign(statistics="stale")])[columns]
report.table(stale, "quality_by_statistics", split="test", tolerance=coarse)

# %%
report.reading("quality_by_statistics")

# %% [markdown]
# ## Does it pay, when the steps could be spent after truncation?
#
# The table `quality_by_refinement`: whitened models at `target_keep` whose factors were trained for `steps_after` more steps.
# `all steps after` spends the whole budget of a prepared model on the factors of the untrained one. Grey: truncated only.

# %%
refinement = pd.DataFrame(refinements)
late = (refinement.variant == "no training") & (refinement.steps_after > refine_steps)
refinement.loc[late, "variant"] = "all steps after"
report.table(refinement, "quality_by_refinement", split=None, tolerance=coarse)
drawn, axis = plt.subplots(figsize=(7.5, 3.8))
order = [*variants, "all steps after"]
for table, color, label in ((fresh, "0.65", "truncated"), (refinement[refinement.split == "test"], "black", "refined")):
    style = dict(x=metric, y="variant", order=order, ax=axis)
    sns.stripplot(table, color=color, size=5, jitter=False, **style)
    sns.pointplot(table, color=color, errorbar=None, linestyle="none", marker="|", markersize=16, label=label, **style)
axis.axvline(dense[metric], ls="--", color="0.3", label="dense")
axis.set(xlabel=f"test {metric} at keep {target_keep} (dots: {len(seeds)} seeds, bars: means)", ylabel="")
axis.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
report.figure(drawn, "quality_by_refinement")

# %%
report.reading("quality_by_refinement")

# %% [markdown]
# ## What this shows
#
# Truncation after a rank penalty is to be compared with truncation after the same training without one, and at the same total
# number of steps with training after truncation. The claims say, penalty by penalty, which of the three is worth it here. A
# penalty that looks only at the singular values beyond the target rank asks for what truncation will do; one that lowers all of
# them, or the ratio to the largest, pays for more than it needs. The price is the task loss of the whole model, which rises with
# the strength: a prepared model is made for one budget. Notebook 03 compares what can be done without any training.

# %% tags=["nbval-check-output"]
report.finish()
