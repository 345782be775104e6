"""Turn any data set into batches of any model: chunks for language models, padded texts for encoders, images for the others."""

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.nn.batches import Batch
from lowrank.tasks.named_data import (
    DataSource,
    find_image_column,
    find_label_column,
    find_text_columns,
    is_chat,
    render_chat,
)
from lowrank.tasks.named_model import TEXT, NamedModel
from lowrank.tasks.text import give_padding, set_padding

USUAL_LENGTH = 512  # tokens of a sample, for models that take as many


@check_arguments
def calibration_batches(
    named: NamedModel,
    source: DataSource,
    samples: int = 256,
    *,
    length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Batch]:
    """Draw samples from a data set, as batches without labels.

    A causal language model gets chunks of `length` tokens without padding: each starts at a random row and goes on over the rows
    that follow, joined by blank lines; chats follow each other as the template ends them. Other models of text get random rows,
    cut after `length` tokens and padded; empty ones are skipped. Models of images get random images.

    **Arguments**

    - `named`: from `load_named`.
    - `source`: the rows.
    - `samples`: how many, >= 1; no more rows than there are, chunks as many as you like. Default 256.
    - `length`: tokens per sample, >= 2; default 512, or what the model takes if that is less.
    - `batch_size`: samples per batch. Default 8.
    - `seed`: of the draw. Default 0.

    **Raises**

    - `FileNotFoundError`, `ValueError`: see `read_rows`; no column of the kind that the model reads; a length that the model
      does not take; fewer tokens than `length`; a tokenizer of another model; chats without a template.
    """
    require(samples >= 1, "samples", "be >= 1", samples)
    require(batch_size >= 1, "batch_size", "be >= 1", batch_size)
    generator = torch.Generator().manual_seed(seed)
    if named.reads != TEXT:
        rows = source.rows
        order = torch.randperm(len(rows), generator=generator)[:samples].tolist()
        return list(_image_batches(named, rows, source, order, batch_size, labelled=False))
    length = choose_length(named, length)
    rows = source.rows
    if named.objective == "language_modelling":
        starts = torch.randint(len(rows), (samples,), generator=generator).tolist()
        chunks = [_take_chunk(named, rows, source, start, length) for start in starts]
        return [
            _check_tokens(named, {TEXT: torch.stack(chunks[i : i + batch_size])}) for i in range(0, samples, batch_size)
        ]
    order = _skip_empty(rows, find_text_columns(rows, source), torch.randperm(len(rows), generator=generator), samples)
    return list(_text_batches(named, rows, source, _split(order, batch_size), length))


@check_arguments
def labelled_batches(
    named: NamedModel,
    source: DataSource,
    samples: int | None = None,
    *,
    length: int | None = None,
    batch_size: int = 8,
) -> Iterator[Batch]:
    """Read a data set as batches with labels, for a classifier or a regression.

    **Arguments**

    - `named`: from `load_named`.
    - `source`: the rows.
    - `samples`: how many of the first rows; default None, all.
    - `length`: tokens per sample; longer ones are cut. Default 512, or what the model takes if that is less.
    - `batch_size`: samples per batch. Default 8.

    **Raises**

    - `FileNotFoundError`, `ValueError`: as for `calibration_batches`; no column of labels; a label that is no class of the model.
    """
    require(samples is None or samples >= 1, "samples", "be >= 1", samples)
    require(batch_size >= 1, "batch_size", "be >= 1", batch_size)
    rows = source.rows
    order = list(range(min(len(rows), samples or len(rows))))
    if named.reads != TEXT:
        return _image_batches(named, rows, source, order, batch_size, labelled=True)
    return _text_batches(named, rows, source, _split(order, batch_size), choose_length(named, length), labelled=True)


def read_text(named: NamedModel, source: DataSource) -> Tensor:
    """Return all rows as one stream of tokens, `(tokens,)`: lines joined by blank lines, as `perplexity` takes WikiText-2.

    **Arguments**

    - `named`: from `load_named`.
    - `source`: the rows.
    """
    rows = source.rows
    tokens = _encode_rows(named, rows, source, range(len(rows)))
    return _check_tokens(named, {TEXT: torch.tensor(tokens)})[TEXT]


def choose_length(named: NamedModel, length: int | None, usual: int = USUAL_LENGTH) -> int:
    """Return a number of tokens that a model takes.

    **Arguments**

    - `named`: from `load_named`.
    - `length`: the number that is asked for; None for the usual one.
    - `usual`: the usual one, less if the model takes less. Default 512.

    **Raises**

    - `ValueError`: fewer than 2, or more than the model takes.
    """
    config = named.model.config.get_text_config()
    known = (getattr(config, "max_position_embeddings", None), getattr(named.processor, "model_max_length", None))
    longest = min((int(number) for number in known if number and number > 0), default=math.inf)
    rule = f"be in [2, {longest}], what the model takes"
    require(length is None or 2 <= length <= longest, "length", rule, length)
    return int(min(usual, longest)) if length is None else length


