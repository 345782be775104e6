"""Text as tensors: tokenizers trained on the spot, padded batches for classifiers, chunks for language models."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


def train_tokenizer(texts: Iterable[str], vocabulary: int, sentence: bool) -> Any:
    """A fast byte-level BPE tokenizer. Training is deterministic, which WordPiece training is not.

    **Arguments:** `sentence`: lower case, [CLS] text [SEP] and padding, as a classifier reads; else the text alone,
    with <s> at hand to separate texts.
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


class Encoded(Dataset):
    """A tokenizer's columns (`input_ids`, ..., `labels`) as one mapping per sample."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


class Padded:
    """Collates encoded samples: padded to the longest of the batch, `attention_mask` and `token_type_ids` kept."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        targets = torch.tensor([sample["labels"] for sample in samples])
        inputs = [{key: value for key, value in sample.items() if key != "labels"} for sample in samples]
        return {**self.tokenizer.pad(inputs, return_tensors="pt"), "labels": targets}


class Chunks(Dataset):
    """One token stream cut into chunks of equal length without overlap; what does not fill a chunk is dropped."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        count = len(tokens) // length
        if count == 0:
            raise ValueError(f"`length` must be at most the {len(tokens)} tokens of the text, got {length}.")
        self.chunks = tokens[: count * length].view(count, length)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.chunks[index], "labels": self.chunks[index]}
