"""Language modelling on docstring paragraphs with a pretrained model of transformers: text that it can still learn from."""

from typing import Any

from torch import nn

from lowrank.io.checks import require
from lowrank.io.hub import load_pretrained, load_tokenizer
from lowrank.nn.targets import BLOCKS
from lowrank.tasks.docs import CORPUS_PACKAGES, corpus_hash
from lowrank.tasks.docs_language import split_corpus
from lowrank.tasks.task import Task
from lowrank.tasks.text import find_start, read_dtype
from lowrank.tasks.wheels import find_model, model_revision


def load(
    model: str = "HuggingFaceTB/SmolLM2-135M",
    length: int = 128,
    validation_samples: int = 256,
    test_samples: int = 256,
    dtype: str = "float32",
    packages: tuple[str, ...] | list[str] = CORPUS_PACKAGES,
    layers: list[str] | tuple[str, ...] = BLOCKS,
) -> Task:
    """Load docstring paragraphs, cut into chunks of a pretrained model's own tokens, and that model.

    Splits are those of the task 'docs_language'. Paragraphs are joined by the token for the beginning or the end of a text; every
    chunk starts with the former if the tokenizer starts texts with it.

    **Arguments**

    - `model`: Hub name, folder, GGUF file or `packaged:NAME` of any causal language model whose tokenizer has such a token;
      default 'HuggingFaceTB/SmolLM2-135M'.
    - `length`: tokens per chunk; default 128.
    - `validation_samples`: chunks to choose on, spread evenly over the validation text; default 256.
    - `test_samples`: chunks to report on, spread evenly over the test text; default 256.
    - `dtype`: of the weights, the name of a floating torch dtype; default 'float32'.
    - `packages`: names among `lowrank.tasks.docs.CORPUS_PACKAGES` whose text is used; default all.
    - `layers`: names or patterns of the targeted layers; default all inside blocks.

    **Raises**

    - `ValueError`: a value out of its range; a tokenizer without a token for the beginning or the end of a text.
    """
    weights = read_dtype(dtype)
    folder = find_model(model)
    tokenizer = load_tokenizer(folder)
    between: Any = next((one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None), None)
    require(between is not None, "model", "have a tokenizer with a token for the beginning or the end of a text", model)

    def make_model() -> nn.Module:
        return load_pretrained("AutoModelForCausalLM", folder, torch_dtype=weights)

    held_out = dict(validation=validation_samples, test=test_samples)
    return Task(
        name="docs_pretrained",
        splits=split_corpus(tokenizer, packages, length, between, find_start(tokenizer), **held_out),
        make_model=make_model,
        objective="language_modelling",
        metrics=("perplexity",),
        layers=tuple(layers),
        fingerprints={"data": corpus_hash(), "revision": model_revision(model)},
    )