def _split(order: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _encode_rows(named: NamedModel, rows: Any, source: DataSource, positions: Iterable[int]) -> list[int]:
    """Return the tokens of rows one after the other."""
    columns = find_text_columns(rows, source)
    require(len(columns) == 1, "columns", "be a single one for a language model", columns)
    values = rows[list(positions)][columns[0]]
    if chats := is_chat(values[0]):
        text = "".join(render_chat(value, named.processor) for value in values)
    else:
        text = "\n\n".join(value or "" for value in values)
    return named.processor(text, add_special_tokens=not chats, verbose=False)[TEXT]


def _take_chunk(named: NamedModel, rows: Any, source: DataSource, start: int, length: int) -> Tensor:
    """Return the first tokens from a row on; after the last row comes the first."""
    count = 1
    while True:
        tokens = _encode_rows(named, rows, source, [(start + i) % len(rows) for i in range(count)])
        if len(tokens) >= length:
            return torch.tensor(tokens[:length])
        require(count < len(rows), "length", f"be at most the {len(tokens)} tokens of the data", length)
        count = min(2 * count, len(rows))


def _skip_empty(rows: Any, columns: Sequence[str], order: Tensor, samples: int) -> list[int]:
    """Return the first positions of an order whose rows hold text."""
    found: list[int] = []
    for position in order.tolist():
        if len(found) == samples:
            break
        if all(rows[position][name] for name in columns):
            found.append(position)
    require(len(found) > 0, "data", "hold a row with text", f"empty ones in {list(columns)}")
    return found


def _text_batches(
    named: NamedModel,
    rows: Any,
    source: DataSource,
    order: Iterable[Sequence[int]],
    length: int,
    labelled: bool = False,
) -> Iterator[Batch]:
    columns, tokenizer = find_text_columns(rows, source), give_padding(named.processor)
    set_padding(named.model, tokenizer.pad_token_id)
    taken = inspect.signature(named.model.forward).parameters
    label = find_label_column(rows, source) if labelled else ""
    for positions in order:
        part = rows[list(positions)]
        texts = [_as_texts(part[name], tokenizer) for name in columns]
        special = not is_chat(part[columns[0]][0])
        encoded = tokenizer(
            *texts, truncation=True, max_length=length, padding=True, return_tensors="pt", add_special_tokens=special
        )
        batch: dict[str, Tensor] = {key: value for key, value in encoded.items() if key in taken}
        if getattr(named.model.config, "is_encoder_decoder", False):
            batch |= {f"decoder_{key}": batch[key] for key in (TEXT, "attention_mask")}
        _check_tokens(named, batch)
        yield batch | ({"labels": _read_labels(named, part[label])} if labelled else {})


def _as_texts(values: Sequence[Any], tokenizer: Any) -> list[str]:
    return [render_chat(value, tokenizer) if is_chat(value) else value or "" for value in values]


def _image_batches(
    named: NamedModel, rows: Any, source: DataSource, order: Sequence[int], batch_size: int, labelled: bool
) -> Iterator[Batch]:
    column = find_image_column(rows, source)
    label = find_label_column(rows, source) if labelled else ""
    for positions in _split(order, batch_size):
        part = rows[list(positions)]
        pixels = named.read_images([image.convert("RGB") for image in part[column]])
        labels = _read_labels(named, part[label]) if labelled else None
        if hasattr(named.model, "pretrained_cfg"):  # models of timm take images alone
            yield pixels if labels is None else (pixels, labels)
        else:
            yield {"pixel_values": pixels} | ({} if labels is None else {"labels": labels})


def _read_labels(named: NamedModel, values: Sequence[Any]) -> Tensor:
    if named.objective == "regression":
        return torch.tensor(values, dtype=torch.float32)
    classes = getattr(named.model, "num_classes", 0) or named.model.config.num_labels
    wrong = [value for value in values if not isinstance(value, int) or not 0 <= value < classes]
    require(not wrong, "label", f"be a column of classes, whole numbers in [0, {classes})", wrong[:3])
    return torch.tensor(values)


def _check_tokens(named: NamedModel, batch: Mapping[str, Tensor]) -> Any:
    known = getattr(named.model.config.get_text_config(), "vocab_size", math.inf)
    largest = int(batch[TEXT].max()) if batch[TEXT].numel() else -1
    require(largest < known, "model", f"have the tokenizer of its own: it knows {known} tokens", largest)
    return batch
