"""The dense model of a task, trained once, and the statistics of its layers, collected once: both cached on disk.

Every notebook starts here, and so runs alone: what is missing is built. Under `accelerate launch` all processes build it
together, each from its share of the data, and one process finds it afterwards.
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
from lowrank.io.cache import cached
from lowrank.io.dependencies import PACKAGE
from lowrank.io.distributed import processes
from lowrank.io.hashing import hash_model, hash_options
from lowrank.tasks.task import Task
from lowrank.tasks.training import train
from lowrank.training.loop import Recipe, recipe_options, seed_everything


@dataclass(frozen=True, eq=False)
class Baseline:
    """`model`: trained, in evaluation mode, on the accelerator where there is one. `history`: a row per training step.
    `seconds`: what the training took when it was run, whether now or for the cache."""

    model: nn.Module
    history: list[dict[str, int | float]]
    seconds: float


def load_baseline(task: Task, recipe: Recipe) -> Baseline:
    """The task's model, trained by the recipe; with 0 steps as the task makes it, for instance pretrained.

    Cached under a hash of the task's data and model, the recipe, the code that trains, and the versions of torch and
    the model libraries. A training that was killed goes on from its last checkpoint.
    """
    seed_everything(recipe.seed)
    model = task.make_model()
    if recipe.steps == 0:
        return Baseline(model.to(PartialState().device).eval(), [], 0.0)

    def build(folder: Path) -> None:
        start = time.perf_counter()
        history = train(model, task, recipe, checkpoint=folder / "checkpoints")
        if processes()[1] > 0:
            return
        save_model(model, str(folder / "model.safetensors"))
        shutil.rmtree(folder / "checkpoints")
        about = {"history": history, "seconds": round(time.perf_counter() - start, 1)}
        (folder / "training.json").write_text(json.dumps(about), encoding="utf8")

    key = {"task": task.identity, "recipe": recipe_options(recipe)}
    training = Path(__file__).with_name("training.py")
    folder = cached("baselines", key, training, build, together=True)
    load_model(model, str(folder / "model.safetensors"))
    about = json.loads((folder / "training.json").read_text(encoding="utf8"))
    return Baseline(model.to(PartialState().device).eval(), about["history"], about["seconds"])


def load_calibration(
    task: Task,
    model: nn.Module,
    *,
    samples: int,
    batch_size: int,
    seed: int,
    split: str = "train",
    gradients: str | None = None,
) -> dict[str, LayerStatistics]:
    """Statistics of the task's targeted layers over `samples` samples drawn with `seed`, multiplied in float64; cached
    like the baseline.

    **Arguments:** `gradients`: 'sampled' collects the moments of the output gradients too, under labels that the model
    draws itself (true Fisher information); 'labels' under those of the task.
    """
    losses = {None: None, "labels": task.total_loss, "sampled": task.sampled_loss(seed)}
    if gradients not in losses:
        raise ValueError(f"`gradients` must be None, 'labels' or 'sampled', got {gradients!r}.")
    key: dict[str, Any] = {
        "task": task.identity,
        "model": hash_model(model),
        "layers": list(task.linears(model)),
        "split": split,
        "samples": samples,
        "seed": seed,
        "gradients": gradients,
        "format": FORMAT,
    }

    def build(folder: Path) -> None:
        batches = task.batches(split, batch_size, samples=samples, seed=seed)
        world, rank = processes()
        own = islice(batches, rank, None, world)
        statistics = collect_statistics(model, own, task.layers, loss=losses[gradients], products=torch.float64)
        if rank == 0:
            save_statistics(folder / "statistics.safetensors", statistics, model, hash_options(key))

    folder = cached("statistics", key, PACKAGE / "calibration" / "collect.py", build, together=True)
    return load_statistics(folder / "statistics.safetensors", model, hash_options(key))
