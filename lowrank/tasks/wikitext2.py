"""WikiText-2 perplexity and any causal language model of transformers.

This is the protocol of the published tables, which report the test split. All lines of a split, empty ones included, are
joined by blank lines and tokenised once. The text is cut into chunks of `length` tokens without overlap; the rest is dropped.
Each chunk predicts its later tokens from scratch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank.io.checks import SPLITS, require
from lowrank.io.hub import load_pretrained, load_splits, load_tokenizer, revision
from lowrank.nn.targets import BLOCKS
from lowrank.tasks.task import Task
from lowrank.tasks.text import Chunks


def load(
    model: str = "meta-llama/Llama-2-7b-hf",
    data: str = "Salesforce/wikitext",
    config: str | None = "wikitext-2-v1",
    length: int = 2048,
    dtype: str = "float16",
    layers: list[str] | tuple[str, ...] = BLOCKS,
    auto: str = "AutoModelForCausalLM",
) -> Task:
    """Load WikiText-2 and a causal language model.

    The splits are those of the source. If it has no train split, the first half of the lines of its validation split serves to
    calibrate, and the second half to choose.

    **Arguments**

    - `model`: Hub name or folder of any causal language model; default 'meta-llama/Llama-2-7b-hf'.
    - `data`: Hub name or folder; default 'Salesforce/wikitext'.
    - `config`: the configuration of the data set; None for a source that has only one. Default 'wikitext-2-v1', the version
      with <unk> in place of rare words. 'wikitext-2-raw-v1' has those words: the published tables of LLaMA use it.
    - `length`: tokens per chunk, >= 2; default 2048, as in the published tables.
    - `dtype`: of the weights, the name of a floating torch dtype; default 'float16'.
    - `layers`: names or patterns of the targeted layers; default all inside blocks.
    - `auto`: the class of transformers that loads the model, default 'AutoModelForCausalLM'. 'AutoModelForImageTextToText'
      loads vision-language models, whose text part is used.
    """
    weights = getattr(torch, dtype, None)
    floating = isinstance(weights, torch.dtype) and weights.is_floating_point
    require(floating, "dtype", "be the name of a floating torch dtype", dtype)
    source = load_splits(data, config)
    tokenizer = load_tokenizer(model)

    def tokenise(lines: list[str]) -> Tensor:
        return tokenizer("\n\n".join(lines), return_tensors="pt", verbose=False)["input_ids"][0]

    def make_model() -> nn.Module:
        return load_pretrained(auto, model, torch_dtype=weights)

    return Task(
        name="wikitext2",
        splits={split: Chunks(tokenise(lines), length) for split, lines in _read_lines(source).items()},
        make_model=make_model,
        objective="language_modelling",
        metrics=("perplexity",),
        layers=tuple(layers),
        fingerprints={
            "data": {split: source[split]._fingerprint for split in SPLITS if split in source},
            "revision": revision(model),
        },
    )


def _read_lines(source: Any) -> dict[str, list[str]]:
    """Return split -> lines, with a train split wherever there is a validation split."""
    lines = {split: list(source[split]["text"]) for split in SPLITS if split in source}
    if "train" not in lines and "validation" in lines:
        middle = len(lines["validation"]) // 2
        lines |= {"train": lines["validation"][:middle], "validation": lines["validation"][middle:]}
    return lines
