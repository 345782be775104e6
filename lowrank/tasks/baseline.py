"""The dense model of a task, trained once, and the statistics of its layers, collected once: both cached on disk.

Every notebook starts here, so each notebook runs alone: what is missing is built first. Under `accelerate launch` all
processes build it together, each from its share of the data, and a later run of one process loads it.
"""

import json
import shutil
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_model, save_model
from torch import nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.storage import FORMAT, load_statistics, save_statistics
from lowrank.factorization.moments import LayerStatistics
from lowrank.io.cache import load_or_build
from lowrank.io.checks import require
from lowrank.io.dependencies import PACKAGE
from lowrank.io.distributed import process_count, process_index
from lowrank.io.hashing import hash_model, hash_options
from lowrank.tasks.task import Task
from lowrank.tasks.training import train
from lowrank.training.loop import Recipe, recipe_options, seed_everything


@dataclass(frozen=True, eq=False)
class Baseline:
    """Hold a trained model and its training.

    **Arguments**

    - `model`: in evaluation mode, on the accelerator if there is one.
    - `history`: one row per training step, see `lowrank.training.loop.fit`.
    - `seconds`: wall-clock time of the training, also if the model now came from the cache.
    """

    model: nn.Module
    history: list[dict[str, int | float]]
    seconds: float


def load_baseline(task: Task, recipe: Recipe) -> Baseline:
    """Load the task's model as trained by a recipe, and train it first if it is not in the cache.

    The key of the cache is a hash of the task's identity, the recipe, the code that trains, and the versions of torch and
    the model libraries. A killed training goes on from its last checkpoint.

    **Arguments**

    - `task`: from `lowrank.tasks.registry.load_task`, which sets its identity.
    - `recipe`: how to train; with 0 steps the model stays as `task.make_model` makes it, for example pretrained.

    **Raises**

    - `ValueError`: a task without an identity.
    """
    device = PartialState().device
    seed_everything(recipe.seed)
    model = task.make_model()
    if recipe.steps == 0:
        return Baseline(model.to(device).eval(), [], 0.0)

    def build(folder: Path) -> None:
        start = time.perf_counter()
        history = train(model, task, recipe, checkpoint=folder / "checkpoints")
        if process_index() > 0:
            return
        save_model(model, str(folder / "model.safetensors"))
        shutil.rmtree(folder / "checkpoints")
        training = {"history": history, "seconds": round(time.perf_counter() - start, 1)}
        (folder / "training.json").write_text(json.dumps(training), encoding="utf8")

    key = {"task": _identity(task), "recipe": recipe_options(recipe)}
    code = Path(__file__).with_name("training.py")
    folder = load_or_build("baselines", key, code, build, together=True)
    load_model(model, str(folder / "model.safetensors"))
    training = json.loads((folder / "training.json").read_text(encoding="utf8"))
    return Baseline(model.to(device).eval(), training["history"], training["seconds"])


def load_calibration(
    task: Task, model: nn.Module, *, samples: int, batch_size: int, seed: int, gradients: str | None = None
) -> dict[str, LayerStatistics]:
    """Load the statistics of the task's targeted layers, and collect them first if they are not in the cache.

    Matrix products run in float64.

    **Arguments**

    - `task`: from `lowrank.tasks.registry.load_task`, which sets its identity.
    - `model`: a model of the task; it is not changed.
    - `samples`: samples of the training split, in [1, samples of the split].
    - `batch_size`: samples per batch; it sets speed and memory, and is not part of the key of the cache.
    - `seed`: selects the samples, and draws the targets of `gradients='sampled'`.
    - `gradients`: which targets give the moments of output gradients: 'sampled', from the model's own prediction (true Fisher
      information), or 'labels', those of the task. None, the default, collects no gradients.

    **Returns** layer name -> `LayerStatistics`.

    **Raises**

    - `ValueError`: a task without an identity; `samples` or `gradients` outside their range.
    """
    losses = {None: None, "labels": task.total_loss, "sampled": task.sampled_loss(seed)}
    require(gradients in losses, "gradients", "be None, 'labels' or 'sampled'", gradients)
    key: dict[str, Any] = {
        "task": _identity(task),
        "model": hash_model(model),
        "layers": list(task.linears(model)),
        "samples": samples,
        "seed": seed,
        "gradients": gradients,
        "format": FORMAT,
    }

    def build(folder: Path) -> None:
        batches = task.batches("train", batch_size, samples=samples, seed=seed)
        share = islice(batches, process_index(), None, process_count())
        statistics = collect_statistics(model, share, task.layers, loss=losses[gradients], products=torch.float64)
        if process_index() == 0:
            save_statistics(folder / "statistics.safetensors", statistics, model, hash_options(key))

    folder = load_or_build("statistics", key, PACKAGE / "calibration" / "collect.py", build, together=True)
    return load_statistics(folder / "statistics.safetensors", model, hash_options(key))


def _identity(task: Task) -> dict[str, Any]:
    if task.identity is None:
        raise ValueError(f"`task` must have an identity, which `load_task` sets, got {task.name!r} without.")
    return dict(task.identity)
