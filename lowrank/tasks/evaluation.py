"""Objectives: how outputs become losses and predictions; the loss and the metrics of a model on a data set."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from lowrank.calibration.divergence import at_least_float32, class_divergence
from lowrank.factorization.precision import float64_device, with_float64
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.nn.batches import IGNORED, Batch, batches_on, compute_logits, device_of, eval_mode, get_labels
from lowrank.tasks.metrics import METRICS, Metric

WIDENED = 2**24  # logits that are widened to float64 at once: those of 64 tokens for a vocabulary of 262,144


class Objective(NamedTuple):
    """Hold the functions that give a model's outputs their meaning.

    **Arguments**

    - `losses`: `(outputs, targets) -> (targets,)`, one loss per target; positions with the label -100 have none, but a number
      that is predicted may be -100.
    - `predict`: `outputs -> (samples,)`, to compare with the labels; None if the loss alone counts, as for language models.
    - `sample`: `(outputs, generator) -> targets`, random targets from the model's own prediction. Their gradients give the
      true Fisher information.
    - `divergence`: `(outputs, teacher, targets or None) -> (targets,)`, the distance of the outputs from those of a teacher:
      KL(teacher || outputs), or the squared difference. Targets only say which positions count.
    """

    losses: Callable[[Tensor, Tensor], Tensor]
    predict: Callable[[Tensor], Tensor] | None
    sample: Callable[[Tensor, torch.Generator], Tensor]
    divergence: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _classification_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compare each sample, or each token of a sample, with its class; targets in floats are probabilities of classes."""
    if not targets.is_floating_point():
        outputs, targets = outputs[targets != IGNORED], targets[targets != IGNORED]
    return functional.cross_entropy(at_least_float32(outputs), targets, reduction="none")


