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
# # 05 Rank config: LoRA ranks from what fine-tuning changes
#
# **Question.** A short full fine-tuning tells in which directions each weight changes. Are LoRA ranks that are read off these
# changes better than one rank for all, at the same number of parameters?
#
# **Method.** $\Delta=W_{\text{tuned}}-W_{\text{base}}=U\Sigma V^\top$. The rank of a layer is the smallest $r$ with $\sum_{i\le
# r}\sigma_i^2\ge\tau\,\|\Delta\|_F^2$, within bounds, drawn towards the mean of its type (the published rule); or, within a
# budget of parameters, the globally largest $\sigma^2$ per parameter win (ours). Adapters as in Hu et al., LoRA,
# arXiv:2106.09685.
#
# **Expected.** A threshold is blind to scale: a layer that hardly changes, in noisy directions, gets a large rank. A budget
# should not have this fault. Whether either beats a uniform rank is open.

# %% tags=["parameters"]
set_name = "docs-llama"  # the parameter set, which names the folder of results
task = "docs_language"  # a key of lowrank.tasks.registry.TASKS
task_options = {"packages": ["sklearn"], "validation_samples": 256, "test_samples": 256}  # of what is fine-tuned on
base_options = {"packages": ["matplotlib", "numpy", "pandas", "scipy"]}  # of its base, where they differ
steps = 300  # optimiser steps of that training; 0 takes the model as it comes
batch_size = 16  # samples
learning_rate = 3e-3  # peak
weight_decay = 0.01
seed = 0
retrain = False  # train the dense baseline anew instead of loading the shipped one
precision = "fp32"  # fp32 or bf16, of all trainings
checkpoints = ""  # folder where the base and the preliminary model stay; a temporary one if empty
subset_ratio = 0.1  # share of the training samples for the preliminary fine-tuning, evenly spaced
max_samples = 1000  # at most so many of them
preliminary_batch = 1  # samples of a forward pass
accumulation = 8  # forward passes of a step
preliminary_learning_rate = 1e-3  # peak
threshold = 0.5  # tau
min_rank = 4
max_rank = 128
smoothing = 0.8  # towards the mean of the layer's type
power_of_two = False  # round ranks above 16
scaling = 2.0  # what B A is multiplied by; with rsLoRA: at the mean rank
use_rslora = False  # scaling falls with the root of the rank in every adapter, not in one variant only
head = []  # modules that are trained whole beside the adapter
quantised = ""  # 4bit or 8bit: the frozen model below adapters
gradient_checkpointing = False
tune_steps = 40  # optimiser steps of every fine-tuning
tune_batch = 4  # samples
lora_learning_rate = 1e-2  # peak, of adapters
full_learning_rate = 3e-3  # peak, of full fine-tuning
rate_factors = [0.1, 0.3, 1.0, 3.0]  # of those rates; each start gets the one that is best on validation
eva_samples = 64  # inputs for EVA
variants = []  # of those below, the ones to train; empty for all
evaluation_samples = 128  # of the test split, the first ones
seeds = [0, 1, 2, 3, 4]  # of batches, new factors and random ranks

# %%
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from torch.utils.data import Subset
from tqdm.auto import tqdm

from lowrank import RankConfig, RankRule, Recipe, add_adapter, delta_spectra, load_task
from lowrank.io.weights import hash_source
from lowrank.lora.adapters import load_adapter, load_model
from lowrank.lora.ranks import random_ranks, ranks_for_budget, uniform_ranks
from lowrank.nn.batches import device_of, move_batch
from lowrank.nn.profiling import build_training_step, peak_bytes
from lowrank.nn.targets import depth_and_kind
from lowrank.report.notebook import Report
from lowrank.report.style import write_plain_logs
from lowrank.tasks.baseline import load_baseline
from lowrank.tasks.evaluation import evaluate
from lowrank.tasks.metrics import METRICS
from lowrank.tasks.training import train
from lowrank.training.loop import Hooks

