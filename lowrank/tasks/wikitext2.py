"""WikiText-2 perplexity and any causal language model of transformers.

Protocol of the published tables: all lines of the split, empty ones included, joined by blank lines; tokenised once;
cut into chunks of `length` tokens without overlap, the rest dropped; next-token cross-entropy inside each chunk.
"""

import torch
from torch import Tensor, nn

from lowrank.io.hub import load_pretrained, load_splits, load_tokenizer, revision
from lowrank.nn.targets import BLOCKS
from lowrank.tasks.task import Task
from lowrank.tasks.text import Chunks


def load(
    model: str = "meta-llama/Llama-2-7b-hf",
    data: str = "Salesforce/wikitext",
    config: str | None = "wikitext-2-raw-v1",
    length: int = 2048,
    dtype: str = "float16",
    layers: list[str] | tuple[str, ...] = BLOCKS,
    auto: str = "AutoModelForCausalLM",
) -> Task:
    """Next token on WikiText-2. 'validation' here is the published *test* split, which the tables report.

    **Arguments:** `model`: Hub name or folder of any causal language model. `data`, `config`: Hub name or folder and its
    configuration. `length`: tokens per chunk. `dtype`: of the weights, by its torch name. `layers`: targeted layers.
    `auto`: the class of transformers to load with; 'AutoModelForImageTextToText' for vision-language models, of which the text
    part is used. The source's own validation split, where it has no train split, serves to calibrate.
    """
    weights = getattr(torch, dtype, None)
    if not (isinstance(weights, torch.dtype) and weights.is_floating_point):
        raise ValueError(f"`dtype` must be the name of a floating torch dtype, got {dtype!r}.")
    source = load_splits(data, config)
    tokenizer = load_tokenizer(model)

    def tokens(split: str) -> Tensor:
        text = "\n\n".join(source[split]["text"])
        return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]

    def make_model() -> nn.Module:
        return load_pretrained(auto, model, torch_dtype=weights)

    calibration = "train" if "train" in source else "validation"
    splits = {"train": calibration, "validation": "test"}
    return Task(
        name="wikitext2",
        splits={name: Chunks(tokens(split), length) for name, split in splits.items()},
        make_model=make_model,
        objective="language_modelling",
        metrics=("perplexity",),
        identity={
            "task": "wikitext2",
            "data": {split: source[split]._fingerprint for split in splits.values()},
            "model": model,
            "revision": revision(model),
            "length": length,
            "dtype": dtype,
        },
        layers=tuple(layers),
    )
