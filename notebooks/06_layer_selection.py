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
# # 06 Layer selection: which layers matter, and who gets them
#
# **Question.** Do the spectra of the weights alone tell which layers can be pruned, or truncated, and which should be kept? And
# what does an exact assignment of layers to devices with budgets gain over the published one?
#
# **Method.** The tail of the eigenvalues of $W^\top W$ is fitted by a power law $\lambda^{-\alpha}$; a larger $\alpha$ is taken
# for a less trained layer, to be pruned more: $t\in[1-\varepsilon,1+\varepsilon]$ linear in $\alpha$, ratio $\propto t$ at a
# given sparsity (Lu et al., AlphaPruning, arXiv:2410.10912). Each device (the published code says verifier) takes one run of
# neighbouring layers that it can pay; the total value is to be as large as can be.
#
# **Expected.** The exact assignment never loses. Whether a score from $\alpha$ finds the layers that count is open.

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
retrain = False  # train the dense baseline anew instead of loading the shipped one
more_seeds = [1, 2, 3, 4]  # of further dense models that are pruned and truncated alike
also_scored = []  # folders or Hub names of safetensors files, drawn beside the model
metrics = ["alpha_peak", "alpha_mid", "alpha", "hill", "stable_rank", "entropy", "log_norm", "alpha_weighted"]
metric_of_ratios = "alpha_peak"  # what ratios and significance are made of
window = "published"  # of alpha_peak: published or corrected
epsilon = 0.3  # spread of the ratios
mapping = "block_wise"  # block_wise or layer_wise
sparsity = 0.7  # of the scores that are saved
cases = 100  # of budgets
devices = 3
budget_low = 0.15  # share of the model that the devices of a case can pay together
budget_high = 0.35
judged_cases = 10  # of these cases, spread over the strategies, those judged by the metric of the model
judged_sparsity = 0.6  # of the whole, where the selected layers stay dense
calibration_samples = 512  # of the training split
sparsities = [0.5, 0.6, 0.7, 0.8, 0.9]
keeps = [0.5, 0.3, 0.2, 0.1]  # kept share of the targeted parameters, of the low-rank twin
evaluation_samples = 450  # of the test split, the first ones
in_memory = True  # keep the float64 factors of all layers at full rank; without, no ranks by spectra

# %%
import copy
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from tqdm.auto import tqdm

from lowrank import (
    Configuration,
    Recipe,
    ScoringConfig,
    assign_layers,
    layer_scores,
    load_task,
    parameter_counts,
    prune,
)
from lowrank.compression.pruning import PRUNING_METHODS
from lowrank.factorization.rank_allocation import rank_for_keep
from lowrank.io.hashing import hash_model
from lowrank.nn.targets import split_block
from lowrank.report.notebook import Report
from lowrank.report.style import colors_of, mark_data, write_plain_logs
from lowrank.selection.assignment import total_value
from lowrank.selection.esd import eigenvalues, esd_metrics
from lowrank.selection.objectives import ASSIGNMENT_OBJECTIVES, budget_cases
from lowrank.selection.pruning_ratios import pruning_ratios
from lowrank.tasks.baseline import load_baseline, load_calibration
from lowrank.tasks.evaluation import evaluate
from lowrank.tasks.metrics import METRICS
from lowrank.tasks.sweep import Sweep, SweepConfig
from lowrank.training.loop import seed_everything

report = Report("06_layer_selection", globals())

# %% [markdown]
# ## First, an assignment by hand
#
# Four layers that cost 2 each, worth 9, 1, 5 and 4, and two devices that can pay 4 and 2. In the given order the first device
# must take layers in front of the second's. In any order the small one takes the first layer, and the large one the last two.

# %% tags=["nbval-check-output"]
for budgets in ([4, 2], [2, 4]):
    taken = {order: assign_layers([9, 1, 5, 4], [2, 2, 2, 2], budgets, order).total for order in ("fixed", "free")}
    print(f"budgets {budgets}: {taken['fixed']:g} in the given order, {taken['free']:g} in any")

# %% [markdown]
# ## Scores of every layer
#
# The table `score_by_layer`: one row per layer, its block and kind, the metrics, the share to prune, and significance, 1 minus
# that share. `*_scores.json` is the file in the published schema.

