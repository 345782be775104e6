"""How far the predictions of a model are from those of the dense one: what choices on calibration data are judged by."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank.calibration.predictive_loss import is_categorical
from lowrank.io.distributed import gather
from lowrank.nn.batches import (
    Batch,
    batches_on,
    compute_logits,
    device_of,
    drop_padding,
    eval_mode,
    run_model,
    select_output,
)

# Called with the teacher, it returns `(model, batch) -> (targets,)`.
Divergence = Callable[[nn.Module], Callable[[nn.Module, Batch], Tensor]]


def at_least_float32(outputs: Tensor) -> Tensor:
    """Return the outputs in float32, or as they are if they are in float64."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def class_divergence(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(teacher || outputs) of the categorical distributions whose logits are in the last dimension.

    **Arguments**

    - `outputs`, `teacher`: logits, `(..., classes)`.

    **Returns** `(...)`, >= 0 up to rounding.
    """
    ours, theirs = (at_least_float32(side).log_softmax(-1) for side in (outputs, teacher))
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def predictive_divergence(teacher: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
    """Return a function that compares the predictions of a model with those of a teacher and needs no labels.

    Outputs are read as in `predictive_loss`: KL(teacher || model) of logits, else the squared difference, which is that of
    Gaussians of variance 1/2. Every position counts that is not padding.

    **Arguments**

    - `teacher`: a model that takes the same batches; it gets no gradients.

    **Returns** `(model, batch) -> (positions,)`.
    """

    def compare(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            output = run_model(teacher, batch)
        wanted, found = at_least_float32(select_output(output)), compute_logits(model, batch)
        logits = is_categorical(teacher, output, wanted)
        values = class_divergence(found, wanted) if logits else (at_least_float32(found) - wanted).square().sum(-1)
        return drop_padding(values, batch).flatten()

    return compare


def mean_divergence(
    model: nn.Module, teacher: nn.Module, batches: Iterable[Batch], divergence: Divergence = predictive_divergence
) -> float:
    """Compute the mean divergence of a model from a teacher over all targets, in evaluation mode.

    Under `torch.distributed` every process passes its own batches, and every process returns the mean over all of them.

    **Arguments**

    - `model`, `teacher`: models that take the same batches, in the dtype of the batches.
    - `batches`: iterable of batches, see `lowrank.nn.batches`.
    - `divergence`: teacher -> `((model, batch) -> (targets,))`; default `predictive_divergence`.

    **Raises**

    - `ValueError`: no target in `batches`.
    - `FloatingPointError`: a divergence that is not finite.
    """
    compare, total, count = divergence(teacher), 0.0, 0
    with eval_mode(model), eval_mode(teacher), torch.no_grad():
        for batch in batches_on(batches, device_of(model)):
            values = compare(model, batch)
            total, count = total + values.cpu().double().sum().item(), count + values.numel()
    total, count = (sum(values) for values in zip(*gather((total, count)), strict=True))
    if count == 0:
        raise ValueError("`batches` must hold at least one target, got none.")
    if not abs(total) < float("inf"):
        raise FloatingPointError(f"the divergence over {count} targets is {total}: outputs are not finite.")
    return total / count
