"""GLUE: nine sentence tasks, each with its own metrics, and any sequence classifier of transformers."""

from typing import Any, NamedTuple

import torch
from torch import nn

from lowrank.io.checks import require
from lowrank.io.hub import load_pretrained, load_splits, load_tokenizer
from lowrank.nn.targets import BLOCKS
from lowrank.tasks.splits import halve
from lowrank.tasks.task import Task
from lowrank.tasks.text import Encoded, Padded, give_padding, set_padding
from lowrank.tasks.wheels import find_model, model_revision


class GlueTask(NamedTuple):
    """Describe one of the nine tasks.

    **Arguments**

    - `fields`: the columns of its one or two sentences.
    - `classes`: how many; 1 for regression.
    - `metrics`: keys of `lowrank.tasks.metrics.METRICS`, the headline metric first.
    - `validation`: the split that chooses; default 'validation'.
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
    """Load one GLUE task and a pretrained encoder or decoder with a head of its classes, new unless it was saved with one.

    GLUE's test splits have no labels: where that is so, a hash of its text puts each sample of the source's validation split
    into 'validation' or into 'test', about half of them each. A test split whose labels are all there is taken as it is. MNLI
    takes its matched part and also has 'validation_mismatched'.

    **Arguments**

    - `task`: a key of `GLUE`; default 'sst2'.
    - `model`: Hub name, folder or `packaged:NAME` of any model with a sequence classification class; default 'bert-base-uncased'.
    - `data`: Hub name or folder; default 'nyu-mll/glue', whose configuration `task` is loaded. Any other source must have the
      columns of `task` itself; a column 'text' may stand for the one of a single sentence, as in 'SetFit/sst2'.
    - `max_length`: tokens per sample; longer ones are cut. Default 128.
    - `layers`: names or patterns of the targeted layers; default all inside blocks.

    **Raises**

    - `ValueError`: unknown task; the source lacks a column; no token of the tokenizer can pad.
    """
    require(task in GLUE, "task", f"be one of {sorted(GLUE)}", task)
    facts = GLUE[task]
    source = load_splits(data, task if data.endswith("/glue") else None)
    fields = _find_fields(facts.fields, next(iter(source.values())).column_names)
    folder = find_model(model)
    tokenizer = give_padding(load_tokenizer(folder))
    rows = _select_rows(source, facts.validation, fields)

    def make_model() -> nn.Module:
        classifier = load_pretrained(
            "AutoModelForSequenceClassification", folder, num_labels=facts.classes, torch_dtype=torch.float32
        )
        set_padding(classifier, tokenizer.pad_token_id)
        return classifier

    return Task(
        name=f"glue/{task}",
        splits={split: _encode(part, fields, tokenizer, max_length) for split, part in rows.items()},
        make_model=make_model,
        objective="classification" if facts.classes > 1 else "regression",
        metrics=facts.metrics,
        collate=Padded(tokenizer),
        layers=tuple(layers),
        fingerprints={
            "data": {split: part._fingerprint for split, part in rows.items()},
            "revision": model_revision(model),
        },
    )


def _find_fields(fields: tuple[str, ...], columns: list[str]) -> tuple[str, ...]:
    """Return the columns that hold the sentences of a source."""
    if fields == ("sentence",) and "sentence" not in columns and "text" in columns:
        return ("text",)
    require({*fields, "label"} <= {*columns}, "data", f"have the columns {[*fields, 'label']}", columns)
    return fields


def _select_rows(source: Any, validation: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return split -> rows of the source, with a test split that has labels."""
    test = validation.replace("validation", "test")
    names = {"train": "train", "validation": validation, "test": test, **{split: split for split in FURTHER_SPLITS}}
    rows = {split: source[name] for split, name in names.items() if name in source}
    if "test" in rows and not _has_labels(rows["test"]):
        del rows["test"]
    if "validation" in rows and "test" not in rows:
        whole = rows["validation"]
        texts = ["\n".join(sentences) for sentences in zip(*(whole[name] for name in fields), strict=True)]
        halves = zip(("validation", "test"), halve(texts), strict=True)
        rows |= {split: whole.select(positions) for split, positions in halves}
    return rows


def _has_labels(rows: Any) -> bool:
    return "label" in rows.column_names and all(label is not None and label >= 0 for label in rows["label"])


def _encode(rows: Any, fields: tuple[str, ...], tokenizer: Any, max_length: int) -> Encoded:
    """Return all columns of the tokenizer, `token_type_ids` among them, and the labels."""
    texts = [list(rows[name]) for name in fields]
    columns = tokenizer(*texts, truncation=True, max_length=max_length)
    return Encoded({**columns, "labels": list(rows["label"])})
