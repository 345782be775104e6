"""tasks.registry"""

import importlib
import inspect
from typing import Any

from lowrank.tasks.task import Task

# name -> the module that loads it, imported when it is asked for: a reader of digits needs no transformers.
TASKS = {
    "digits": "lowrank.tasks.digits",
    "docs_package": "lowrank.tasks.docs_package",
    "docs_language": "lowrank.tasks.docs_language",
    "glue": "lowrank.tasks.glue",
    "imagenet": "lowrank.tasks.imagenet",
    "cifar10": "lowrank.tasks.cifar10",
    "wikitext2": "lowrank.tasks.wikitext2",
}


def load_task(name: str, **options: Any) -> Task:
    """A task by name.

    **Arguments:** `options`: those of the task's `load` function; its docstring lists them.

    **Raises:** `ValueError`: unknown task or option; the message lists the known ones. `FileNotFoundError`: data or
    weights are missing; the message names the remedy.
    """
    if name not in TASKS:
        raise ValueError(f"`name` must be one of {sorted(TASKS)}, got {name!r}.")
    load = importlib.import_module(TASKS[name]).load
    known = inspect.signature(load).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"`options` of task {name!r} must be among {sorted(known)}, got {unknown}.")
    return load(**options)
