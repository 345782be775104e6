"""Which package is this docstring paragraph from? Five balanced classes, a small BERT trained from scratch."""

from typing import Any

import torch
from torch import nn

from lowrank.tasks.docs import PACKAGES, Paragraph, corpus_hash, read_corpus
from lowrank.tasks.task import Task
from lowrank.tasks.text import Encoded, Padded, train_tokenizer


def load(
    hidden: int = 128,
    depth: int = 4,
    heads: int = 4,
    intermediate: int = 512,
    vocabulary: int = 4096,
    max_length: int = 64,
    train_samples: int = 12000,
    validation_samples: int = 2000,
) -> Task:
    """Which package? Balanced classes; files of the held-out part give no paragraph to the training part.

    **Arguments:** `hidden`, `depth`, `heads`, `intermediate`: sizes of the BERT. `vocabulary`: tokens of a
    byte-level BPE tokenizer trained on the training part. `max_length`: tokens per paragraph, the rest is cut. `train_samples`,
    `validation_samples`: paragraphs, split evenly over the classes.
    """
    import transformers  # noqa: PLC0415

    train = _balanced([p for p in read_corpus() if not p.held_out], train_samples, "train_samples")
    validation = _balanced([p for p in read_corpus() if p.held_out], validation_samples, "validation_samples")
    tokenizer = train_tokenizer([p.text for p in train], vocabulary, sentence=True)

    def dataset(paragraphs: list[Paragraph]) -> Encoded:
        columns = tokenizer([p.text for p in paragraphs], truncation=True, max_length=max_length)
        return Encoded({**columns, "labels": [p.package for p in paragraphs]})

    def make_model() -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=max_length,
            num_labels=len(PACKAGES),  # pyright: ignore[reportCallIssue] (every configuration takes it)
            pad_token_id=tokenizer.pad_token_id,
        )
        return transformers.BertForSequenceClassification(config)

    sizes: dict[str, Any] = {
        "hidden": hidden,
        "depth": depth,
        "heads": heads,
        "intermediate": intermediate,
        "vocabulary": vocabulary,
        "max_length": max_length,
        "train_samples": train_samples,
        "validation_samples": validation_samples,
    }
    return Task(
        name="docs_package",
        splits={"train": dataset(train), "validation": dataset(validation)},
        make_model=make_model,
        objective="classification",
        metrics=("accuracy",),
        identity={"task": "docs_package", "data": corpus_hash(), **sizes},
        collate=Padded(tokenizer),
    )


def _balanced(paragraphs: list[Paragraph], samples: int, argument: str) -> list[Paragraph]:
    """`samples` paragraphs, the same number from every package, drawn with a fixed seed."""
    each = samples // len(PACKAGES)
    generator = torch.Generator().manual_seed(0)
    chosen: list[Paragraph] = []
    for label, package in enumerate(PACKAGES):
        own = [p for p in paragraphs if p.package == label]
        if not 1 <= each <= len(own):
            raise ValueError(
                f"`{argument}` must be in [{len(PACKAGES)}, {len(PACKAGES) * len(own)}] "
                f"({package!r} has {len(own)} paragraphs), got {samples}."
            )
        chosen += [own[i] for i in torch.randperm(len(own), generator=generator)[:each].tolist()]
    return chosen