def _classification_divergence(outputs: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
    divergences = class_divergence(outputs, teacher)
    return divergences if targets is None or targets.is_floating_point() else divergences[targets != IGNORED]


def _sample_classes(outputs: Tensor, generator: torch.Generator) -> Tensor:
    probabilities = at_least_float32(outputs).softmax(-1).flatten(0, -2).cpu()
    classes = torch.multinomial(probabilities, 1, generator=generator)
    return classes.view(outputs.shape[:-1]).to(outputs.device)


def _squared_difference(outputs: Tensor, targets: Tensor) -> Tensor:
    return (
        at_least_float32(outputs).squeeze(-1) - at_least_float32(targets).reshape(outputs.squeeze(-1).shape)
    ).square()


def _sample_values(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Sample with variance 1/2, for which the squared error is the negative log-likelihood."""
    means = at_least_float32(outputs).squeeze(-1)
    return means + 0.5**0.5 * torch.randn(means.shape, generator=generator).to(means)


def _next_token_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compare position t with token t + 1; shapes are `(batch, tokens, vocabulary)` and `(batch, tokens)`."""
    following = targets[:, 1:].reshape(-1)
    losses = functional.cross_entropy(
        at_least_float32(outputs[:, :-1]).flatten(0, 1), following, reduction="none", ignore_index=IGNORED
    )
    return losses[following != IGNORED]


def _sample_tokens(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Sample the token after each position from the prediction there; the first token is never a target."""
    return functional.pad(_sample_classes(outputs[:, :-1], generator), (1, 0))


def _next_token_divergence(outputs: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
    divergences = class_divergence(outputs[:, :-1], teacher[:, :-1])
    return divergences.reshape(-1) if targets is None else divergences[targets[:, 1:] != IGNORED]


OBJECTIVES = {
    "classification": Objective(
        _classification_losses,
        lambda outputs: outputs.argmax(-1),
        _sample_classes,
        _classification_divergence,
    ),
    "regression": Objective(
        _squared_difference,
        lambda outputs: outputs.squeeze(-1),
        _sample_values,
        lambda outputs, teacher, targets: _squared_difference(outputs, teacher),
    ),
    "language_modelling": Objective(_next_token_losses, None, _sample_tokens, _next_token_divergence),
}


def evaluate(
    model: nn.Module, batches: Iterable[Batch], objective: str, metrics: Iterable[str] = ()
) -> dict[str, float]:
    """Compute the mean loss per target and the metrics, in evaluation mode.

    Losses are computed and averaged in float64; on a device without float64, in float32 and averaged in float64.

    **Arguments**

    - `model`: any PyTorch module; it is not changed.
    - `batches`: iterable of batches with labels, see `lowrank.nn.batches`.
    - `objective`: a key of `OBJECTIVES`.
    - `metrics`: keys of `lowrank.tasks.metrics.METRICS` that fit the objective; none by default.

    **Returns** `loss`, then each metric in the order of `metrics`.

    **Raises**

    - `ValueError`: no target in `batches`; a metric that does not fit the objective.
    - `FloatingPointError`: a loss that is not finite. Batches are never skipped.
    """
    return evaluate_samples(model, batches, objective, metrics)[0]


def evaluate_samples(
    model: nn.Module, batches: Iterable[Batch], objective: str, metrics: Iterable[str] = ()
) -> tuple[dict[str, float], np.ndarray]:
    """Compute what `evaluate` does, and the mean loss of each sample, in one pass.

    **Arguments**

    - `model`, `batches`, `objective`, `metrics`: as for `evaluate`.

    **Returns** the results of `evaluate`; losses, `(samples,)`, float64, NaN for a sample without a target.

    **Raises** as `evaluate`.
    """
    selected = [_find_metric(name, objective) for name in metrics]
    loss, by_sample, predicted, true = _run(model, batches, OBJECTIVES[objective])
    results = {"loss": loss}
    for metric in selected:
        results[metric.name] = metric.function(loss) if metric.from_loss else metric.function(predicted, true)
    return results, by_sample


def _means(losses: Tensor, targets: Tensor, shifted: bool) -> list[float]:
    """Return the mean loss of each sample from the losses of its targets, one sample after the other."""
    if targets.is_floating_point():
        counts = [len(losses) // len(targets)] * len(targets)
    else:
        counted = (targets[:, 1:] if shifted else targets) != IGNORED
        counts = counted.reshape(len(targets), -1).sum(1).tolist()
    return [part.mean().item() for part in losses.split(counts)]


def _precise_losses(objective: Objective, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the losses in float64, computed in it where the device has it; large outputs are widened a part at a time."""
    pieces = []
    for some, wanted in _cut(outputs, targets, objective.predict is None):
        exact = some.double() if float64_device(some.device) == some.device else some
        pieces.append(with_float64(objective.losses(exact, wanted)).double())
    return torch.cat(pieces)


def _cut(outputs: Tensor, targets: Tensor, shifted: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parts of outputs `(batch, tokens, classes)` of at most `WIDENED` values each, or of one token, with their targets.

    Where position t predicts token t + 1 the last position of a part predicts nothing, and the next part starts with it.
    """
    if not shifted or outputs.dim() != 3 or outputs.numel() <= WIDENED:
        yield outputs, targets
        return
    tokens = max(1, WIDENED // outputs.shape[2])
    for one, wanted in zip(outputs.split(1), targets.split(1), strict=True):
        for first in range(0, max(outputs.shape[1] - 1, 1), tokens):
            last = first + tokens + 1
            yield one[:, first:last], wanted[:, first:last]


def _find_metric(name: str, objective: str) -> Metric:
    fits = name in METRICS and objective in METRICS[name].objectives
    require(fits, "metrics", f"fit the objective {objective!r}", name)
    return METRICS[name]


def _run(
    model: nn.Module, batches: Iterable[Batch], objective: Objective
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean loss, those of samples, the predictions and the labels; the last two are empty without predictions."""
    predict, total, count, predicted, true = objective.predict, 0.0, 0, [], []
    by_sample: list[float] = []
    with eval_mode(model), torch.no_grad():
        for batch in batches_on(batches, device_of(model)):
            outputs, targets = compute_logits(model, batch), get_labels(batch)
            losses = _precise_losses(objective, outputs, targets)
            total += losses.sum().item()
            count += len(losses)
            by_sample += _means(losses, targets, predict is None)
            if predict is not None:
                found = predict(outputs)
                if len(losses) < targets.numel():  # some positions have no target
                    found, targets = found[targets != IGNORED], targets[targets != IGNORED]
                predicted.append(found.float().cpu().numpy())
                true.append(targets.float().cpu().numpy())
    if count == 0:
        raise ValueError("`batches` must hold at least one target, got none.")
    if not np.isfinite(total):
        raise FloatingPointError(f"the loss over {count} targets is {total}: the model's outputs are not finite.")
    labels = np.concatenate(true or [np.empty(0)])
    return total / count, np.array(by_sample), np.concatenate(predicted or [np.empty(0)]), labels


@check_arguments
def perplexity(model: nn.Module, token_ids: Int[Tensor, "*one tokens"], window: int = 2048) -> float:
    """Compute exp of the mean next-token cross-entropy, by the protocol of the published tables.

    The text is one stream of tokens, cut into windows without overlap. Each window predicts its `window` - 1 later tokens
    from scratch. Tokens that do not fill a window are dropped. The caller tokenises: for WikiText-2, join all lines of the
    test split by blank lines, empty ones included, and let the tokenizer add its token of beginning if it has one.

    **Arguments**

    - `model`: any causal language model; it is not changed.
    - `token_ids`: `(tokens,)` or `(1, tokens)`, integers.
    - `window`: int in [2, tokens]; default 2048, as in the published tables.

    **Returns** a float >= 1; a model whose logits are all equal has the size of its vocabulary.

    **Raises**

    - `ValueError`: a window below 2 or longer than the text.
    - `FloatingPointError`: logits that are not finite.

    **Reference** Frantar et al., GPTQ, ICLR 2023, arXiv:2210.17323. SVD-LLM (arXiv:2403.07378) evaluates in the same manner.
    """
    tokens = token_ids.reshape(-1)
    require(
        len(tokens) == token_ids.shape[-1], "token_ids", "be of shape (tokens,) or (1, tokens)", tuple(token_ids.shape)
    )
    require(len(tokens) > 0, "token_ids", "hold at least one token", tuple(token_ids.shape))
    known = getattr(getattr(model, "config", None), "vocab_size", None) or math.inf
    wrong = [token for token in (int(tokens.min()), int(tokens.max())) if not 0 <= token < known]
    require(not wrong, "token_ids", f"be in [0, {known}), the vocabulary of `model`", wrong)
    require(2 <= window <= len(tokens), "window", f"be in [2, {len(tokens)}], the number of tokens", window)
    windows = tokens[: len(tokens) // window * window].view(-1, 1, window)

    def batches() -> Iterator[Batch]:
        for chunk in windows:
            yield {"input_ids": chunk, "labels": chunk}

    return evaluate(model, batches(), "language_modelling", ("perplexity",))["perplexity"]