report = Report("05_rank_config", globals())

# %% [markdown]
# ## First, two changes by hand
#
# One layer changes much in one direction, the other a little in every direction. A threshold on the share of each layer's own
# energy gives the second the larger rank; a budget for both together spends nothing on it.

# %% tags=["nbval-check-output"]
changes = {"much, one direction": [5.0, 0.1, 0.1, 0.1], "little, all directions": [0.2, 0.2, 0.2, 0.2]}
by_threshold = {
    label: int((np.cumsum(np.square(sigma)) < 0.9 * np.square(sigma).sum()).sum()) + 1
    for label, sigma in changes.items()
}
largest = sorted(((value, label) for label, sigma in changes.items() for value in sigma[:1]), reverse=True)[:1]
for label in changes:
    print(
        f"{label}: rank {by_threshold[label]} by threshold .9, {sum(own == label for _, own in largest)} by a budget of one"
    )

# %% [markdown]
# ## A short full fine-tuning, on a subset
#
# The base model goes to one folder. A copy is fine-tuned whole on `subset_ratio` of the training samples, once through,
# `accumulation` forward passes to a step, and goes to another. Ranks are chosen with nothing else known of the task.

# %%
data = load_task(task, **task_options).open_test(report.freeze())
metric = data.metric
in_steps = data.headline.bounds is not None  # of a sample each, which another machine may put on the other side
# Training amplifies the last digits of another machine: relative tolerances of what is measured after it.
trained = {"loss": 0.01, metric: 0.05 if in_steps else 0.01}
folder = Path(checkpoints or tempfile.mkdtemp())
base_folder, tuned_folder = folder / "base", folder / "tuned"
with report.stage("base model"):
    options = dict(precision=precision, seed=seed)
    recipe = Recipe(steps, batch_size, learning_rate, weight_decay, **options)
    baseline = load_baseline(load_task(task, **task_options | base_options), recipe, retrain=retrain)
    baseline.model.save_pretrained(base_folder)
    model_class, origin = type(baseline.model), baseline.origin
    del baseline
report.record(task=data.identity, rows=data.rows, metric=metric, baseline=origin)


def fresh(trainable=False):
    """The base model: whole, to be trained; or frozen, below an adapter."""
    kind = "" if trainable else quantised
    model = load_model(base_folder, model_class, quantised=kind, gradient_checkpointing=gradient_checkpointing)
    return model.requires_grad_(trainable)


def quality_of(model):
    """Loss and metrics on test samples."""
    batches = data.batches("test", batch_size, samples=evaluation_samples)
    return evaluate(model, batches, data.objective, data.metrics)


