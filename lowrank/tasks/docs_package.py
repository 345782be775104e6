"""Which package is this docstring paragraph from? Five balanced classes, a small BERT trained from scratch."""

from typing import Any

import torch
from torch import nn

from lowrank.io.checks import require
from lowrank.tasks.docs import CORPUS_PACKAGES, Paragraph, corpus_hash, read_corpus
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
    test_samples: int = 2000,
) -> Task:
    """Load paragraphs with their package as label, and a BERT classifier with new weights.

    Classes are balanced. No file has paragraphs in two splits. The tokenizer is a byte-level BPE, trained on
    the training paragraphs.

    **Arguments**

    - `hidden`: embedding size; default 128.
    - `depth`: blocks; default 4.
    - `heads`: attention heads, a divisor of `hidden`; default 4.
    - `intermediate`: width of the MLPs; default 512.
    - `vocabulary`: tokens of the tokenizer; default 4096.
    - `max_length`: tokens per paragraph; longer ones are cut. Default 64.
    - `train_samples`: paragraphs, divided equally among the classes; default 12000.
    - `validation_samples`: paragraphs to choose on, divided equally among the classes; default 2000.
    - `test_samples`: paragraphs to report on, divided equally among the classes; default 2000.
    """
    import transformers  # noqa: PLC0415

    samples = {"train": train_samples, "validation": validation_samples, "test": test_samples}
    paragraphs = {split: _balance(split, size) for split, size in samples.items()}
    tokenizer = train_tokenizer([p.text for p in paragraphs["train"]], vocabulary, sentence=True)

    def make_model() -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=max_length,
            num_labels=len(CORPUS_PACKAGES),  # pyright: ignore[reportCallIssue] (every configuration takes it)
            pad_token_id=tokenizer.pad_token_id,
        )
        return transformers.BertForSequenceClassification(config)

    return Task(
        name="docs_package",
        splits={name: _encode(rows, tokenizer, max_length) for name, rows in paragraphs.items()},
        make_model=make_model,
        objective="classification",
        metrics=("accuracy",),
        collate=Padded(tokenizer),
        fingerprints={"data": corpus_hash()},
    )


def _encode(paragraphs: list[Paragraph], tokenizer: Any, max_length: int) -> Encoded:
    columns = tokenizer([p.text for p in paragraphs], truncation=True, max_length=max_length)
    return Encoded({**columns, "labels": [p.package for p in paragraphs]})


def _balance(split: str, samples: int) -> list[Paragraph]:
    """Select `samples` paragraphs of a split at random with a fixed seed, the same number from every package."""
    each = samples // len(CORPUS_PACKAGES)
    generator = torch.Generator().manual_seed(0)
    selected: list[Paragraph] = []
    for label, package in enumerate(CORPUS_PACKAGES):
        candidates = [p for p in read_corpus() if p.split == split and p.package == label]
        highest = len(CORPUS_PACKAGES) * len(candidates)
        rule = f"be in [{len(CORPUS_PACKAGES)}, {highest}] ({package!r} has {len(candidates)} paragraphs)"
        require(1 <= each <= len(candidates), f"{split}_samples", rule, samples)
        selected += [candidates[i] for i in torch.randperm(len(candidates), generator=generator)[:each].tolist()]
    return selected
