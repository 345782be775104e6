"""The dense models of the embedded sets: `MODELS`, the list of them, and how they are trained and shipped.

`lowrank.tasks.pretrain` is the command.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lowrank.tasks.baseline import Baseline, baseline_key, distance, load_baseline, train_baseline
from lowrank.tasks.registry import load_task
from lowrank.tasks.shipped import BLOCK, round_weights, write_shipped
from lowrank.tasks.task import Task
from lowrank.training.loop import Recipe


@dataclass(frozen=True)
class DenseModel:
    """Describe a dense model of a parameter set, as its notebooks ask `load_baseline` for it.

    **Arguments**

    - `task`: a key of `lowrank.tasks.registry.TASKS`.
    - `recipe`: how to train.
    - `options`: of the task's loader. Empty by default.
    - `shipped`: whether it comes with this package; otherwise it stays in the cache. Default True.
    """

    task: str
    recipe: Recipe
    options: Mapping[str, Any] = field(default_factory=dict)
    shipped: bool = True


_DIGITS = Recipe(600, 64, 4e-3, 0.05)
_BERT = Recipe(375, 32, 1e-3, 0.01)
_LLAMA = Recipe(400, 16, 3e-3, 0.01)
_PACKAGES = {"validation_samples": 1000, "test_samples": 1000}
_LANGUAGE = {"validation_samples": 256, "test_samples": 256}
_BASE = {"packages": ["matplotlib", "numpy", "pandas", "scipy"]}  # the base of what is fine-tuned on the fifth package
_MINILM = {"task": "sst2", "model": "sentence-transformers/all-MiniLM-L6-v2", "data": "SetFit/sst2"}

# The only list of them. Name -> model; the number is the seed.
MODELS = {
    **{f"digits-vit-{seed}": DenseModel("digits", replace(_DIGITS, seed=seed)) for seed in (0, 1, 2)},
    **{f"digits-vit-{seed}": DenseModel("digits", replace(_DIGITS, seed=seed)) for seed in (3, 4)},
    "docs-bert-0": DenseModel("docs_package", _BERT, _PACKAGES, shipped=False),  # of a set outside the report
    **{f"docs-llama-{seed}": DenseModel("docs_language", replace(_LLAMA, seed=seed), _LANGUAGE) for seed in (0, 1)},
    "docs-llama-2": DenseModel("docs_language", replace(_LLAMA, seed=2), _LANGUAGE),
    "docs-llama-base-0": DenseModel("docs_language", replace(_LLAMA, steps=300), _LANGUAGE | _BASE),
    "sst2-minilm": DenseModel("glue", Recipe(216, 32, 5e-5, 0.01), _MINILM, shipped=False),  # 90 MB
}


def ship(name: str, baseline: Baseline, task: Task, recipe: Recipe) -> None:
    """Write a trained model among those that come with this package, rounded to half precision, and measure what is written.

    **Arguments**

    - `name`: a key of `MODELS`.
    - `baseline`: from `train_baseline`.
    - `task`: its task; the rounded model is measured on 'validation'.
    - `recipe`: how it was trained.
    """
    rounded = copy.deepcopy(baseline.model)
    round_weights(rounded)
    losses = [row["loss"] for row in baseline.history]
    blocks = [losses[i : i + BLOCK] for i in range(0, len(losses), BLOCK)]
    metadata = {
        **baseline_key(task, recipe),
        "loss": [round(sum(block) / len(block), 4) for block in blocks],
        "validation": task.evaluate(rounded),
        "wall_s": baseline.seconds,
        "environment": baseline.environment,
    }
    write_shipped(name, rounded, metadata)


def pretrain(names: list[str], shipping: bool) -> None:
    """Train models, unless the cache has them, and say of each how it does and how far it is from the one that is shipped.

    **Arguments**

    - `names`: keys of `MODELS`.
    - `shipping`: let them take the place of those that are shipped, which are not read then: they may be damaged.
    """
    train = train_baseline if shipping else lambda task, recipe: load_baseline(task, recipe, retrain=True)
    trained = []
    for name in names:
        task, recipe = load_task(MODELS[name].task, **MODELS[name].options), MODELS[name].recipe
        baseline = train(task, recipe)
        quality = ", ".join(f"{metric} {value:.4g}" for metric, value in task.evaluate(baseline.model).items())
        apart = f"; {distance(baseline.model, baseline.shipped):.2g} from the shipped one" if baseline.shipped else ""
        print(f"{name}: trained in {baseline.seconds} s, validation {quality}{apart}", flush=True)
        trained.append((name, baseline, task, recipe))
    for model in trained if shipping else []:  # only now: whether the working tree is clean is part of each description
        ship(*model)