# %%
data = load_task(task, **task_options).open_test(report.freeze())
recipe = Recipe(steps, batch_size, learning_rate, weight_decay, precision=precision, seed=seed)
with report.stage("dense baseline"):
    baseline = load_baseline(data, recipe, retrain=retrain)
model = baseline.model
report.record(task=data.identity, rows=data.rows, metric=data.metric, baseline=baseline.origin, model=hash_model(model))
scoring = ScoringConfig(window=window, mapping=mapping, sparsity=sparsity, epsilon=epsilon)
with report.stage("scores"):
    scores = layer_scores(model, metric_of_ratios, scoring, layers=data.layers, name=set_name, progress=False)
scores.save(report.folder / f"{set_name}_scores.json")
weights = {name: model.get_submodule(name).weight.detach() for name in scores.names}
blocks = {row["name"]: row["block"] for row in scores.layers}
depths = {block: depth for depth, block in enumerate(dict.fromkeys(blocks.values()))}
rows = []
for row in scores.layers:
    name = row["name"]
    found = esd_metrics(weights[name], window)
    about = {"layer": name, "depth": depths[blocks[name]], "kind": split_block(name)[1]}
    about |= {"parameters": row["num_parameters"], "status": row["status"]} | {key: found[key] for key in metrics}
    rows.append(about | {"pruning_ratio": row["pruning_ratio"], "significance": row["significance_score"]})
table = pd.DataFrame(rows)
report.table(table, "score_by_layer", split=None)
drawn, axis = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
sns.lineplot(table, x="depth", y=metric_of_ratios, hue="kind", marker="o", ax=axis)
axis.set(xlabel="block", ylabel="exponent of the tail")
mark_data(axis, table.depth)
axis.legend(bbox_to_anchor=(1.02, 1), loc="upper left", title="layer")
report.figure(drawn, "score_by_layer")

# %% tags=["nbval-check-output"]
report.reading("score_by_layer")

# %% [markdown]
# ## Several models
#
# The same metric of the model before its training here, and of those in `also_scored`, read from their files matrix by matrix.
# The table `score_by_model`: one row per model and layer; `place` runs from the first block, 0, to the last, 1.

# %%
seed_everything(seed)
sources = ({"before training": data.make_model()} if steps else {}) | {name: name for name in also_scored}
own = "trained" if steps else "as it comes"
parts = [table.assign(model=own)[["model", "layer", "depth", metric_of_ratios]]]
with report.stage("scores of others"):
    for name, source in sources.items():
        found = layer_scores(source, metric_of_ratios, replace(scoring, missing="median"), progress=False)
        places = {block: depth for depth, block in enumerate(dict.fromkeys(row["block"] for row in found.layers))}
        rows = [(name, row["name"], places[row["block"]], row["raw_metric"]) for row in found.layers]
        parts.append(pd.DataFrame(rows, columns=parts[0].columns))
models = pd.concat(parts)
models["place"] = models.depth / models.groupby("model").depth.transform("max").clip(lower=1)
report.table(models, "score_by_model", split=None)

# %% tags=["nbval-check-output"]
for name, mean in models.groupby("model", sort=False)[metric_of_ratios].mean().items():
    print(f"{name}: mean exponent {mean:.3g}")

# %% [markdown]
# ## The spectra, and how the metrics agree
#
# The table `spectrum_by_layer` has the eigenvalues of four layers, from the least exponent to the greatest; `above` is the
# share of eigenvalues at least as large, `fitted` the power law of the tail that was found. The table `metric_by_metric`:
# Spearman's rank correlation of the metrics over all layers.

# %%
ranked = table.sort_values("alpha").layer.tolist()
parts = []
for name in dict.fromkeys(ranked[round(i * (len(ranked) - 1) / 3)] for i in range(4)):
    values, found = eigenvalues(weights[name]).numpy(), esd_metrics(weights[name], window)
    above = 1 - np.arange(len(values)) / len(values)
    start = int(np.searchsorted(values, found["alpha_xmin"] * (1 - 1e-12)))
    fitted = np.where(values >= values[start], above[start] * (values / values[start]) ** (1 - found["alpha"]), np.nan)
    parts.append(
        pd.DataFrame({"layer": name, "eigenvalue": values, "above": above, "fitted": fitted, "alpha": found["alpha"]})
    )
