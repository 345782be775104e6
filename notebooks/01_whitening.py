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
# survives moments on which the usual Cholesky recipe fails; a few tokens per input dimension are enough to estimate $G$.

# %% tags=["parameters"]
set_name = "digits-vit"  # the parameter set, which names the folder of results
task = "digits"  # a key of lowrank.tasks.TASKS
task_options = {}  # options of that task's load function
steps = 600  # optimiser steps of the dense baseline; 0 takes the model as it comes
batch_size = 64  # samples
learning_rate = 4e-3  # peak
weight_decay = 0.05
precision = "fp32"  # of the training: fp32 or bf16
seed = 0
calibration_samples = 1024  # samples of the training split whose tokens give the second moments
theorem_samples = 512  # samples on which the theorem is measured
theorem_in_float64 = True  # also with a float64 copy of the model
rank_shares = [0.1, 0.25, 0.5, 0.75]  # rank / min(out, in)
tokens_per_dimension = [0.5, 1, 2, 5, 10]  # calibration tokens / inputs of the layer
shrinkages = [0.0, 0.01, 0.1]  # ridge / mean eigenvalue of G/N
repeats = 3  # draws of calibration tokens, and timed repeats

# %%
import copy
import itertools
import time

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from torch.linalg import svdvals

from lowrank.baseline import load_baseline, load_calibration
from lowrank.evaluation import output_errors
from lowrank.factorize import METHODS
from lowrank.fingerprint import hash_model
from lowrank.layers import depth_and_kind
from lowrank.recipes import RECIPES
from lowrank.report import Report
from lowrank.spectra import effective_rank, retained_energy, stable_rank
from lowrank.statistics import collect_inputs, collect_statistics, second_moment_eigh, shrunk, whitening_factor
from lowrank.tasks import load_task
from lowrank.training import Recipe

report = Report("01_whitening", globals())

# %% [markdown]
# ## The dense baseline is measured, not quoted
#
# The table `baseline` has one row: loss and metrics on the held-out split, the weights in the targeted layers, those in the
# whole model, and their ratio `targeted_share`: what a compression of the targeted layers can touch.

# %%
data = load_task(task, **task_options)
recipe = Recipe(steps, batch_size, learning_rate, weight_decay, precision=precision, seed=seed)
with report.stage("dense baseline"):
    baseline = load_baseline(data, recipe)
    model = baseline.model
    dense = data.evaluate(model)
linears = data.linears(model)
weights = {name: layer.weight.detach() for name, layer in linears.items()}
targeted = sum(weight.numel() for weight in weights.values())
total = sum(p.numel() for p in model.parameters())
report.record(task=data.identity, model=hash_model(model), dtype=str(next(model.parameters()).dtype))
row = dense | {"targeted_weights": targeted, "model_weights": total, "targeted_share": targeted / total}
report.table(pd.DataFrame([row]), "baseline")

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
report.table(moment_table, "moments_by_layer")

# %% tags=["nbval-check-output"]
print(f"{len(first)} distinct moments for {len(moments)} layers")
few = min(layer.tokens / len(layer.gram) for layer in moments.values())
report.claim("every layer has at least 10 calibration tokens per input dimension", few >= 10)

# %% [markdown]
# ## Whitened spectra against raw ones
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
report.table(spectrum_table, "spectrum_by_index", rows=3)

# %%
style = dict(x="index_share", y="relative_singular_value", hue="matrix", style="matrix", errorbar=("pi", 100))
drawn = sns.relplot(spectrum_table, kind="line", col="kind", col_wrap=3, height=2.6, aspect=1.3, **style)
drawn.set(yscale="log", ylim=(1e-4, 1.3), xlabel="index / min(out, in)", ylabel=r"$\sigma_i/\sigma_1$")
report.figure(drawn.set_titles("{col_name}"), "spectrum_by_index")

# %% tags=["nbval-check-output"]
half = {name: [retained_energy(s, len(s) // 4).item() for s in pair.values()] for name, pair in spectra.items()}
report.claim("a quarter of the rank keeps more energy of W S than of W in every layer", all(w > r for r, w in half.values()))

# %% [markdown]
# ## The discarded singular values are the output error
#
# The table `theorem_by_layer` has one row per layer, rank share and model dtype. `measured` is $\|(W-W_r)X\|_F$, summed over
# the activations as they stream by, without $G$; `predicted` is the norm of the discarded singular values of $WS$, times
# $\sqrt N$; `difference` is $|\text{measured}/\text{predicted} - 1|$. The theorem demands `difference` at the level of rounding.


# %%
def theorem(model, dtype):
    """Measured and predicted error of every targeted layer at every rank share."""
    calls = lambda: data.batches("train", batch_size, samples=theorem_samples, seed=seed)  # noqa: E731
    if dtype == "float64":
        model = copy.deepcopy(model).double()
        floats = lambda batch: [batch[0].double(), batch[1]] if isinstance(batch, list) else batch  # noqa: E731
        calls = lambda: map(floats, data.batches("train", batch_size, samples=theorem_samples, seed=seed))  # noqa: E731
    fresh = collect_statistics(model, calls(), data.layers)
    found = {}
    for name, layer in data.linears(model).items():
        full = METHODS["whitened"](layer.weight, min(layer.weight.shape), fresh[name])
        found[name] = [full.truncate(max(1, round(share * full.rank))) for share in rank_shares]
    measured = output_errors(model, calls(), {name: [f.dense() for f in factors] for name, factors in found.items()})
    for name, factors in found.items():
        for share, factor, error in zip(rank_shares, factors, measured[name], strict=True):
            yield name, dtype, share, factor.rank, error, factor.error, abs(error / factor.error - 1)


# %%
with report.stage("theorem"):
    dtypes = ["float32", "float64"] if theorem_in_float64 else ["float32"]
    rows = [row for dtype in dtypes for row in theorem(model, dtype)]
columns = ["layer", "dtype", "rank_share", "rank", "measured", "predicted", "difference"]
theorem_table = pd.DataFrame(rows, columns=columns)
report.table(theorem_table, "theorem_by_layer", rows=4)

# %% tags=["nbval-check-output"]
worst = theorem_table.groupby("dtype").difference.max()
assert worst["float32"] <= 1e-5, worst
assert worst.get("float64", 0.0) <= 1e-10, worst
print(f"asserted on {len(theorem_table)} rows: layers x ranks x dtypes")
