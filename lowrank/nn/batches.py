"""What a batch is: a mapping as transformers models take it, or (inputs, labels) as timm models and torch loaders use.

A bare tensor is inputs without labels. Everything that runs a model on data goes through this file, so that the rest of
the library never asks which kind it has.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Tensor] | Sequence[Tensor]


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter, the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return tuple(value.to(device, non_blocking=True) for value in batch)


def as_double(batch: Batch) -> Batch:
    """The batch with floating inputs in float64, for a model cast to float64."""
    convert = lambda value: value.double() if value.is_floating_point() else value  # noqa: E731
    if isinstance(batch, Tensor):
        return convert(batch)
    if isinstance(batch, Mapping):
        return {key: convert(value) for key, value in batch.items()}
    return tuple(convert(value) for value in batch)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's output on a batch, labels withheld: the tensor itself, or the `logits` of a transformers output. Of other
    outputs the first one: the hidden states of a bare encoder, the first entry of a mapping."""
    if isinstance(batch, Tensor):
        output: Any = model(batch)
    elif isinstance(batch, Mapping):
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
    else:
        output = model(batch[0])
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return next(iter(output.values())) if isinstance(output, Mapping) else output[0]


def has_labels(batch: Batch) -> bool:
    """Whether a batch holds labels."""
    return "labels" in batch if isinstance(batch, Mapping) else isinstance(batch, Sequence) and len(batch) > 1


def labels(batch: Batch) -> Tensor:
    """The labels of a batch.

    **Raises:** `ValueError`: the batch has none.
    """
    if not has_labels(batch):
        raise ValueError("`batch` must hold labels: a mapping with the key 'labels', or (inputs, labels).")
    return batch["labels"] if isinstance(batch, Mapping) else batch[1]


def token_mask(batch: Batch) -> Tensor | None:
    """`attention_mask` as booleans, `(batch, tokens)`: false on padding. None where the batch has no mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"`attention_mask` must have shape (batch, tokens), got {tuple(mask.shape)}.")
    return None if mask is None else mask.bool()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside, every module's mode restored after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
