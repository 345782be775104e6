"""The dense model of a task, shipped or trained once, and the statistics of its layers, collected once and cached on disk.

Every notebook starts here, so each notebook runs alone: what is missing is built first. Under `accelerate launch` all
processes build it together, each from its share of the data, and a later run of one process loads it.
"""

import json
import shutil
import time
from dataclasses import dataclass, field, replace
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
from lowrank.io.provenance import environment
from lowrank.tasks.shipped import find_shipped
from lowrank.tasks.task import Task
from lowrank.tasks.training import train
from lowrank.training.loop import Recipe, recipe_options, seed_everything


@dataclass(frozen=True, eq=False)
class Baseline:
    """Hold a dense model and its training.

    **Arguments**

    - `model`: in evaluation mode, on the accelerator if there is one.
    - `history`: one row per training step, see `lowrank.training.loop.fit`; of a shipped model the mean
      loss of every 25 steps.
    - `seconds`: wall-clock time of the training, also if the model now came from the cache or was shipped.
    - `origin`: 'as it comes', 'shipped' or 'trained'.
    - `shipped`: the shipped model of the same task and recipe, if the model was trained anew beside it. Default None.
    - `environment`: of the training, see `lowrank.io.provenance.environment`. Empty as it comes.
    """

    model: nn.Module
    history: list[dict[str, int | float]]
    seconds: float
    origin: str
    shipped: nn.Module | None = None
    environment: dict[str, Any] = field(default_factory=dict)


def load_baseline(task: Task, recipe: Recipe, retrain: bool = False) -> Baseline:
    """Load the task's model as trained by a recipe: shipped with this package, from the cache, or trained first.

    A shipped model has weights of half precision in the precision of the model. Under `accelerate launch` every process loads
    it.

    **Arguments**

    - `task`: from `lowrank.tasks.registry.load_task`, which sets its identity.
    - `recipe`: how to train; with 0 steps the model stays as `task.make_model` makes it, for example pretrained.
    - `retrain`: train, or take from the cache, what is shipped too, and return the shipped model beside it. Default False.

    **Raises**

    - `ValueError`: a task without an identity; a shipped file that is not the one that was written.
    """
    if recipe.steps == 0:
        return Baseline(_make(task, recipe), [], 0.0, "as it comes")
    found = find_shipped(baseline_key(task, recipe))
    if found is None:
        return train_baseline(task, recipe)
    model, about = found.load(_make(task, recipe)), found.metadata
    if retrain:
        return replace(train_baseline(task, recipe), shipped=model)
    return Baseline(model, found.history, about["wall_s"], "shipped", environment=about["environment"])


def train_baseline(task: Task, recipe: Recipe) -> Baseline:
    """Train the task's model by a recipe, if it is not in the cache, whether or not it is shipped too.

    The key of the cache is a hash of the task's identity, the recipe, the code that trains, and the versions of torch and
    the model libraries. A killed training goes on from its last checkpoint.

    **Arguments**

    - `task`: from `lowrank.tasks.registry.load_task`, which sets its identity.
    - `recipe`: how to train.

    **Raises**

    - `ValueError`: a task without an identity.
    """
    key, code = baseline_key(task, recipe), Path(__file__).with_name("training.py")
    model = _make(task, recipe)

    def build(folder: Path) -> None:
        origin, start = environment(), time.perf_counter()
        history = train(model, task, recipe, checkpoint=folder / "checkpoints")
        if process_index() > 0:
            return
        save_model(model, str(folder / "model.safetensors"))
        shutil.rmtree(folder / "checkpoints")
        training = {"history": history, "seconds": round(time.perf_counter() - start, 1), "environment": origin}
        (folder / "training.json").write_text(json.dumps(training), encoding="utf8")

    folder = load_or_build("baselines", key, code, build, together=True)
    load_model(model, str(folder / "model.safetensors"))
    training = json.loads((folder / "training.json").read_text(encoding="utf8"))
    return Baseline(model.eval(), origin="trained", **training)


def baseline_key(task: Task, recipe: Recipe) -> dict[str, Any]:
    """Return what determines a baseline, as JSON: `task`, its identity, and `recipe`.

    **Arguments**

    - `task`: from `lowrank.tasks.registry.load_task`, which sets its identity.
    - `recipe`: how to train.

    **Raises**

    - `ValueError`: a task without an identity.
    """
    return {"task": _identity(task), "recipe": recipe_options(recipe)}


def _make(task: Task, recipe: Recipe) -> nn.Module:
    """Return the model that a training starts from, in evaluation mode, on the accelerator if there is one."""
    device = PartialState().device
    seed_everything(recipe.seed)
    return task.make_model().to(device).eval()


def distance(model: nn.Module, other: nn.Module) -> float:
    """Compute how far the weights of one model lie from those of another: |a - b| / |b| over all parameters.

    **Arguments**

    - `model`: the model with the weights a.
    - `other`: the model with the weights b, of the same shapes.

    **Raises**

    - `ValueError`: the models have parameters of other names or shapes.
    """
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    shapes, wanted = ({name: tuple(p.shape) for name, p in own.items()} for own in (ours, theirs))
    differ = sorted(name for name, _ in shapes.items() ^ wanted.items())
    require(not differ, "other", "have the parameters of `model`, by name and shape", differ)
    pairs = [(a.detach().cpu().double(), theirs[name].detach().cpu().double()) for name, a in ours.items()]
    squares = torch.stack([torch.stack([(a - b).square().sum(), b.square().sum()]) for a, b in pairs]).sum(dim=0)
    return (squares[0] / squares[1]).sqrt().item()


def load_calibration(
    task: Task,
    model: nn.Module,
    *,
    samples: int,
    batch_size: int,
    seed: int,
    gradients: str | None = None,
    **options: Any,
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
    - `options`: `side`, `methods` and `device` of `collect_statistics`: which moments, for what, and where they are summed.

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
        "side": options.get("side", "inputs"),
        "methods": sorted(options.get("methods") or ()),
        "format": FORMAT,
    }

    def build(folder: Path) -> None:
        batches = task.batches("train", batch_size, samples=samples, seed=seed)
        share = islice(batches, process_index(), None, process_count())
        exact: dict[str, Any] = options | {"loss": losses[gradients], "products": torch.float64}
        statistics = collect_statistics(model, share, task.layers, **exact)
        if process_index() == 0:
            save_statistics(folder / "statistics.safetensors", statistics, model, hash_options(key))

    folder = load_or_build("statistics", key, PACKAGE / "calibration" / "collect.py", build, together=True)
    return load_statistics(folder / "statistics.safetensors", model, hash_options(key))


def _identity(task: Task) -> dict[str, Any]:
    if task.identity is None:
        raise ValueError(f"`task` must have an identity, which `load_task` sets, got {task.name!r} without.")
    return dict(task.identity)
