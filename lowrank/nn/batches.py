"""Run any model on any batch.

A batch is a mapping with the keyword arguments of a transformers model, or a dataclass of them, or (inputs, labels) as timm
models and torch loaders use it, or a bare tensor: inputs without labels. Beside tensors it may hold anything, such as None,
flags, strings, arrays, and lists of tensors; only tensors are moved. Everything in the library that runs a model on data goes
through this file, so no other file asks for the form of a batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.io.arguments import describe
from lowrank.nn.nests import Fields, change_tensors, fields_of, list_tensors
from lowrank.nn.offloaded import execution_device
from lowrank.nn.token_masks import MASK, TARGET, as_token_mask

IGNORED = -100  # the label of a position without a target, as in transformers

Batch = Tensor | Mapping[str, Any] | Sequence[Any] | Fields


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model computes on: that of its first parameter, or the CPU if it has no parameters.

    Weights that accelerate offloads are on the device where their layers run.
    """
    first = next(model.parameters(), None)
    if first is None:
        return torch.device("cpu")
    return execution_device(model) if first.is_meta else first.device


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor on a device, and all else as it is.

    Tensors that were made in inference mode are copied, so that they may be used outside it.

    **Arguments**

    - `batch`: any batch; it is not changed.
    - `device`: where the tensors go.

    **Raises**

    - `ValueError`: a batch without a tensor.
    """
    if not list_tensors(batch):
        raise ValueError(
            "`batches` must hold tensors: each a tensor, (inputs, labels), a mapping or a dataclass with tensors in it, got "
            f"{describe(batch)}."
        )

    def move(tensor: Tensor) -> Tensor:
        moved = tensor.to(device, non_blocking=True)
        return moved.clone() if moved.is_inference() and not torch.is_inference_mode_enabled() else moved

    return change_tensors(batch, move)


def batches_on(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches one after the other, moved to a device, without empty ones: a sampler may end with one.

    **Arguments**

    - `batches`: batches of any form.
    - `device`: where the tensors go.
    """
    return (move_batch(batch, device) for batch in batches if not is_empty(batch))


def is_empty(batch: Batch) -> bool:
    """Return True if the first tensor of the batch has no element."""
    first = next(iter(list_tensors(batch)), None)
    return first is not None and first.numel() == 0


def as_double(batch: Batch) -> Batch:
    """Return the batch with floating-point tensors in float64, for a model in float64; integers stay integers."""
    return change_tensors(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def keywords_of(batch: Batch) -> Mapping[str, Any] | None:
    """Return the keyword arguments that the batch holds, None if it holds none."""
    if isinstance(batch, Mapping):
        return batch
    return fields_of(batch) if isinstance(batch, Fields) else None


def run_model(model: nn.Module, batch: Batch) -> Any:
    """Call a model on a batch without its labels and return what it returns.

    **Arguments**

    - `model`: any PyTorch module.
    - `batch`: on the model's device.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if (keywords := keywords_of(batch)) is not None:
        return model(**{key: value for key, value in keywords.items() if key != "labels"})
    return model(cast(Any, batch)[0])


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
    if (keywords := keywords_of(batch)) is not None:
        return keywords.get("labels") is not None
    return isinstance(batch, Sequence) and len(batch) > 1


def get_labels(batch: Batch) -> Tensor:
    """Return the labels of a batch.

    **Raises**

    - `ValueError`: the batch has no labels.
    """
    if not has_labels(batch):
        raise ValueError("`batch` must have labels: a mapping with the key 'labels', or (inputs, labels).")
    keywords = keywords_of(batch)
    return cast(Any, batch)[1] if keywords is None else keywords["labels"]


def count_samples(batch: Batch) -> int:
    """Return the number of samples in a batch: the length of its first tensor that is no scalar.

    **Raises**

    - `ValueError`: a batch without such a tensor.
    """
    first = next((tensor for tensor in list_tensors(batch) if tensor.dim()), None)
    if first is None:
        raise ValueError(f"`batch` must hold a tensor with samples in its first dimension, got {type(batch).__name__}.")
    return len(first)


def get_token_mask(batch: Batch, prefix: str = "") -> Tensor | None:
    """Return the `attention_mask` of a batch: `(batch, tokens)`, bool, False on padding; None if it has no mask.

    **Arguments**

    - `batch`: any batch.
    - `prefix`: of the key, '' or 'decoder_'. Default ''.

    **Raises**

    - `ValueError`: a mask of no known form, see `lowrank.nn.token_masks.as_token_mask`.
    """
    keywords = keywords_of(batch)
    mask = None if keywords is None else keywords.get(prefix + MASK)
    return None if mask is None else as_token_mask(mask, prefix + MASK)


def drop_padding(values: Tensor, batch: Batch) -> Tensor:
    """Return the values at positions of a model's output that are not padding; all of them, if no mask has their shape.

    The output of an encoder and a decoder has the positions of the decoder, so its mask counts if the batch has such inputs.

    **Arguments**

    - `values`: one per position, `(batch, tokens)` or `(tokens, batch)` where there is a mask.
    - `batch`: the batch that they come from.

    **Returns** `(positions,)`, or the values as they are.
    """
    has_target = any(key.startswith(TARGET) for key in keywords_of(batch) or ())
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
