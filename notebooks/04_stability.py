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
# # 04 Stability: do the bases of weights settle, and can they be fixed?
#
# **Question.** Does the orthogonal basis of each weight stand still early in training while its mixing goes on? If so, can the
# bases be fixed, and only the small mixing matrix be trained?
#
# **Method.** $W=U\Sigma V^\top$ has the basis $Q=UV^\top$; *Stability* is $\operatorname{tr}(Q_1^\top Q_2)/n$ of one checkpoint
# and the next. OIALR trains at full rank first, then only $S$ in $W=USV^\top$, turns the bases into singular vectors again from
# time to time, and cuts singular values below $\beta\,\sigma_0$. Coquelin et al., arXiv:2401.08505.
#
# **Expected.** As published, stability falls during warm-up and then rises to 1. A falling learning rate alone would do that,
# so the control is the same training at a constant rate.

# %% tags=["parameters"]
set_name = "digits-vit"  # the parameter set, which names the folder of results
task = "digits"  # a key of lowrank.tasks.registry.TASKS
task_options = {}  # options of that task's load function
epochs = 42  # passes over the training samples, each of whole batches
batch_size = 64  # samples
learning_rate = 4e-3  # peak
weight_decay = 0.05
warmup = 0.1  # share of the steps
decay_power = 1.0  # k of the cosine
floor = 0.0  # share of the peak where the cosine ends and the warm-up starts
clip = 1.0  # norm of the gradients
label_smoothing = 0.0
precision = "fp32"  # fp32 or bf16
workers = 0  # processes that load data
seeds = [0, 1, 2, 3, 4]  # of weights, batches and dropout
control_seeds = [0, 1, 2, 3, 4]  # of the trainings at a constant rate
look_every = 3  # epochs between checkpoints of the bases and of validation
evaluation_samples = 450  # of validation and of test, the first ones, at most
split_layers = []  # packed layers that are split into q, k and v first
exclude = ["head", "patch_embed.*"]  # layers that OIALR leaves dense
delay = 252  # optimiser steps at full rank
frequency = 63  # optimiser steps between refreshes
sigma_cutoff = 0.2  # beta: smaller singular values, relative to the largest, are cut
minimum = 0.01  # share of the full rank below which no cut goes
coverage = 0.0  # share of the layers that each check adds, the last ones first; 0: all at once

# %%
import copy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from lowrank import OIALR, BasisMonitor, OIALRConfig, Recipe, allocate_ranks, load_task, replace_layers, split_packed
from lowrank.nn.batches import compute_logits, device_of, get_labels, move_batch
from lowrank.nn.profiling import build_training_step, peak_bytes, time_in_turns
from lowrank.report.notebook import Report
from lowrank.report.style import colors_of
from lowrank.tasks.evaluation import evaluate
from lowrank.tasks.training import train
from lowrank.training.loop import Hooks, seed_everything
from lowrank.training.stability import basis_stability, mixing_similarity

report = Report("04_stability", globals())

# %% [markdown]
# ## First, three steps of a weight by hand
#
# Scaling a weight and mixing its columns by a symmetric matrix leave the basis where it was; a rotation turns it. Stability is 1
# for the first two.

