"""Language modelling on docstring paragraphs: a small Llama with grouped-query attention, trained from scratch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from lowrank.tasks.docs import PACKAGES, corpus_hash, read_corpus
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
    packages: tuple[str, ...] | list[str] = PACKAGES,
) -> Task:
    """Next token. A byte-level BPE tokenizer is trained on the training part; files of one side give no text to the other.

    **Arguments:** `hidden`, `depth`, `heads`, `key_value_heads`, `intermediate`: sizes of the Llama. `vocabulary`: tokens.
    `length`: tokens per chunk. `validation_samples`: held-out chunks that are reported on, spread evenly over the held-out
    text. `packages`: those whose text is used.
    """
    import transformers  # noqa: PLC0415

    if unknown := sorted(set(packages) - set(PACKAGES)):
        raise ValueError(f"`packages` must be among {list(PACKAGES)}, got {unknown}.")
    used = [p for p in read_corpus() if PACKAGES[p.package] in packages]
    texts = {side: [p.text for p in used if p.held_out == (side == "validation")] for side in ("train", "validation")}
    # The tokenizer always sees all packages, so that models trained on some of them share one vocabulary.
    tokenizer = train_tokenizer([p.text for p in read_corpus() if not p.held_out], vocabulary, sentence=False)

    def stream(paragraphs: list[str]) -> Tensor:
        encoded = tokenizer(paragraphs, add_special_tokens=False)["input_ids"]
        return torch.tensor([token for ids in encoded for token in (tokenizer.bos_token_id, *ids)])

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

    sizes: dict[str, Any] = {
        "hidden": hidden,
        "depth": depth,
        "heads": heads,
        "key_value_heads": key_value_heads,
        "intermediate": intermediate,
        "vocabulary": vocabulary,
        "length": length,
        "validation_samples": validation_samples,
        "packages": list(packages),
    }
    train, held_out = (Chunks(stream(texts[side]), length) for side in ("train", "validation"))
    if not 1 <= validation_samples <= len(held_out):
        raise ValueError(f"`validation_samples` must be in [1, {len(held_out)}], got {validation_samples}.")
    spread = torch.linspace(0, len(held_out) - 1, validation_samples).long().tolist()
    return Task(
        name="docs_language",
        splits={"train": train, "validation": Subset(held_out, spread)},
        make_model=make_model,
        objective="language_modelling",
        metrics=("perplexity",),
        identity={"task": "docs_language", "data": corpus_hash(), **sizes},
    )
