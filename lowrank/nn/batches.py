"""Run any model on any batch.

A batch is a mapping with the keyword arguments of a transformers model, or (inputs, labels) as timm models and torch loaders
use it, or a bare tensor: inputs without labels. Everything in the library that runs a model on data goes through this file,
so no other file asks for the form of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.nn.token_masks import MASK, TARGET, as_token_mask

IGNORED = -100  # the label of a position without a target, as in transformers

Batch = Tensor | Mapping[str, Tensor] | Sequence[Tensor]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter, or the CPU if the model has no parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor on a device.

    **Arguments**

    - `batch`: any batch; it is not changed.
    - `device`: where the tensors go.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return tuple(value.to(device, non_blocking=True) for value in batch)


def as_double(batch: Batch) -> Batch:
    """Return the batch with floating-point tensors in float64, for a model in float64; integers stay integers."""
    convert = lambda value: value.double() if value.is_floating_point() else value  # noqa: E731
    if isinstance(batch, Tensor):
        return convert(batch)
    if isinstance(batch, Mapping):
        return {key: convert(value) for key, value in batch.items()}
    return tuple(convert(value) for value in batch)


def run_model(model: nn.Module, batch: Batch) -> Any:
    """Call a model on a batch without its labels and return what it returns.

    **Arguments**

    - `model`: any PyTorch module.
    - `batch`: on the model's device.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    return model(batch[0])


def select_output(output: Any) -> Tensor:
    """Return the tensor that matters of a model's output.

    **Arguments**

    - `output`: a tensor, which is returned; an output of transformers, of which the `logits` are returned; a mapping or
      sequence, of which the first entry is (the hidden states of a bare encoder).
    """
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return next(iter(output.values())) if isinstance(output, Mapping) else output[0]


def compute_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of a model on a batch, or its first output if it has none. Labels are not passed.

    **Arguments**

    - `model`: any PyTorch module.
    - `batch`: on the model's device.
    """
    return select_output(run_model(model, batch))


def has_labels(batch: Batch) -> bool:
    """Return True if the batch contains labels."""
    return "labels" in batch if isinstance(batch, Mapping) else isinstance(batch, Sequence) and len(batch) > 1


def get_labels(batch: Batch) -> Tensor:
    """Return the labels of a batch.

    **Raises**

    - `ValueError`: the batch has no labels.
    """
    if not has_labels(batch):
        raise ValueError("`batch` must have labels: a mapping with the key 'labels', or (inputs, labels).")
    return batch["labels"] if isinstance(batch, Mapping) else batch[1]


def count_samples(batch: Batch) -> int:
    """Return the number of samples in a batch: the length of its first tensor."""
    first = batch if isinstance(batch, Tensor) else next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(first)


def get_token_mask(batch: Batch, prefix: str = "") -> Tensor | None:
    """Return the `attention_mask` of a batch: `(batch, tokens)`, bool, False on padding; None if it has no mask.

    **Arguments**

    - `batch`: any batch.
    - `prefix`: of the key, '' or 'decoder_'. Default ''.

    **Raises**

    - `ValueError`: a mask of no known form, see `lowrank.nn.token_masks.as_token_mask`.
    """
    mask = batch.get(prefix + MASK) if isinstance(batch, Mapping) else None
    return None if mask is None else as_token_mask(mask, prefix + MASK)


def drop_padding(values: Tensor, batch: Batch) -> Tensor:
    """Return the values at positions of a model's output that are not padding; all of them, if no mask has their shape.

    The output of an encoder and a decoder has the positions of the decoder, so its mask counts if the batch has such inputs.

    **Arguments**

    - `values`: one per position, `(batch, tokens)` or `(tokens, batch)` where there is a mask.
    - `batch`: the batch that they come from.

    **Returns** `(positions,)`, or the values as they are.
    """
    has_target = isinstance(batch, Mapping) and any(key.startswith(TARGET) for key in batch)
    mask = get_token_mask(batch, TARGET if has_target else "")
    for layout in () if mask is None else (mask, mask.T):
        if layout.shape == values.shape:
            return values[layout]
    return values


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode inside a `with` block, and restore the mode of every module afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