# %%
samples = data.split("train")
spaced = torch.linspace(0, len(samples) - 1, max(accumulation, min(max_samples, int(subset_ratio * len(samples)))))
subset = replace(data, splits=data.splits | {"train": Subset(samples, spaced.long().tolist())})
with report.stage("preliminary fine-tuning"):
    rows, model = [{"model": "base"} | quality_of(fresh())], fresh(trainable=True)
    count = max(1, len(spaced) // (preliminary_batch * accumulation))
    options = dict(precision=precision, seed=seed, accumulation=accumulation)
    train(
        model,
        subset,
        Recipe(count, preliminary_batch, preliminary_learning_rate, weight_decay, **options),
        progress=False,
    )
    model.save_pretrained(tuned_folder)
rows.append({"model": "after the preliminary fine-tuning"} | quality_of(model))
del model
table = pd.DataFrame(rows).assign(samples=[0, len(spaced)])
report.table(table, "preliminary", split="test", tolerance=trained)

# %% [markdown]
# ## What changed, and how much of it is noise
#
# Both folders are read one tensor at a time. The table `spectrum_by_layer`: `norm` of the change and of the weight, the ranks
# that hold 50, 90 and 99 % of its energy, the effective rank, `signal_rank`, the number of singular values beyond the
# Marchenko-Pastur edge, and `status`: 'noise' where there is none.

# %%
with report.stage("spectra"):
    spectra = delta_spectra(base_folder, tuned_folder, data.layers, progress=False)
rows = pd.DataFrame([{"layer": name} | s.row for name, s in spectra.items()])
counts = dict.fromkeys(["rank_50", "rank_90", "rank_99", "signal_rank"], 0.1)  # may jump by one
close = dict.fromkeys(["norm", "effective_rank"], 0.01)
report.table(rows, "spectrum_by_layer", split=None, tolerance=counts | close)

# %% [markdown]
# The table `energy_by_rank` holds the curves of all layers: `sigma`, the singular value, its share of the largest, and the
# cumulative `energy`. The dashed line is the threshold.

# %%
curves = pd.concat(
    pd.DataFrame(
        {"layer": name, "kind": depth_and_kind(name)[1], "rank": np.arange(1, len(s.sigma) + 1), "sigma": s.sigma}
    )
    for name, s in spectra.items()
    if s.total > 0
)
by_layer = curves.groupby("layer").sigma
curves["sigma_share"] = curves.sigma / by_layer.transform("max")
curves["energy"] = (curves.sigma**2).groupby(curves.layer).cumsum() / by_layer.transform(lambda s: (s**2).sum())
report.table(curves, "energy_by_rank", split=None, tolerance=0.01)
drawn, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
style = dict(data=curves, x="rank", hue="kind", units="layer", estimator=None, lw=0.9, alpha=0.8)
sns.lineplot(y="sigma_share", ax=left, legend=False, **style)
sns.lineplot(y="energy", ax=right, **style)
left.set(yscale="log", ylim=(1e-3, 1.2), ylabel="singular value / largest")
write_plain_logs(left)
right.axhline(threshold, ls="--", color="0.3")
right.set(ylim=(0, 1.02), ylabel="cumulative energy")
right.legend(bbox_to_anchor=(1.02, 1), loc="upper left", title="layer")
report.figure(drawn, "energy_by_rank")

# %% tags=["nbval-check-output", "after-training"]
report.reading("spectrum_by_layer")

# %% [markdown]
# ## How much adapter a threshold asks for
#
# The table `size_by_threshold`: by the rule with its bounds and smoothing, `parameters` of the adapter, the same over those of
# the weights, and the share of layers `at_max`, where the threshold decides nothing. The published claim of 95 % fewer
# trainable parameters is about the threshold .9.

# %% tags=["nbval-check-output"]
bounds = dict(min_rank=min_rank, max_rank=max_rank, smoothing=smoothing, powers_of_two=power_of_two)
bounds |= {"group": lambda name: depth_and_kind(name)[1]}
rows = []
for tau in sorted({0.3, 0.5, 0.7, 0.9, 0.99, threshold}):
    found = RankConfig.from_spectra(spectra, RankRule(threshold=tau, **bounds))
    ranks = list(found.module_ranks.values())
    mean = float(np.mean(ranks))
    size = {"parameters": found.parameters, "over_weights": found.compression_ratio, "mean_rank": mean}
    rows.append({"threshold": tau} | size | {"at_max": float(np.mean([rank >= max_rank for rank in ranks]))})
sizes = pd.DataFrame(rows).set_index("threshold")
noisy = sum(s.status == "noise" for s in spectra.values())
print(
    f"{len(spectra)} layers: {noisy} whose change looks like noise, {sum(s.total == 0 for s in spectra.values())} unchanged"
)

# %%
report.table(sizes.reset_index(), "size_by_threshold", split=None, tolerance=dict.fromkeys(sizes, 0.05))

# %% tags=["nbval-check-output", "after-training"]
report.reading("size_by_threshold")

# %% [markdown]
# ## Four ways to spend the same parameters
#
# `threshold`: the rule above. Its number of parameters is the budget of the others: `budget`, the globally largest energies per
# parameter; `uniform`, one rank; `random`, shares drawn at random, anew for each seed. `lora_rank_config.json` is the file of
# the rule. The table `rank_by_layer` has the ranks (random: of the first seed) and the energy of the change that they hold.

# %%
hashes = {"base": hash_source(base_folder), "tuned": hash_source(tuned_folder)}
config = RankConfig.from_spectra(spectra, RankRule(threshold=threshold, **bounds), model=set_name, hashes=hashes)
config.save(report.folder / "lora_rank_config.json")
assert RankConfig.load(report.folder / "lora_rank_config.json") == config
budget, shapes = config.parameters, {name: s.shape for name, s in spectra.items() if s.total > 0}


def config_of(rule, draw=0):  # the ranks of one rule
    ranks = {
        "threshold": lambda: config.module_ranks,
        "budget": lambda: ranks_for_budget(spectra, budget),
        "uniform": lambda: uniform_ranks(shapes, budget),
        "one": lambda: dict.fromkeys(shapes, budget // sum(map(sum, shapes.values()))),
        "random": lambda: random_ranks(shapes, budget, torch.Generator().manual_seed(draw)),
    }[rule]()
    return RankConfig.from_ranks(spectra, ranks, {"rule": rule})


rows = [
    {"rule": rule, "layer": name, "rank": own.module_ranks.get(name, 0), "energy": row["energy"]}
    for rule in ("uniform", "random", "threshold", "budget")
    for own in [config_of(rule, seeds[0])]
    for name, row in own.modules.items()
]
ranks = pd.DataFrame(rows)
report.table(ranks, "rank_by_layer", split=None, tolerance={"rank": 0.25, "energy": 0.1})
placed = ranks[ranks.layer.isin(shapes)].join(
    pd.DataFrame([depth_and_kind(name) for name in ranks.layer], columns=["depth", "kind"], index=ranks.index)
)
rules = list(placed.rule.unique())
wide = placed.pivot(index="kind", columns=["rule", "depth"], values="rank").loc[placed.kind.unique(), rules]
drawn, axes = plt.subplots(
    1, len(rules), figsize=(2.6 * len(rules) + 1.5, 0.35 * len(wide) + 1.6), sharey=True, squeeze=False
)
for axis, rule in zip(axes.flat, rules, strict=True):
    heat = dict(vmin=0, vmax=placed["rank"].max(), cmap="viridis", cbar=rule == rules[-1], cbar_kws={"label": "rank"})
    sns.heatmap(wide[rule], ax=axis, **heat)
    axis.set(title=rule, xlabel="block", ylabel="")
drawn.tight_layout()
report.figure(drawn, "rank_by_layer")

# %% tags=["nbval-check-output", "after-training"]
report.reading("rank_by_layer")

# %% [markdown]
# ## Training with them
#
# Every variant starts from the base and is trained for `tune_steps` on the same batches, with one scaling on every module. Each
# kind of start has the learning rate that is best on validation for the first seed, see `loss_by_rate`. `rsLoRA` (Kalajdzievski,
# arXiv:2312.03732) divides by the root of the rank instead. `PiSSA` (Meng et al., arXiv:2404.02948) and `EVA` (Paischer et al.,
# arXiv:2410.07170) are peft's; EVA spreads one rank for all anew, by the inputs, and so misses the number of parameters. `warm`
# starts from the leading factors of the change itself, and so has seen the subset before. `full` trains all weights. The table
# `quality_by_variant`: one row per variant and seed; `step_ms` is a median over its steps.

# %%
VARIANTS = {  # name -> rule, start, further options
    "uniform": ("uniform", "zero", {}),
    "random": ("random", "zero", {}),
    "threshold": ("threshold", "zero", {}),
    "budget": ("budget", "zero", {}),
    "threshold, rsLoRA": ("threshold", "zero", {"use_rslora": True}),
    "PiSSA": ("uniform", "pissa", {}),
    "EVA": ("one", "eva", {}),
    "uniform, warm": ("uniform", "warm", {}),
    "threshold, warm": ("threshold", "warm", {}),
    "budget, warm": ("budget", "warm", {}),
}
chosen = [name for name in (*VARIANTS, "full") if not variants or name in variants]


# %%
def adapted(name, draw):
    """The base model with the adapter of a variant."""
    rule, start, options = VARIANTS[name]
    options = {"use_rslora": use_rslora} | options
    size = (
        {"lora_alpha": scaling * np.mean(list(config.module_ranks.values())) ** 0.5}
        if options["use_rslora"]
        else {"scaling": scaling}
    )
    inputs = data.batches("train", tune_batch, samples=eva_samples, seed=draw) if start == "eva" else ()
    sources = dict(base=base_folder, tuned=tuned_folder, batches=inputs)
    return add_adapter(
        fresh(),
        config_of(rule, draw),
        start=start,
        seed=draw,
        modules_to_save=head or None,
        **sources,
        **options,
        **size,
    )


def tune(model, name, draw, factor):
    """Trains what is trainable; the times of its steps in ms."""
    rate = factor * (full_learning_rate if name == "full" else lora_learning_rate)
    clock = [time.perf_counter()]
    recipe = Recipe(tune_steps, tune_batch, rate, 0.0, precision=precision, seed=draw)
    hooks = Hooks(after_step=lambda _: bool(clock.append(time.perf_counter())))
    train(model, data, recipe, hooks=hooks, progress=False)
    return 1e3 * np.diff(clock)


# %%
def memory_of(model):
    """Bytes of a training step: weights, the optimiser's state, and the most that is held beyond them."""
    batch = move_batch(next(iter(data.batches("train", tune_batch))), device_of(model))
    step, held = build_training_step(model, lambda own: data.loss(own, batch), precision=precision)
    return held + peak_bytes(step, device_of(model))


def start_of(name):
    """The kind of start, which decides the learning rate."""
    return "full" if name == "full" else VARIANTS[name][1]


def made(name, draw):
    return fresh(trainable=True) if name == "full" else adapted(name, draw)


# %%
tried = {start_of(name): name for name in reversed(chosen)}  # the first variant of each kind of start
rows = []
with report.stage("learning rates"):
    for (start, name), factor in itertools.product(tried.items(), rate_factors):
        model = made(name, seeds[0])
        tune(model, name, seeds[0], factor)
        batches = data.batches("validation", batch_size, samples=evaluation_samples)
        loss = evaluate(model, batches, data.objective)["loss"]
        rows.append({"start": start, "variant": name, "factor": factor, "loss": loss})
rates = pd.DataFrame(rows)
report.table(rates, "loss_by_rate", split="validation", tolerance={"loss": 0.05})
factors = rates.loc[rates.groupby("start").loss.idxmin()].set_index("start").factor
print(f"factors of the learning rate, picked on validation: {factors.to_dict()}")

# %%
results = [{"variant": "base", "seed": seed, "trainable": 0} | quality_of(fresh())]
memory, kept = {}, {}
for name, draw in tqdm([(name, draw) for draw in seeds for name in chosen], "fine-tunings"):
    with report.stage(name):
        model = made(name, draw)
        times = tune(model, name, draw, factors[start_of(name)])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    about = {"variant": name, "seed": draw, "trainable": trainable, "step_ms": np.median(times)}
    results.append(about | quality_of(model))
    if draw == seeds[0]:
        if name in ("uniform", "budget"):
            model.save_pretrained(folder / name)
            kept[name] = results[-1]["loss"]
        memory[name] = memory_of(model)
    del model
quality = pd.DataFrame(results)
close = trained | {"trainable": 0.01}
report.table(quality, "quality_by_variant", split="test", measured=["step_ms"], tolerance=close)

# %% [markdown]
# The table `comparison`: mean and standard deviation over seeds of the test metric, trainable parameters, `step_ms`, the
# least of the seeds' medians, as a machine may be busy with other things, and `memory_mb` of a training step: weights, the
# optimiser's state and the most that is held beyond them.

# %%
table = quality.groupby("variant", sort=False).agg(
    mean=(metric, "mean"),
    std=(metric, "std"),
    loss=("loss", "mean"),
    trainable=("trainable", "mean"),
    step_ms=("step_ms", "min"),
)
table["memory_mb"] = pd.Series({name: peak / 1e6 for name, peak in memory.items()})
report.table(
    table.reset_index(),
    "comparison",
    split="test",
    measured=["step_ms", "memory_mb"],
    unstable=["std"],
    tolerance={"mean": trained[metric], "loss": trained["loss"], "trainable": 0.01},
)

# %%
if {"full", "threshold"} <= set(chosen):
    report.reading("comparison")

# %% [markdown]
# Variants of one seed see the same batches, so they are compared seed by seed. The table `gain_by_variant`: one row per variant
# and seed, `gain`, the test metric minus that of uniform ranks, signed so that more is better; in the loss where the metric has
# no bounds, as perplexity has none. Claims judge the mean of such differences over the seeds.

# %%
measure = "loss" if data.headline.bounds is None else metric
signed = quality.assign(score=METRICS[measure].sign * quality[measure])
score = signed[signed.variant != "base"].pivot(index="seed", columns="variant", values="score")[chosen]
gains = score.sub(score["uniform"], axis=0).drop(columns="uniform")
gains = gains.melt(ignore_index=False, value_name="gain").reset_index()[["variant", "seed", "gain"]]
report.table(gains, "gain_by_variant", split="test", unstable=["gain"] if in_steps else [], tolerance={"gain": 0.05})
drawn, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
style = dict(x="gain", y="variant", order=[name for name in chosen if name != "uniform"], color="black", ax=axis)
sns.stripplot(gains, size=4, jitter=False, **style)
sns.pointplot(gains, errorbar=None, linestyle="none", marker="|", markersize=16, **style)
axis.axvline(0, ls="--", color="0.3")
axis.set(xlabel=f"gain in test {measure} over uniform ranks (dots: {len(seeds)} seeds, bars: means)", ylabel="")
report.figure(drawn, "gain_by_variant")

# %%
report.reading("gain_by_variant")

# %% tags=["nbval-check-output"]
sizes = quality.groupby("variant").trainable.max()
assert max(sizes["uniform"], sizes["random"], sizes["budget"]) <= sizes["threshold"]
print(f"{len(chosen)} variants; none that is compared by its ranks has more parameters than `threshold`")

# %% [markdown]
# ## Saved, reloaded, swapped
#
# Two adapters were saved beside the base. Both are loaded into one model, where a word switches between them.

# %% tags=["nbval-check-output"]
names = list(kept)
model = fresh()
for name in names:
    model = load_adapter(model, folder / name, name)
for name in (*names, *names):
    model.set_adapter(name)
    again = quality_of(model)["loss"]
    assert np.isclose(again, kept[name], rtol=1e-5), (name, again, kept[name])
with model.disable_adapter():
    assert np.isclose(quality_of(model)["loss"], results[0]["loss"], rtol=1e-5)
print(f"{len(names)} adapters reloaded and swapped, with the losses they had; without an adapter that of the base")

# %% [markdown]
# ## What this shows
#
# A short fine-tuning with AdamW changes every direction of a weight a little, so that a high threshold on energy asks for a
# large share of the full rank; it measures the shape of a spectrum and not how much a layer changed. A budget does, and drops
# what hardly changes. Whether that pays is what the claims say, at one size of adapter and a training that is short: they do not
# say what longer trainings give. A warm start is no fair rival of a cold one, having seen the subset; it
# is fair among warm ones. Notebook 06 looks at the spectra of the weights themselves.

# %% tags=["nbval-check-output"]
report.finish()
