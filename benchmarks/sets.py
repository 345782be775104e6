"""The trained models of the report's sets, for benchmarks on real losses."""

from typing import Any

import pytest
from torch import nn

from lowrank import Recipe, load_task
from lowrank.report.parameters import read_parameters
from lowrank.tasks.baseline import load_baseline
from lowrank.tasks.task import Task


def load_set(name: str) -> tuple[dict[str, Any], Task, nn.Module]:
    """Return the parameters of a set for notebook 03, its task and its dense model; skip where the data cannot be had.

    **Arguments**

    - `name`: of a file in params/.
    """
    p = read_parameters(name, "03_svd_comparison")
    try:
        task = load_task(p["task"], **p["task_options"])
    except OSError as error:
        pytest.skip(f"no data for {name}: {error}")
    recipe = Recipe(p["steps"], p["batch_size"], p["learning_rate"], p["weight_decay"], seed=p["seed"])
    return p, task, load_baseline(task, recipe).model