spectrum = pd.concat(parts)
report.table(spectrum, "spectrum_by_layer", split=None)
drawn, axes = plt.subplots(1, len(parts), figsize=(13, 3.4), sharey=True, layout="constrained")
for axis, part in zip(axes, parts, strict=True):
    axis.loglog(part.eigenvalue, part.above, ".", ms=3, label="measured")
    axis.loglog(part.eigenvalue, part.fitted, label=f"tail, alpha {part.alpha.iloc[0]:.2f}")
    axis.set(title=part.layer.iloc[0], xlabel="eigenvalue", ylim=(0.5 / len(part), 1.5))
    axis.title.set_fontsize(10)
    axis.legend(fontsize=9)
    write_plain_logs(axis)
axes[0].set_ylabel("share at least as large")
report.figure(drawn, "spectrum_by_layer")

# %%
correlation = table[metrics].corr("spearman")
report.table(correlation.rename_axis("metric").reset_index(), "metric_by_metric", split=None)

# %% tags=["nbval-check-output"]
print(f"{len(scores.layers)} layers in {table.depth.nunique()} blocks, {sum(scores.costs):,} parameters")
print(f"{(table.status == 'ok').sum()} of {len(table)} fits without remark")

# %% [markdown]
# ## Runs of layers for devices with budgets
#
# `cases` budgets by five strategies, each against the model's own total. The table `value_by_case`: the value that is taken in
# `free` order of the devices (exact), in the `fixed` order in which the budgets come (exact, too), and by the `best single`
# device. Of equal budgets either order takes the same.

# %%
drawn_cases = budget_cases(sum(scores.costs), cases=cases, devices=devices, low=budget_low, high=budget_high)
rows, taken = [], {}
with report.stage("assignment"):
    for case in drawn_cases:
        budgets, number = case["budgets"], case["case_id"]
        free, fixed = (assign_layers(scores.values, scores.costs, budgets, order) for order in ("free", "fixed"))
        single = max(assign_layers(scores.values, scores.costs, [budget]).total for budget in budgets)
        assert free.total >= fixed.total >= single
        taken[number] = free.intervals
        about = {"case": number, "strategy": case["strategy"], "budget": case["total_budget"]}
        rows.append(about | {"free": free.total, "fixed": fixed.total, "best single": single})
values = pd.DataFrame(rows)
values["gain"] = values.free / values.fixed.where(values.fixed > 0) - 1
report.table(values, "value_by_case", split=None)

# %% tags=["nbval-check-output"]
gained = values.free > values.fixed * (1 + 1e-9)
assert not gained[values.strategy == "equal"].any()
report.reading("value_by_case")

# %% [markdown]
# ## What the selected layers are worth to the model
#
# The same cases, another objective each. By `significance_share`, the significance taken over the most that can be taken, the
# objective of that name cannot lose: an upper bound and no finding. What counts is the metric of the model when the selected
# layers stay as they are and all others are pruned alike (Sun et al., Wanda, arXiv:2306.11695) so that `judged_sparsity` of the
# whole is pruned. The table `quality_by_objective`: one row per case and objective; `added_loss` is the loss over that of
# pruning all layers alike (`none kept`): above 0 it would have been better to keep none. Claims compare the metric, or the loss
# of a language model: a mean of perplexities is ruled by the worst.

# %%
calibration = dict(samples=calibration_samples, batch_size=batch_size, seed=seed)
with report.stage("calibration"):
    statistics = load_calibration(data, model, **calibration)
metric = data.metric
measure = "loss" if data.headline.bounds is None else metric  # what claims compare
sign = METRICS[measure].sign
one_sample = {name: 0.03 for name in data.metrics if METRICS[name].bounds}  # a sample may change sides between machines
sizes = dict(zip(scores.names, scores.costs, strict=True))


