"""Train a model on a task: the order of its samples, and `lowrank.training.loop.fit` on them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from lowrank.io.distributed import process_count, process_index
from lowrank.nn.batches import Batch
from lowrank.tasks.task import Task
from lowrank.training.loop import Recipe, fit


def sample_order(size: int, recipe: Recipe) -> Iterator[list[int]]:
    """Yield the sample positions of each batch: shuffled epochs laid end to end, so that no batch is short.

    **Arguments**

    - `size`: samples to draw from, >= 1.
    - `recipe`: its `steps`, `accumulation`, `batch_size` and `seed` count.
    """
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
    """Train a model in place on the training split of a task.

    Under `accelerate launch` each process takes its share of every batch.

    **Arguments**

    - `model`: a model of the task, in any form.
    - `task`: its split 'train' is used.
    - `recipe`: how to train.
    - `loss`: `(model, batch) -> scalar`; by default the task's loss.
    - `options`: further arguments of `lowrank.training.loop.fit`.

    **Returns** the history of `fit`, one row per step.
    """
    PartialState()  # joins the other processes, if it is the first to be made, before they are counted
    size = len(task.split("train"))
    order = [indices[process_index() :: process_count()] for indices in sample_order(size, recipe)]
    return fit(
        model,
        lambda done: task.loader("train", order[done * recipe.accumulation :], recipe.workers),
        recipe,
        loss or task.loss,
        **options,
    )
