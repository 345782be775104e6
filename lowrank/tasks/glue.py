"""GLUE: nine sentence tasks, each with its own metric, and any sequence classifier of transformers."""

from typing import Any, NamedTuple

import torch
from torch import nn

from lowrank.io.hub import load_pretrained, load_splits, load_tokenizer, revision
from lowrank.nn.targets import BLOCKS
from lowrank.tasks.task import Task
from lowrank.tasks.text import Encoded, Padded


class GlueTask(NamedTuple):
    """`fields`: the columns of the one or two sentences. `classes`: 1 for regression. `metrics`: the headline first."""

    fields: tuple[str, ...]
    classes: int
    metrics: tuple[str, ...]
    validation: str = "validation"


GLUE = {
    "cola": GlueTask(("sentence",), 2, ("matthews", "accuracy")),
    "sst2": GlueTask(("sentence",), 2, ("accuracy",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), 2, ("f1", "accuracy")),
    "stsb": GlueTask(("sentence1", "sentence2"), 1, ("pearson", "spearman")),
    "qqp": GlueTask(("question1", "question2"), 2, ("f1", "accuracy")),
    "mnli": GlueTask(("premise", "hypothesis"), 3, ("accuracy",), "validation_matched"),
    "qnli": GlueTask(("question", "sentence"), 2, ("accuracy",)),
    "rte": GlueTask(("sentence1", "sentence2"), 2, ("accuracy",)),
    "wnli": GlueTask(("sentence1", "sentence2"), 2, ("accuracy",)),
}
EXTRA = ("validation_mismatched",)  # further splits with labels, where a task has them


def load(
    task: str = "sst2",
    model: str = "bert-base-uncased",
    data: str = "nyu-mll/glue",
    max_length: int = 128,
    layers: list[str] | tuple[str, ...] = BLOCKS,
) -> Task:
    """One GLUE task with a pretrained encoder and a new head.

    GLUE's test splits have no labels, so 'validation' is what is reported. MNLI reports its matched part and has
    'validation_mismatched' besides.

    **Arguments:** `task`: one of the nine. `model`: Hub name or folder of any model with a sequence classification
    class. `data`: Hub name or folder; 'nyu-mll/glue' is asked for the configuration `task`, anything else must hold the
    columns of `task` itself, as 'stanfordnlp/sst2' does. `max_length`: tokens per sample. `layers`: targeted layers.
    """
    if task not in GLUE:
        raise ValueError(f"`task` must be one of {sorted(GLUE)}, got {task!r}.")
    about = GLUE[task]
    source = load_splits(data, task if data.endswith("/glue") else None)
    tokenizer = load_tokenizer(model)

    def make_model() -> nn.Module:
        return load_pretrained(
            "AutoModelForSequenceClassification", model, num_labels=about.classes, torch_dtype=torch.float32
        )

    wanted = {"train": "train", "validation": about.validation, **{name: name for name in EXTRA}}
    return Task(
        name=f"glue/{task}",
        splits={
            split: _encoded(source[name], about.fields, tokenizer, max_length)
            for split, name in wanted.items()
            if name in source
        },
        make_model=make_model,
        objective="classification" if about.classes > 1 else "regression",
        metrics=about.metrics,
        identity={
            "task": f"glue/{task}",
            "data": {split: source[name]._fingerprint for split, name in wanted.items() if name in source},
            "model": model,
            "revision": revision(model),
            "max_length": max_length,
        },
        collate=Padded(tokenizer),
        layers=tuple(layers),
    )


def _encoded(rows: Any, fields: tuple[str, ...], tokenizer: Any, max_length: int) -> Encoded:
    """Everything the tokenizer gives, `token_type_ids` among it, and the labels."""
    texts = [list(rows[name]) for name in fields]
    columns = tokenizer(*texts, truncation=True, max_length=max_length)
    return Encoded({**columns, "labels": list(rows["label"])})
