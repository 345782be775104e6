"""tasks.training"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from lowrank.nn.batches import Batch
from lowrank.tasks.task import Task
from lowrank.training.loop import Recipe, fit


def sample_order(size: int, recipe: Recipe) -> Iterator[list[int]]:
    """One list of `batch_size` sample positions per batch: shuffled epochs laid end to end, so no batch is short."""
    generator = torch.Generator().manual_seed(recipe.seed)
    left: list[int] = []
    for _ in range(recipe.steps * recipe.accumulation):
        while len(left) < recipe.batch_size:
            left += torch.randperm(size, generator=generator).tolist()
        yield left[: recipe.batch_size]
        left = left[recipe.batch_size :]


def train(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    **options: Any,
) -> list[dict[str, int | float]]:
    """Trains a model in place on a task's training split: `fit` on its shuffled samples.

    Under `accelerate launch` each process takes its share of every batch.

    **Arguments:** `loss`: `(model, batch) -> scalar`, by default the task's. `options`: those of `fit`.
    """
    size = len(task.split("train"))
    processes = PartialState()
    world, rank = processes.num_processes, processes.process_index
    order = [indices[rank::world] for indices in sample_order(size, recipe)]
    return fit(
        model,
        lambda done: task.loader("train", order[done * recipe.accumulation :], recipe.workers),
        recipe,
        loss or task.loss,
        **options,
    )