def on_scale(axis):
    """A logarithmic axis with plain numbers for a metric without bounds, as perplexity."""
    if data.headline.bounds is None:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(plt.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(plt.NullLocator())


def quality_of(changed):
    """Loss and metrics on test samples."""
    batches = data.batches("test", batch_size, samples=evaluation_samples)
    return evaluate(changed, batches, data.objective, data.metrics)


def with_kept(kept):
    """The model with all layers but those kept pruned, `judged_sparsity` of all weights together."""
    others = [name for name in sizes if name not in kept]
    ratio = judged_sparsity * sum(sizes.values()) / sum(sizes[name] for name in others)
    changed = copy.deepcopy(model)
    prune(changed, dict.fromkeys(others, ratio), "wanda", statistics)
    return changed


# %%
dense, none = quality_of(model), quality_of(with_kept(set()))
rows = [{"case": 0, "strategy": "", "objective": "none kept", "significance_share": 0.0} | none]
with report.stage("objectives"):
    for case in tqdm(drawn_cases[:: max(1, cases // judged_cases)], "cases"):
        generator = np.random.default_rng(case["case_id"])
        for name, objective in ASSIGNMENT_OBJECTIVES.items():
            found = assign_layers(objective(scores.layers, generator).tolist(), scores.costs, case["budgets"])
            kept = {scores.names[i] for run in found.intervals if run for i in range(run[0], run[1] + 1)}
            share = total_value(scores.values, found.intervals) / values.free[case["case_id"] - 1]
            about = {"case": case["case_id"], "strategy": case["strategy"], "objective": name}
            rows.append(about | {"significance_share": share} | quality_of(with_kept(kept)))
objectives = pd.DataFrame(rows)
objectives["added_loss"] = objectives.loss - none["loss"]
report.table(objectives, "quality_by_objective", split="test", tolerance=one_sample)
drawn, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
style = dict(x=metric, y="objective", order=["none kept", *ASSIGNMENT_OBJECTIVES], color="black", ax=axis)
sns.stripplot(objectives, size=4, jitter=False, **style)
sns.pointplot(objectives, errorbar=None, linestyle="none", marker="|", markersize=16, **style)
axis.axvline(dense[metric], ls="--", color="0.3")
axis.set(xlabel=f"test {metric} (dots: {judged_cases} cases, bars: means, dashed: dense)", ylabel="layers kept by")
axis.xaxis.set_major_locator(plt.MaxNLocator(5))
report.figure(drawn, "quality_by_objective")

# %% tags=["nbval-check-output"]
report.reading("quality_by_objective")

# %% [markdown]
# ## Pruning by the same significance
#
# Uniform ratios against those of the exponents, per block and per layer, and against the same reversed (a control: the
# layers that should be pruned most are pruned least), on a dense model of every seed. The table `quality_by_sparsity`: one row
# per seed, method, rule, grouping and sparsity, `achieved` as counted in the model. Dashed: dense, the mean over seeds.

# %%
exponents = {row["name"]: row["raw_metric"] for row in scores.layers}


def rules_of(found):
    """rule -> share -> the ratio of each layer."""
    turned = {name: -value for name, value in found.items()}
    return {
        "uniform": lambda share: dict.fromkeys(sizes, share),
        "ESD, by block": lambda share: pruning_ratios(found, sizes, share, epsilon, blocks),
        "ESD, by layer": lambda share: pruning_ratios(found, sizes, share, epsilon),
        "reversed": lambda share: pruning_ratios(turned, sizes, share, epsilon, blocks),
    }


denses = {seed: (model, statistics, rules_of(exponents))}  # seed -> model, statistics, rules
with report.stage("further dense models"):
    for other in more_seeds:
        own = load_baseline(data, replace(recipe, seed=other), retrain=retrain).model
        found = layer_scores(own, metric_of_ratios, scoring, layers=data.layers, progress=False)
        own_rules = rules_of({row["name"]: row["raw_metric"] for row in found.layers})
        denses[other] = own, load_calibration(data, own, **calibration), own_rules
qualities = pd.DataFrame([quality_of(own) for own, *_ in denses.values()])

# %%
rows = []
with report.stage("pruning"):
    pairs = [(dense, method) for dense in denses.items() for method in PRUNING_METHODS]
    for (number, (own, moments, rules)), method in tqdm(pairs, "pruning"):
        for per, share, rule_name in [(p, s, r) for p in ("row", "matrix") for s in sparsities for r in rules]:
            changed = copy.deepcopy(own)
            ratios = {
                name: min(ratio, 0.999) for name, ratio in rules[rule_name](share).items()
            }  # never all of a layer
            pruned = prune(changed, ratios, method, moments, per=per)
            achieved = sum(row["pruned"] for row in pruned) / sum(row["weights"] for row in pruned)
            about = {"seed": number, "method": method, "per": per, "rule": rule_name, "sparsity": share}
            rows.append(about | {"achieved": achieved} | quality_of(changed))
        changed = copy.deepcopy(own)
        prune(changed, method=method, statistics=moments, pattern=(2, 4), layers=scores.names)
        about = {"seed": number, "method": method, "per": "2:4", "rule": "uniform", "sparsity": 0.5, "achieved": 0.5}
        rows.append(about | quality_of(changed))
sparse = pd.DataFrame(rows)
report.table(sparse, "quality_by_sparsity", split="test", tolerance=one_sample)
drawn = sns.relplot(
    sparse[sparse.per != "2:4"], x="sparsity", y=metric, hue="rule", marker="o", palette=colors_of(sparse.rule),
    row="method", col="per", kind="line", height=2.9, aspect=1.6, errorbar=None, units="seed", estimator=None, lw=1,
)  # fmt: skip
for axis in drawn.axes.flat:
    axis.axhline(qualities[metric].mean(), ls="--", color="0.3")
    on_scale(axis)
drawn.set_titles("{row_name}, per {col_name}").set(ylabel=f"test {metric}")
report.figure(drawn, "quality_by_sparsity")

# %% tags=["nbval-check-output"]
assert (sparse.achieved - sparse.sparsity).abs().max() < 0.005
report.reading("quality_by_sparsity")

# %% [markdown]
# ## The low-rank twin
#
# The same shares, but of ranks: layer by layer the whitened SVD keeps 1 minus the ratio, against one share for all and against
# ranks by the whitened spectra. The table `quality_by_keep`: one row per seed, rule and `keep`.

# %%
SPECTRUM = "whitened spectrum"


def stored(shapes, ranks):
    """Their share of the targeted parameters."""
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items()) / sum(sizes.values())


def ranks_of(sweep, rules, rule_name, keep):
    """layer -> rank, within `keep` of the targeted parameters together."""
    if rule_name in ("uniform", SPECTRUM):
        return sweep.ranks(
            Configuration("whitened", allocation="uniform" if rule_name == "uniform" else "relative"), keep
        )
    least = {name: sum(shape) / np.prod(shape) for name, shape in sweep.shapes.items()}  # of rank 1
    for asked in np.linspace(keep, 0.01, 200):  # rank 1 is more than some layers should keep
        ratios = rules[rule_name](1 - asked)
        shares = {name: max(1 - ratio, least[name]) for name, ratio in ratios.items()}
        ranks = {name: rank_for_keep(shape, shares[name]) for name, shape in sweep.shapes.items()}
        if stored(sweep.shapes, ranks) <= keep:
            return ranks
    raise ValueError(f"`keeps` must allow rank 1 in every layer, got {keep}.")


# %%
rows = []
with report.stage("low rank"):
    for number, (own, moments, rules) in tqdm(denses.items(), "low rank"):
        config = SweepConfig(calibration_samples, batch_size=batch_size, seed=seed, in_memory=in_memory, split="test")
        sweep = Sweep(own, data, moments, config)
        names = (*rules, SPECTRUM) if in_memory else tuple(rules)
        for keep, rule_name in [(keep, name) for keep in keeps for name in names]:
            smaller = sweep.compressed(Configuration("whitened"), ranks_of(sweep, rules, rule_name, keep))
            about = {"seed": number, "rule": rule_name, "keep": keep} | parameter_counts(smaller, own, data.layers)
            rows.append(about | quality_of(smaller))
twin = pd.DataFrame(rows)
report.table(twin, "quality_by_keep", split="test", tolerance=one_sample)
drawn, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
style = dict(hue="rule", marker="o", units="seed", estimator=None, lw=1, palette=colors_of(twin.rule), ax=axis)
sns.lineplot(twin, x="keep_model", y=metric, **style)
axis.axhline(qualities[metric].mean(), ls="--", color="0.3")
axis.set(xlabel=f"kept share of the model (a line for each of {len(denses)} models)", ylabel=f"test {metric}")
on_scale(axis)
axis.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
report.figure(drawn, "quality_by_keep")

# %% tags=["nbval-check-output"]
assert (twin.keep_targeted <= twin.keep).all()
report.reading("quality_by_keep")

# %% [markdown]
# ## What this shows
#
# The exact assignment costs next to nothing and never loses; how much it gains depends on how unequal the budgets are. That an
# objective wins by its own measure is no finding. The claims say whether keeping layers by their exponents helps the model, and
# whether pruning by them does; the reversed ratios are the control that tells a helpful order from a harmless spread. No
# fine-tuning follows, and where `more_seeds` is empty a single dense model stands behind the set. Notebook 07 compresses a
# model of visual geometry.

# %% tags=["nbval-check-output"]
report.finish()
