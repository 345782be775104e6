"""What fixed bases cost and save: `make bench`. The table goes to outputs/bench/oialr.csv.

A training step (forward, backward, clipping, AdamW) of ViT blocks 768 wide with U S V^T at several ranks, over one of the
dense blocks, and over one that multiplies the weight out in every pass, as the published code does. And what watching bases costs
at the default interval, as a share of the training it watches.
"""

from collections.abc import Callable
from statistics import median

import pytest
import torch
from recipes import training_step, truncated, vit
from shared import recorder
from torch import Tensor, nn

from lowrank.nn.profiling import time_in_turns
from lowrank.tasks.registry import load_task
from lowrank.training.stability import BasisMonitor

row, table = recorder("oialr")
DEPTH, BATCH, TOKENS = 2, 2, 197


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25, 0.1])
def test_a_training_step_of_vit_blocks(benchmark, ratio: float) -> None:
    torch.manual_seed(0)
    dense = vit(img_size=224, patch_size=16, embed_dim=768, depth=DEPTH, num_heads=12)
    batch = torch.randn(BATCH, 3, 224, 224), torch.randint(0, 10, (BATCH,))
    models = {"dense": dense, "thin": truncated(dense, ratio, False), "rebuilt": truncated(dense, ratio, True)}
    steps = {name: training_step(model, batch)[0] for name, model in models.items()}
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
    pair = {"look": lambda: monitor.check(model), "step": training_step(model, batch)[0]}
    times = {name: median(own) for name, own in time_in_turns(pair, repeats=3, warmup=1).items()}
    case = {"digits": "digits-vit, batches of 64", "mini": "CIFAR-10's mini ViT, 768 wide, batches of 64"}[
        make.__name__
    ]
    row("a look at all bases over a training step", case, "time ratio", times["look"] / times["step"])
    share = times["look"] / (monitor.every * times["step"])
    row(f"watching bases every {monitor.every} steps", case, "share of training time", share)
    benchmark.pedantic(lambda: None, rounds=1)