# %% tags=["nbval-check-output"]
weight = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
mix = torch.tensor([[2.0, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 3]], dtype=torch.float64)
angle = torch.tensor(0.5, dtype=torch.float64)
turn = torch.eye(6, dtype=torch.float64)
turn[:2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
for label, later in {"doubled": 2 * weight, "mixed": weight @ mix, "turned": turn @ weight}.items():
    print(
        f"{label}: stability {basis_stability(weight, later):.3f}, P similarity {mixing_similarity(weight, later, 'polar'):.3f}"
    )

# %% [markdown]
# ## One loop, four kinds of training
#
# `dense` and `constant rate` are watched: every `look_every` epochs each weight's basis and mixing are compared with the one
# before. `OIALR` is the same training as `dense`, converted on the way. `static low rank` has two trained factors per layer from
# the first step on, one share for all layers, and stores as much as OIALR does at its end. Checkpoints during training are on
# validation; test is measured once, after the last step.

# %%
data = load_task(task, **task_options).open_test(report.freeze())
per_epoch = len(data.split("train")) // batch_size
metric = data.metric
report.record(task=data.identity, rows=data.rows, metric=metric, steps_per_epoch=per_epoch)


def fresh(seed):
    """An untrained model, the same for every kind of training."""
    seed_everything(seed)
    model = data.make_model()
    if split_layers:
        split_packed(model, split_layers)
    return model


def loss(model, batch):
    return cross_entropy(compute_logits(model, batch), get_labels(batch), label_smoothing=label_smoothing)


# %%
def quality_on(split, model):
    """Loss and metrics of a model on the first samples of a split."""
    batches = data.batches(split, batch_size, samples=min(evaluation_samples, data.rows[split]))
    return evaluate(model, batches, data.objective, data.metrics) | {"split": split}


def trained(model, variant, seed, method=None):
    """Trains a model in one of the ways: quality at every look and at the end, and what the monitor saw."""
    options = dict(warmup=warmup, decay_power=decay_power, floor=floor, clip=clip, precision=precision, workers=workers)
    decay = "constant" if variant == "constant rate" else "cosine"
    recipe = Recipe(epochs * per_epoch, batch_size, learning_rate, weight_decay, decay=decay, seed=seed, **options)
    monitor = BasisMonitor(look_every * per_epoch, progress=False)
    watched = variant in ("dense", "constant rate")
    rows, done, about = [], 0, {"variant": variant, "seed": seed}

    def after_step(optimizer):
        nonlocal done
        done += 1
        changed = method.step(optimizer) if method else False
        if watched:
            monitor.step(model)
        if done % (look_every * per_epoch) == 0:
            rate = optimizer.param_groups[0]["lr"] / learning_rate
            rows.append(about | {"epoch": done // per_epoch, "rate": rate} | quality_on("validation", model))
        return changed

    if watched:
        monitor.check(model)
    train(model, data, recipe, loss=loss, hooks=Hooks(after_step=after_step), progress=False)
    rows.append(about | {"epoch": epochs, "rate": np.nan} | quality_on("test", model))
    return rows, [about | row for row in monitor.history]


# %%
def static_ranks(method):
    """Ranks of two factors, one share for all layers, that together store what U, S and V of all layers do."""
    shapes = {name: shape for name, shape in method.layers.items() if len(shape) == 2}
    stored = sum(
        rank * (sum(shape) + rank) for name, shape in shapes.items() for rank in [method.ranks.get(name, min(shape))]
    )
    keep = stored / sum(out * inputs for out, inputs in shapes.values())
    ranks = allocate_ranks(shapes, min(keep, 1.0), floor=0.0)
    return {name: rank for name, rank in ranks.items() if rank * sum(shapes[name]) < shapes[name][0] * shapes[name][1]}


qualities, looks, histories, sizes, finals, converted = [], [], [], [], {}, None
runs = [(kind, seed) for seed in seeds for kind in ("dense", "constant rate", "OIALR", "static low rank")]
runs = [(kind, seed) for kind, seed in runs if kind != "constant rate" or seed in control_seeds]
for variant, seed in tqdm(runs, "trainings"):
    model, method = fresh(seed), None
    with report.stage(variant):
        if variant == "OIALR":
            cuts = dict(sigma_cutoff=sigma_cutoff, minimum=minimum, coverage=coverage)
            method = OIALR(model, OIALRConfig(delay, frequency, **cuts), exclude=exclude)
        elif variant == "static low rank" and (fitting := static_ranks(converted)):
            replace_layers(model, fitting, "svd")  # nothing fits where OIALR has cut too little to store less
        found, seen = trained(model, variant, seed, method)
    qualities, looks = qualities + found, looks + seen
    stored = trainable = sum(p.numel() for p in model.parameters())
    if method:
        converted = method
        histories += [{"seed": seed} | row for row in method.history]
        stored, trainable = method.parameter_counts()["stored"], method.parameter_counts()["trainable"]
    dense = sum(p.numel() for p in fresh(seed).parameters())
    sizes.append({"variant": variant, "seed": seed, "trainable": trainable, "stored": stored, "dense": dense})
    if seed == seeds[0] and variant != "constant rate":
        finals[variant] = model

# %% tags=["nbval-check-output"]
print(
    f"{len(converted.layers)} layers converted, {len(converted.skipped)} skipped for a reason, {per_epoch} steps per epoch"
)

# %% [markdown]
# ## The bases settle; so does the learning rate
#
# The table `stability_by_layer` has one row per variant, seed, epoch and layer: `stability`, `r_similarity`, `p_similarity`
# against the checkpoint before, `effective_rank`, `smallest_over_largest` singular value, and `masked`, why a value is missing:
# the basis of a rank deficient weight is not determined by the weight. Means over seeds.

# %%
bases = pd.DataFrame(looks)
bases.insert(2, "epoch", bases.pop("step") // per_epoch)
# A weight close to a rank deficiency is masked on one machine and not on another.
undetermined = ["stability", "r_similarity", "smallest_over_largest", "masked"]
report.table(bases, "stability_by_layer", split=None, unstable=undetermined, tolerance=0.2)
compared = bases[bases.epoch > 0]
count = compared.layer.nunique()
drawn, axes = plt.subplots(1, 2, figsize=(12, 1.6 + 0.24 * count), sharey=True, layout="constrained")
for axis, (variant, own) in zip(axes, compared.groupby("variant", sort=False), strict=True):
    grid = own.pivot_table(index="layer", columns="epoch", values="stability", sort=False)
    lowest = min(0.8, np.floor(compared.stability.min() * 10) / 10)
    sns.heatmap(
        grid, ax=axis, vmin=lowest, vmax=1, cmap="viridis", cbar=axis is axes[1], cbar_kws={"label": "stability"}
    )
    axis.set(title={"dense": "decaying rate"}.get(variant, variant), ylabel="", xlabel="epoch")
report.figure(drawn, "stability_by_layer")

# %% tags=["nbval-check-output", "after-training"]
print(f"{int((compared.masked != '').sum())} of {len(compared)} values masked as rank deficient")
report.reading("stability_by_layer")

# %% [markdown]
# The table `stability_by_epoch`: mean over layers, then mean and standard deviation over seeds, beside the `rate` as a share of
# its peak. The dots are what the paper's figures show for ViT-B/16 on ImageNet (read off, to .01; 5 of 100 epochs apart),
# placed by the share of the training that is done.

# %%
published = pd.DataFrame({"done": [0.05, 0.1, 0.2, 0.5, 1.0], "stability": [0.87, 0.755, 0.82, 0.94, 1.0]})
quality = pd.DataFrame(qualities)
validated, tested = quality[quality.split == "validation"], quality[quality.split == "test"]
means = compared.groupby(["variant", "seed", "epoch"], sort=False)[["stability", "r_similarity", "p_similarity"]].mean()
curve = means.groupby(["variant", "epoch"], sort=False).stability.agg(["mean", "std"]).reset_index()
curve = curve.merge(validated.groupby(["variant", "epoch"]).rate.first().reset_index())
report.table(curve, "stability_by_epoch", split=None, rows=2 * epochs, unstable=["std"], tolerance={"mean": 0.05})
drawn, (upper, lower) = plt.subplots(2, figsize=(7.5, 5), sharex=True, height_ratios=[3, 1], layout="constrained")
for variant, own in curve.groupby("variant", sort=False):
    label, color = {"dense": "decaying rate"}.get(variant, variant), colors_of([variant])[variant]
    upper.plot(own.epoch, own["mean"], color=color, label=f"{label}, measured here")
    one = means.xs(variant).stability.reset_index()
    upper.scatter(one.epoch, one.stability, color=color, s=10)
    lower.plot(own.epoch, own.rate, marker="o", color=color)
upper.scatter(
    published.done * epochs, published.stability, color="0.3", marker="D", label="ViT-B/16 on ImageNet, published"
)
upper.set(ylabel="mean stability", title=f"dots: {len(seeds)} and {len(control_seeds)} seeds, lines: their means")
upper.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
lower.set(xlabel="epoch", ylabel="rate / peak")
report.figure(drawn, "stability_by_epoch")

# %% tags=["nbval-check-output", "after-training"]
report.reading("stability_by_epoch")

# %% [markdown]
# ## What mixes the bases
#
# Two similarities, by our own definition (none was published): of $R$ of the QR decomposition and of $P=V\Sigma V^\top$, one
# minus the Euclidean distance over the sum of both norms. They do not start from 0: `r_floor` and `p_floor` are their values for
# independent Gaussian weights of the same shapes. The table `similarity_by_epoch` has both, with the mean effective rank over the
# full one.

# %%
shapes = {row.layer: None for row in bases.itertuples()}
weights = dict(fresh(seeds[0]).named_parameters())
generator = torch.Generator().manual_seed(0)
floors = {}
for kind in ("qr", "polar"):
    own = [weights.get(f"{name}.weight", weights.get(f"{name}_weight")) for name in shapes]
    pairs = [[torch.randn(weight.shape, generator=generator) for _ in range(2)] for weight in own]
    floors[kind] = float(np.mean([mixing_similarity(*pair, kind) for pair in pairs]))
full = {name: min(len(w), w[0].numel()) for name, w in zip(shapes, own, strict=True)}
mixing = means.groupby(["variant", "epoch"], sort=False)[["r_similarity", "p_similarity"]].mean().reset_index()
shares = compared.assign(share=compared.effective_rank / compared.layer.map(full)).groupby(["variant", "epoch"]).share
mixing = mixing.merge(shares.mean().rename("effective_rank_share").reset_index())
mixing = mixing.assign(r_floor=floors["qr"], p_floor=floors["polar"])
report.table(mixing, "similarity_by_epoch", split=None, rows=2 * epochs, tolerance=0.05)

# %% tags=["nbval-check-output", "after-training"]
report.reading("similarity_by_epoch")

# %% [markdown]
# ## Ranks fall once the bases are fixed
#
# The table `rank_by_epoch` has one row per seed, check and layer: the `rank` after the check, its share of the full rank, and
# `discarded`, the Frobenius norm that the cut took from the weight.

# %%
ranks = pd.DataFrame(histories)
ranks = ranks.assign(epoch=ranks.step / per_epoch, rank_share=ranks["rank"] / ranks.full_rank)
start = ranks.drop_duplicates(["seed", "layer"]).assign(epoch=0.0, rank_share=1.0, discarded=0.0)
start["rank"] = start.full_rank
ranks = pd.concat([start, ranks])
columns = ["seed", "epoch", "layer", "rank", "rank_share", "discarded"]
within = {"rank": 0.3, "rank_share": 0.3}
report.table(ranks[columns], "rank_by_epoch", split=None, unstable=["discarded"], tolerance=within)
short = ranks.assign(
    kind=ranks.layer.str.replace(r"^.*\.\d+\.", "", regex=True), run=ranks.layer + ranks.seed.astype(str)
)
drawn, axis = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
style = dict(x="epoch", y="rank_share", hue="kind", ax=axis)
sns.lineplot(short, units="run", estimator=None, drawstyle="steps-post", lw=0.7, alpha=0.5, legend=False, **style)
sns.lineplot(short, errorbar=None, lw=2.5, drawstyle="steps-post", **style)
axis.set(ylim=(0, 1.05), ylabel="rank / full rank")
axis.legend(bbox_to_anchor=(1.02, 1), loc="upper left", title="layer (bold: mean)")
report.figure(drawn, "rank_by_epoch")

# %%
report.reading("rank_by_epoch")

# %% [markdown]
# ## The comparison
#
# The table `quality_by_epoch`: loss and metric of every checkpoint on validation, and of the last model on test. The figure shows
# validation; a line per seed, and the dotted line is the conversion.

# %%
report.table(quality, "quality_by_epoch", split=None, unstable=["loss", *data.metrics])
drawn, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
palette = colors_of(validated.variant)
sns.lineplot(
    validated, x="epoch", y=metric, hue="variant", units="seed", estimator=None, lw=1, palette=palette, ax=axis
)
axis.axvline(delay / per_epoch, ls=":", color="0.3", label="conversion")
low = validated[validated.epoch >= delay / per_epoch][metric].min()
axis.set(ylim=(max(0, low - 0.1), 1 if data.headline.bounds else None), ylabel=f"validation {metric}")
axis.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
report.figure(drawn, "quality_by_epoch")

# %% [markdown]
# A step of the final models is timed with all of them in turn, on one batch: forward, backward, clipping, AdamW. `step_ms`:
# median; `memory_mb`: weights, bases, the optimiser's state, and the most that a step holds beyond them. Three sizes, never one
# for another: `trainable` parameters, those `stored` (with the fixed bases), those of the `dense` model.


# %%
with report.stage("step time"):
    batch = move_batch(next(iter(data.batches("train", batch_size))), device_of(finals["dense"]))
    options = dict(clip=clip, precision=precision)
    steps = {
        variant: build_training_step(copy.deepcopy(model), lambda own: loss(own, batch), **options)
        for variant, model in finals.items()
    }
    device = device_of(finals["dense"])
    times = time_in_turns({variant: step for variant, (step, _) in steps.items()}, repeats=20, device=device)
    peaks = {variant: peak_bytes(step, device) + held for variant, (step, held) in steps.items()}
final = tested.groupby("variant", sort=False)[metric].agg(["mean", "std"])
counts = pd.DataFrame(sizes)
counts = counts.assign(trainable_share=counts.trainable / counts.dense, stored_share=counts.stored / counts.dense)
table = counts.drop(columns="seed").groupby("variant", sort=False).mean()
table = final.rename(columns={"mean": metric, "std": "std"}).join(table)
table["step_ms"] = pd.Series({variant: 1e3 * np.median(own) for variant, own in times.items()})
table["memory_mb"] = pd.Series({variant: peak / 1e6 for variant, peak in peaks.items()})
varying = dict(measured=["step_ms", "memory_mb"], unstable=["std"], tolerance=0.05)
report.table(table.reset_index(), "comparison", split="test", **varying)

# %% tags=["nbval-check-output", "after-training"]
report.reading("comparison")

# %% [markdown]
# ## What this shows
#
# Stability is a statement about one checkpoint and the next, so whatever makes weights move less raises it: how much of the rise
# remains at a constant rate is what the bases themselves do. Whether the bases can be fixed is another question, and the metric
# answers it. Few trainable parameters are no small model: at full rank the two bases are stored beside $S$, and only the cuts
# bring the stored size down. How far the ranks fall depends on $\beta$ and on the shape of the spectra, and no cut is ever
# taken back. Notebook 05 looks at weight changes instead of weights.

# %% tags=["nbval-check-output"]
report.finish()
