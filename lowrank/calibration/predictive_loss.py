"""A loss that needs no labels: the model draws its targets from its own prediction."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.factorization.moments import all_finite
from lowrank.nn.batches import Batch, drop_padding, run_model, select_output


def predictive_loss(seed: int = 0) -> Callable[[nn.Module, Batch], Tensor]:
    """Return a loss whose squared gradients are the true Fisher information of a model's prediction.

    Logits are read as a categorical distribution at every position, other outputs (hidden states, regressions) as the mean of a
    Gaussian of variance 1/2. A target is drawn at every position that is not padding; the loss is the negative log-likelihood
    of all targets, summed.

    **Arguments**

    - `seed`: int, of the draws.

    **Returns** `(model, batch) -> scalar`, as `collect_statistics` takes it. It raises a `ValueError` for logits that are not
    finite.

    **Reference** Martens, New insights and perspectives on the natural gradient method, JMLR 2020, section 5.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        output = run_model(model, batch)
        prediction = select_output(output).float()
        losses = _categorical if is_categorical(model, output, prediction) else _gaussian
        return drop_padding(losses(prediction, generator), batch).sum()

    return loss


def is_categorical(model: Any, output: Any, prediction: Tensor) -> bool:
    """Return whether the prediction of a model is the logits of a categorical distribution.

    Logits have a name in the output of a transformers model, and as many entries as a timm model has classes.

    **Arguments**

    - `model`: the model.
    - `output`: what it returned.
    - `prediction`: the tensor that matters of it, see `select_output`.
    """
    named = hasattr(output, "logits") or getattr(model, "num_classes", 0) == prediction.shape[-1]
    return named and prediction.shape[-1] > 1


def _categorical(prediction: Tensor, generator: torch.Generator) -> Tensor:
    probabilities = prediction.detach().softmax(-1).flatten(0, -2).cpu()
    if not all_finite(probabilities):
        raise ValueError("`batches` must give finite outputs, got NaN or infinity in the outputs of the model.")
    targets = torch.multinomial(probabilities, 1, generator=generator).view(prediction.shape[:-1]).to(prediction.device)
    return -prediction.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def _gaussian(prediction: Tensor, generator: torch.Generator) -> Tensor:
    noise = 0.5**0.5 * torch.randn(prediction.shape, generator=generator).to(prediction.device)
    return (prediction - (prediction.detach() + noise)).square().sum(-1)
