"""What fixed bases cost and save: `make bench`. The table goes to outputs/bench/oialr.csv.

A training step (forward, backward, clipping, AdamW) of ViT blocks 768 wide with U S V^T at several ranks, over one of the
dense blocks, and over one that multiplies the weight out in every pass, as the published code does. And what watching bases costs
at the default interval, as a share of the training it watches.
"""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from shared import recorder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowrank.nn.profiling import time_in_turns
from lowrank.nn.usv import USV, USVLinear
from lowrank.tasks.registry import load_task
from lowrank.training.oialr import OIALR
from lowrank.training.stability import BasisMonitor

row, table = recorder("oialr")
DEPTH, BATCH, TOKENS = 2, 2, 197


def vit(**sizes: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    return VisionTransformer(num_classes=10, **sizes)


class Rebuilt(nn.Module):
    """A layer that multiplies its weight out in every pass."""

    def __init__(self, layer: USVLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.flat_weight(), self.layer.bias)


def truncated(model: nn.Module, ratio: float, rebuild: bool) -> nn.Module:
    """Bases of a share of the full rank in all blocks; their values do not matter to the time."""
    own = copy.deepcopy(model)
    for name, shape in OIALR(own).layers.items():
        rank = round(ratio * min(shape))
        sizes = (shape[0], rank), (rank, rank), (rank, shape[1])
        parent, _, key = name.rpartition(".")
        linear: Any = own.get_submodule(name)
        layer = USVLinear.from_dense(linear, USV(*(0.03 * torch.randn(size) for size in sizes)))
        setattr(own.get_submodule(parent), key, Rebuilt(layer) if rebuild else layer)
    return own


def training_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25, 0.1])
def test_a_training_step_of_vit_blocks(benchmark, ratio: float) -> None:
    torch.manual_seed(0)
    dense = vit(img_size=224, patch_size=16, embed_dim=768, depth=DEPTH, num_heads=12)
    batch = torch.randn(BATCH, 3, 224, 224), torch.randint(0, 10, (BATCH,))
    models = {"dense": dense, "thin": truncated(dense, ratio, False), "rebuilt": truncated(dense, ratio, True)}
    steps = {name: training_step(model, batch) for name, model in models.items()}
    times = {name: median(own) for name, own in time_in_turns(steps, repeats=7).items()}
    case = f"{DEPTH} ViT blocks 768 wide, {BATCH} x {TOKENS} tokens, rank ratio {ratio}"
    row("OIALR training step over a dense one", case, "time ratio", times["thin"] / times["dense"])
    row("the same with the weight multiplied out", case, "time ratio", times["rebuilt"] / times["dense"])
    benchmark.pedantic(lambda: None, rounds=1)


def digits() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    task = load_task("digits")
    return task.make_model(), next(iter(task.batches("train", 64)))


def mini() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = vit(img_size=32, patch_size=8, embed_dim=768, depth=6, num_heads=6, mlp_ratio=4, qkv_bias=False)
    return model, (torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,)))


@pytest.mark.parametrize("make", [digits, mini], ids=lambda make: make.__name__)
def test_watching_bases(benchmark, make: Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]]) -> None:
    torch.manual_seed(0)
    model, batch = make()
    monitor = BasisMonitor(progress=False)
    monitor.check(model)
    pair = {"look": lambda: monitor.check(model), "step": training_step(model, batch)}
    times = {name: median(own) for name, own in time_in_turns(pair, repeats=3, warmup=1).items()}
    case = {"digits": "digits-vit, batches of 64", "mini": "CIFAR-10's mini ViT, 768 wide, batches of 64"}[
        make.__name__
    ]
    row("a look at all bases over a training step", case, "time ratio", times["look"] / times["step"])
    share = times["look"] / (monitor.every * times["step"])
    row(f"watching bases every {monitor.every} steps", case, "share of training time", share)
    benchmark.pedantic(lambda: None, rounds=1)
