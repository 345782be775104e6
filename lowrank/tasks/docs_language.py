"""Language modelling on docstring paragraphs: a small Llama with grouped-query attention, trained from scratch."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from lowrank.io.checks import SPLITS, require
from lowrank.tasks.docs import CORPUS_PACKAGES, corpus_hash, read_corpus
from lowrank.tasks.task import Task
from lowrank.tasks.text import Chunks, train_tokenizer


def load(
    hidden: int = 128,
    depth: int = 4,
    heads: int = 4,
    key_value_heads: int = 2,
    intermediate: int = 352,
    vocabulary: int = 1024,
    length: int = 128,
    validation_samples: int = 512,
    test_samples: int = 512,
    packages: tuple[str, ...] | list[str] = CORPUS_PACKAGES,
) -> Task:
    """Load docstring paragraphs as one text per split, cut into chunks, and a Llama with new weights.

    No file has paragraphs in two splits. The tokenizer is a byte-level BPE, trained on the training
    paragraphs of all packages, so that models of different packages share one vocabulary.

    **Arguments**

    - `hidden`: embedding size; default 128.
    - `depth`: blocks; default 4.
    - `heads`: attention heads, a divisor of `hidden`; default 4.
    - `key_value_heads`: heads of keys and values, a divisor of `heads`; default 2.
    - `intermediate`: width of the MLPs; default 352.
    - `vocabulary`: tokens of the tokenizer; default 1024.
    - `length`: tokens per chunk; default 128.
    - `validation_samples`: chunks to choose on, spread evenly over the validation text; default 512.
    - `test_samples`: chunks to report on, spread evenly over the test text; default 512.
    - `packages`: names among `lowrank.tasks.docs.CORPUS_PACKAGES` whose text is used; default all.
    """
    import transformers  # noqa: PLC0415

    held_out = dict(validation=validation_samples, test=test_samples)
    tokenizer = train_tokenizer([p.text for p in read_corpus() if p.split == "train"], vocabulary, sentence=False)

    def make_model() -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=4 * length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
        return transformers.LlamaForCausalLM(config)

    return Task(
        name="docs_language",
        splits=split_corpus(tokenizer, packages, length, tokenizer.bos_token_id, **held_out),
        make_model=make_model,
        objective="language_modelling",
        metrics=("perplexity",),
        fingerprints={"data": corpus_hash()},
    )


def check_packages(packages: tuple[str, ...] | list[str]) -> None:
    """Raise an error that lists the known packages unless all are among them."""
    unknown = sorted(set(packages) - set(CORPUS_PACKAGES))
    require(not unknown, "packages", f"be among {list(CORPUS_PACKAGES)}", unknown)


def split_corpus(
    tokenizer: Any,
    packages: tuple[str, ...] | list[str],
    length: int,
    between: int,
    start: int | None = None,
    **held_out: int,
) -> dict[str, Chunks | Subset]:
    """Cut the paragraphs of each split into chunks.

    **Arguments**

    - `tokenizer`: of transformers.
    - `packages`: whose text is used.
    - `length`: tokens per chunk.
    - `between`: the token in front of every paragraph.
    - `start`: the token that every chunk starts with. Default None, none.
    - `held_out`: split -> chunks of it, spread evenly over its text.

    **Returns** split -> chunks, all of the training text.

    **Raises**

    - `ValueError`: an unknown package; more chunks than a split has.
    """
    check_packages(packages)
    used = [p for p in read_corpus() if CORPUS_PACKAGES[p.package] in packages]
    chunks = {}
    for split in SPLITS:
        encoded = tokenizer([p.text for p in used if p.split == split], add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([token for ids in encoded for token in (between, *ids)])
        chunks[split] = Chunks(tokens, length, start)
    return chunks | {split: _spread(chunks[split], size, f"{split}_samples") for split, size in held_out.items()}


def _spread(chunks: Chunks, samples: int, argument: str) -> Subset:
    """Return chunks at even distances."""
    size = len(chunks)
    require(1 <= samples <= size, argument, f"be in [1, {size}]", samples)
    return Subset(chunks, torch.linspace(0, size - 1, samples).long().tolist())
