"""Load a task by name. `TASKS` is the only list of tasks; a new one is a module with a function `load` and a line here."""

import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lowrank.io.arguments import check_arguments
from lowrank.io.checks import SPLITS, require
from lowrank.tasks.task import Task

# name -> the module of its loader. It is imported on demand: a reader of digits needs no transformers.
TASKS = {
    "digits": "lowrank.tasks.digits",
    "docs_package": "lowrank.tasks.docs_package",
    "docs_language": "lowrank.tasks.docs_language",
    "docs_pretrained": "lowrank.tasks.docs_pretrained",
    "glue": "lowrank.tasks.glue",
    "imagenet": "lowrank.tasks.imagenet",
    "cifar10": "lowrank.tasks.cifar10",
    "cifar10_pretrained": "lowrank.tasks.cifar10_pretrained",
    "wikitext2": "lowrank.tasks.wikitext2",
}


@check_arguments
def load_task(task: str | Callable[..., Task], /, **options: Any) -> Task:
    """Load a task and give it its identity.

    The identity is JSON: the task's name, all options of its loader, defaults included, and the task's `fingerprints`.

    **Arguments**

    - `task`: a key of `TASKS`, or a function that returns a `Task`.
    - `options`: arguments of the task's `load` function, JSON; its docstring lists them.

    **Raises**

    - `ValueError`: unknown task or option, and the message lists the known ones; the task lacks one of `SPLITS`.
    - `FileNotFoundError`: data or weights are missing; the message names the remedy.
    """
    if isinstance(task, str):
        require(task in TASKS, "task", f"be one of {sorted(TASKS)}", task)
        name, load = task, importlib.import_module(TASKS[task]).load
    else:
        name, load = task.__name__, task
    signature = inspect.signature(load)
    unknown = sorted(set(options) - set(signature.parameters))
    require(not unknown, "options", f"be among {sorted(signature.parameters)} for task {name!r}", unknown)
    bound = signature.bind(**options)
    bound.apply_defaults()
    loaded = load(*bound.args, **bound.kwargs)
    missing = [split for split in SPLITS if split not in loaded.splits]
    require(
        not missing, "splits", f"have all of {list(SPLITS)} for task {name!r}, without {missing}", sorted(loaded.splits)
    )
    identity = {"task": loaded.name, "options": bound.arguments, **loaded.fingerprints}
    return replace(loaded, identity=json.loads(json.dumps(identity)))  # a tuple and a list are the same option
