"""GLUE: nine sentence tasks, each with its own metrics, and any sequence classifier of transformers."""

from typing import Any, NamedTuple

import torch
from torch import nn

from lowrank.io.checks import require
from lowrank.io.hub import load_pretrained, load_splits, load_tokenizer, revision
from lowrank.nn.targets import BLOCKS
from lowrank.tasks.task import Task
from lowrank.tasks.text import Encoded, Padded


class GlueTask(NamedTuple):
    """Describe one of the nine tasks.

    **Arguments**

    - `fields`: the columns of its one or two sentences.
    - `classes`: how many; 1 for regression.
    - `metrics`: keys of `lowrank.tasks.metrics.METRICS`, the headline metric first.
    - `validation`: the split that is reported; default 'validation'.
    """

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
FURTHER_SPLITS = ("validation_mismatched",)  # with labels; only some tasks have them


def load(
    task: str = "sst2",
    model: str = "bert-base-uncased",
    data: str = "nyu-mll/glue",
    max_length: int = 128,
    layers: list[str] | tuple[str, ...] = BLOCKS,
) -> Task:
    """Load one GLUE task and a pretrained encoder with a new head.

    GLUE's test splits have no labels, so 'validation' is reported. MNLI reports its matched part and also has
    'validation_mismatched'.

    **Arguments**

    - `task`: a key of `GLUE`; default 'sst2'.
    - `model`: Hub name or folder of any model with a sequence classification class; default 'bert-base-uncased'.
    - `data`: Hub name or folder; default 'nyu-mll/glue', whose configuration `task` is loaded. Any other source must have the
      columns of `task` itself, as 'stanfordnlp/sst2' has.
    - `max_length`: tokens per sample; longer ones are cut. Default 128.
    - `layers`: names or patterns of the targeted layers; default all inside blocks.
    """
    require(task in GLUE, "task", f"be one of {sorted(GLUE)}", task)
    facts = GLUE[task]
    source = load_splits(data, task if data.endswith("/glue") else None)
    tokenizer = load_tokenizer(model)

    def make_model() -> nn.Module:
        return load_pretrained(
            "AutoModelForSequenceClassification", model, num_labels=facts.classes, torch_dtype=torch.float32
        )

    names = {"train": "train", "validation": facts.validation, **{split: split for split in FURTHER_SPLITS}}
    names = {split: name for split, name in names.items() if name in source}
    return Task(
        name=f"glue/{task}",
        splits={split: _encode(source[name], facts.fields, tokenizer, max_length) for split, name in names.items()},
        make_model=make_model,
        objective="classification" if facts.classes > 1 else "regression",
        metrics=facts.metrics,
        collate=Padded(tokenizer),
        layers=tuple(layers),
        fingerprints={
            "data": {split: source[name]._fingerprint for split, name in names.items()},
            "revision": revision(model),
        },
    )


def _encode(rows: Any, fields: tuple[str, ...], tokenizer: Any, max_length: int) -> Encoded:
    """Return all columns of the tokenizer, `token_type_ids` among them, and the labels."""
    texts = [list(rows[name]) for name in fields]
    columns = tokenizer(*texts, truncation=True, max_length=max_length)
    return Encoded({**columns, "labels": list(rows["label"])})
