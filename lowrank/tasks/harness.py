"""Run tasks of lm-evaluation-harness on any causal language model, dense or compressed."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.hub import load_or_explain
from lowrank.tasks.named_model import NamedModel


@check_arguments
def run_harness(
    named: NamedModel,
    tasks: Iterable[str],
    *,
    include_path: Path | str | None = None,
    samples: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Run tasks by name, as the harness defines them, on a model in memory.

    **Arguments**

    - `named`: a causal language model, from `load_named`.
    - `tasks`: names of tasks or groups of the harness, or of `include_path`.
    - `include_path`: a folder with tasks of your own, in YAML. Default None.
    - `samples`: how many samples of each task; default None, all.
    - `shots`: examples in each prompt; default None, as the task says.
    - `batch_size`: prompts per batch. Default 8.

    **Returns** what the harness returns, without single samples; `tabulate_harness` makes rows of it.

    **Raises**

    - `ModuleNotFoundError`: the harness is not installed.
    - `ValueError`: a model of another kind; an unknown task; what a task raises.
    - `FileNotFoundError`: data of a task are not there, or cannot be reached.
    """
    rule = "be a causal language model to run tasks of the harness"
    require(named.objective == "language_modelling", "model", rule, type(named.model).__name__)
    import lm_eval  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = list(tasks)
    manager = _find_tasks(names, include_path)

    wrapper, evaluate = cast(Any, HFLM), cast(Any, lm_eval.simple_evaluate)  # decorators hide their arguments

    def run() -> Any:
        language_model = wrapper(pretrained=named.model, tokenizer=named.processor, batch_size=batch_size)
        options: dict[str, Any] = {"tasks": names, "limit": samples, "num_fewshot": shots, "log_samples": False}
        return evaluate(language_model, task_manager=manager, **options)

    return load_or_explain("tasks", ",".join(names), run)


def _find_tasks(names: list[str], include_path: Path | str | None) -> Any:
    """Return a manager of tasks that knows all names; the list of the harness itself takes seconds to read."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    require(include_path is None or Path(include_path).is_dir(), "include_path", "be a folder", include_path)
    manager = None if include_path is None else TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in names if not manager.match_tasks([name])]
    require(len(names) > 0 and not unknown, "harness", "name tasks of the harness or of the folder", unknown or names)
    return manager


def tabulate_harness(named: NamedModel, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Make rows of what the harness returns, one for each task and metric.

    **Arguments**

    - `named`: the model.
    - `results`: from `run_harness`.

    **Returns** rows with `model`, `task`, `metric`, `filter`, `value`, `stderr`, None if it is unknown, and `samples`.
    """
    rows = []
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, selected = key.partition(",")
            if not isinstance(value, int | float) or not selected or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{selected}")
            rows.append(
                {
                    "model": named.name,
                    "task": task,
                    "metric": metric,
                    "filter": selected,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "samples": results.get("n-samples", {}).get(task, {}).get("effective"),
                }
            )
    return rows
