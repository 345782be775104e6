"""Truncate value and output projections together, head by head, or each alone: `make bench`; outputs/bench/joint.csv.

The values of a head reach the output only through W_o W_v, so that their joint truncation has a closed form and leaves plain,
smaller layers (Lin et al., MoDeGPT, arXiv:2408.09632). Here it is compared with what the library does to each of the two layers,
at the same stored parameters of both, on the small Llama that comes with the library. Statistics are of training samples; the
added loss is that of the validation split.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from bench_ranks import sweeps
from shared import recorder
from torch import Tensor, nn

from lowrank import compress
from lowrank.factorization.methods import RIDGE

row, table = recorder("joint", "keep", "modules", "ranks", "keep_targeted", "added_loss")
KEEPS = (0.75, 0.5, 0.3, 0.2)
ALONE = {
    "whitened, factors": dict(method="whitened", storage="factors", allocation="uniform"),
    "two_sided, pivoted": dict(method="two_sided", storage="pivoted", allocation="uniform"),
    "two_sided, pivoted, by spectrum": dict(method="two_sided", storage="pivoted", allocation="spectrum"),
}


class Head(NamedTuple):
    """The SVD of H W_o W_v S for one key-value head, with W_o of all query heads that use it, one below the other."""

    values: Tensor  # rows of W_v that belong to the head: a view
    outputs: list[Tensor]  # columns of W_o of each query head: views
    left: Tensor
    sigma: Tensor
    right: Tensor
    root: Tensor  # H


def heads(model: nn.Module, statistics, weighted: bool) -> Iterator[Head]:
    config = model.config
    size, shared = (
        config.hidden_size // config.num_attention_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )
    for i, layer in enumerate(model.model.layers):
        name = f"model.layers.{i}.self_attn"
        gram, moments = statistics[f"{name}.v_proj"].gram, statistics[f"{name}.o_proj"]
        eye = torch.eye(len(gram), dtype=torch.float64)
        root = eye
        if weighted:
            fisher = moments.gradient_gram / moments.tokens
            root = torch.linalg.cholesky(fisher + RIDGE * fisher.diagonal().mean() * eye).T
        factor = torch.linalg.cholesky(gram + 1e-10 * gram.diagonal().mean() * eye)
        w_v, w_o = layer.self_attn.v_proj.weight.data, layer.self_attn.o_proj.weight.data
        for k, values in enumerate(w_v.split(size)):
            outputs = list(w_o.split(size, dim=1)[k * shared : (k + 1) * shared])
            stacked = torch.cat([root @ part.double() for part in outputs]) @ values.double() @ factor
            u, sigma, vt = torch.linalg.svd(stacked, full_matrices=False)
            right = torch.linalg.solve_triangular(factor, vt[:size], upper=False, left=False)
            yield Head(values, outputs, u[:, :size], sigma[:size], right, root)


def truncate_jointly(model: nn.Module, statistics, keep: float, weighted: bool) -> tuple[nn.Module, float]:
    """Return a copy with heads of fewer value dimensions, the others zero, and the share of them that is left."""
    small = copy.deepcopy(model)
    found = list(heads(small, statistics, weighted))
    size, total = len(found[0].sigma), int(keep * sum(len(head.sigma) for head in found))
    ranks = [int(keep * size)] * len(found)
    if weighted:  # the same threshold for all heads
        least = torch.cat([head.sigma for head in found]).sort(descending=True).values[total - 1]
        ranks = [int((head.sigma >= least).sum()) for head in found]
    for head, rank in zip(found, ranks, strict=True):
        split = head.sigma.sqrt() * (torch.arange(size) < rank)
        head.values.copy_(split[:, None] * head.right)
        for part, rows in zip(head.outputs, head.left.split(len(head.root)), strict=True):
            part.copy_(torch.linalg.solve(head.root, rows * split))
    return small, sum(ranks) / (size * len(found))


def test_joint_truncation(benchmark) -> None:
    _, sweep = next(iter(sweeps("docs-llama", 32, (0,))))
    model, statistics = sweep.model, sweep.statistics
    names = [name for name in statistics if name.endswith(("v_proj", "o_proj"))]
    for keep in KEEPS:
        for weighted in (False, True):
            small, share = truncate_jointly(model, statistics, keep, weighted)
            ranks = "by spectrum" if weighted else "uniform"
            row(keep, "joint, two-sided" if weighted else "joint", ranks, share, sweep.quality(small)["added_loss"])
        for name, how in ALONE.items():
            small = copy.deepcopy(model)
            made = compress(small, keep=keep, statistics=statistics, layers=names, progress=False, **how)
            row(keep, name, how["allocation"], made.keep_targeted, sweep.quality(small)["added_loss"])
    benchmark.pedantic(lambda: None, rounds=1)
