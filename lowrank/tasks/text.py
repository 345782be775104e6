"""Text as tensors: train tokenizers, pad batches for classifiers, cut chunks for language models."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from lowrank.io.checks import require


def train_tokenizer(texts: Iterable[str], vocabulary: int, sentence: bool) -> Any:
    """Train a fast byte-level BPE tokenizer. It is deterministic, which WordPiece training is not.

    **Arguments**

    - `texts`: the texts to train on.
    - `vocabulary`: tokens, special tokens included.
    - `sentence`: True for classifiers: lower case, [CLS] text [SEP], and padding. False for language models: the text alone,
      and <s> to separate texts.
    """
    import tokenizers  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    special = ["[PAD]", "[CLS]", "[SEP]"] if sentence else ["<s>"]
    bpe = tokenizers.ByteLevelBPETokenizer(lowercase=sentence)
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special, show_progress=False)
    if not sentence:
        return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="<s>")
    bpe._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, bpe.token_to_id(token)) for token in special[1:]]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def give_padding(tokenizer: Any) -> Any:
    """Give a tokenizer without a token for padding the one that ends a text, or another that it has: it is masked anyway.

    **Raises**

    - `ValueError`: it has no such token.
    """
    tokens = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token]
    tokenizer.pad_token = next((token for token in tokens if token is not None), None)
    rule = "have a tokenizer with a token for padding, for the end or the start of a text, or for unknown words"
    require(tokenizer.pad_token is not None, "model", rule, tokenizer.name_or_path)
    return tokenizer


def set_padding(model: Any, token: int) -> None:
    """Set which token pads in a model: a decoder takes the last other token of each text as its summary.

    **Arguments**

    - `model`: of transformers; its configuration is changed.
    - `token`: the number of the token.

    **Raises**

    - `ValueError`: the model does not know the token.
    """
    known = model.get_input_embeddings().weight.shape[0]
    require(
        token < known, "model", f"know the padding token of its tokenizer, and have more than {token} tokens", known
    )
    model.config.get_text_config().pad_token_id = token


def read_dtype(name: str) -> torch.dtype:
    """Return the floating torch dtype of a name, for the option `dtype` of a task.

    **Raises**

    - `ValueError`: no such dtype.
    """
    found: Any = getattr(torch, name, None)
    floating = isinstance(found, torch.dtype) and found.is_floating_point
    require(floating, "dtype", "be the name of a floating torch dtype", name)
    return found


class Encoded(Dataset):
    """Hold the columns of a tokenizer, and return one mapping per sample.

    **Arguments**

    - `columns`: `input_ids`, ..., `labels` -> one entry per sample.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


class Padded:
    """Collate encoded samples: pad to the longest of the batch, and keep `attention_mask` and `token_type_ids`.

    **Arguments**

    - `tokenizer`: of transformers, with a token for padding.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        targets = torch.tensor([sample["labels"] for sample in samples])
        inputs = [{key: value for key, value in sample.items() if key != "labels"} for sample in samples]
        return {**self.tokenizer.pad(inputs, return_tensors="pt"), "labels": targets}


def find_start(tokenizer: Any) -> int | None:
    """Return the token for the beginning of a text that a tokenizer puts in front of each, None if it puts none there.

    **Arguments**

    - `tokenizer`: of transformers.
    """
    tokens = tokenizer("a")["input_ids"]
    return tokens[0] if tokenizer.bos_token_id is not None and tokens[:1] == [tokenizer.bos_token_id] else None


class Chunks(Dataset):
    """Cut one stream of tokens into chunks without overlap; tokens that do not fill a chunk are dropped.

    **Arguments**

    - `tokens`: `(tokens,)`, integers.
    - `length`: tokens per chunk, at least 1, and 2 with `start`.
    - `start`: a token that every chunk starts with, as one of its `length`. Default None: chunks are of the stream alone.

    **Raises**

    - `ValueError`: a length out of its range, or more than the text has.
    """

    def __init__(self, tokens: Tensor, length: int, start: int | None = None) -> None:
        of_text = length - (start is not None)
        require(of_text > 0, "length", "be at least 1, and 2 where each chunk starts with the same token", length)
        count = len(tokens) // of_text
        require(count > 0, "length", f"be at most the {len(tokens)} tokens of the text", length)
        self.chunks = tokens[: count * of_text].view(count, of_text)
        if start is not None:
            self.chunks = functional.pad(self.chunks, (1, 0), value=start)

    def draw(self, count: int, argument: str = "count") -> "Chunks":
        """Return some of the chunks in their order, drawn at random but always the same ones.

        **Arguments**

        - `count`: how many, in [1, chunks].
        - `argument`: its name in an error. Default 'count'.

        **Raises**

        - `ValueError`: a count out of its range.
        """
        require(1 <= count <= len(self), argument, f"be in [1, {len(self)}], the number of chunks", count)
        drawn = copy.copy(self)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        drawn.chunks = self.chunks[order[:count].sort().values]
        return drawn

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.chunks[index], "labels": self.chunks[index]}
