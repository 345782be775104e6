"""WikiText-2 perplexity and any causal language model of transformers.

This is the protocol of the published tables, which report the test split. All lines of a split, empty ones included, are
joined by blank lines and tokenised once. The text is cut into chunks of `length` tokens without overlap; the rest is dropped.
Each chunk predicts its later tokens from scratch.

Published tables of LLaMA cut the text as it is, so that only the first chunk starts with the token for the beginning of a text.
A model that never saw text without it, as Gemma, is no good there. So by default each chunk starts with that token
if the tokenizer puts it in front of a text; `bos=False` is the published form.
"""

from typing import Any

from torch import nn

from lowrank.io.checks import SPLITS
from lowrank.io.hub import load_pretrained, load_splits, load_tokenizer
from lowrank.nn.targets import BLOCKS
from lowrank.tasks.task import Task
from lowrank.tasks.text import Chunks, find_start, read_dtype
from lowrank.tasks.wheels import find_model, model_revision


def load(
    model: str = "meta-llama/Llama-2-7b-hf",
    data: str = "Salesforce/wikitext",
    config: str | None = "wikitext-2-v1",
    length: int = 2048,
    dtype: str = "float16",
    layers: list[str] | tuple[str, ...] = BLOCKS,
    auto: str = "AutoModelForCausalLM",
    bos: bool = True,
    evaluation_chunks: int | None = None,
) -> Task:
    """Load WikiText-2 and a causal language model.

    The splits are those of the source. If it has no train split, the first half of the lines of its validation split serves to
    calibrate, and the second half to choose.

    **Arguments**

    - `model`: Hub name, folder, GGUF file or `packaged:NAME` of any causal language model; default 'meta-llama/Llama-2-7b-hf'.
    - `data`: Hub name or folder; default 'Salesforce/wikitext'.
    - `config`: the configuration of the data set; None for a source that has only one. Default 'wikitext-2-v1', the version
      with <unk> in place of rare words. 'wikitext-2-raw-v1' has those words: the published tables of LLaMA use it.
    - `length`: tokens per chunk, >= 2; default 2048, as in the published tables.
    - `dtype`: of the weights, the name of a floating torch dtype; default 'float16'.
    - `layers`: names or patterns of the targeted layers; default all inside blocks.
    - `auto`: the class of transformers that loads the model, default 'AutoModelForCausalLM'. 'AutoModelForImageTextToText'
      loads vision-language models, whose text part is used.
    - `bos`: start every chunk with the token for the beginning of a text, if the tokenizer starts a text with it. That token is
      one of the `length`, and never a target. Default True; False is the form of the published tables of LLaMA.
    - `evaluation_chunks`: how many chunks of validation and of test to keep, drawn once, the same ones for all; at least 1.
      Default None, all.

    **Raises**

    - `ValueError`: a value out of its range, or more chunks than there are.
    """
    weights = read_dtype(dtype)
    source = load_splits(data, config)
    folder = find_model(model)
    tokenizer = load_tokenizer(folder)
    start = find_start(tokenizer) if bos else None

    def cut(split: str, lines: list[str]) -> Chunks:
        tokens = tokenizer("\n\n".join(lines), return_tensors="pt", verbose=False)["input_ids"][0]
        chunks = Chunks(tokens if start is None else tokens[1:], length, start)
        if split == "train" or evaluation_chunks is None:
            return chunks
        return chunks.draw(evaluation_chunks, "evaluation_chunks")

    def make_model() -> nn.Module:
        return load_pretrained(auto, folder, torch_dtype=weights)

    return Task(
        name="wikitext2",
        splits={split: cut(split, lines) for split, lines in _read_lines(source).items()},
        make_model=make_model,
        objective="language_modelling",
        metrics=("perplexity",),
        layers=tuple(layers),
        fingerprints={
            "data": {split: source[split]._fingerprint for split in SPLITS if split in source},
            "revision": model_revision(model),
        },
    )


def _read_lines(source: Any) -> dict[str, list[str]]:
    """Return split -> lines, with a train split wherever there is a validation split."""
    lines = {split: list(source[split]["text"]) for split in SPLITS if split in source}
    if "train" not in lines and "validation" in lines:
        middle = len(lines["validation"]) // 2
        lines |= {"train": lines["validation"][:middle], "validation": lines["validation"][middle:]}
    return lines
