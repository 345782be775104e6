"""Losses and metrics: what a model's outputs mean, and how well they do on a data set."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from lowrank.nn.batches import Batch, device_of, evaluating, labels, logits, to_device

IGNORED = -100  # the label of a position without a target, as in transformers


class Objective(NamedTuple):
    """What outputs mean.

    `losses(outputs, targets)`: one loss per target, `(targets,)`. `predict(outputs)`: what metrics compare with the labels,
    None where the loss alone counts (perplexity). `sample(outputs, generator)`: targets drawn from the model's own
    prediction, as the true Fisher information asks for. `divergence(outputs, teacher, targets)`: per target, how far the
    outputs are from a teacher's: KL(teacher || outputs), or the squared difference; targets, where there are any, only say
    which positions count.
    """

    losses: Callable[[Tensor, Tensor], Tensor]
    predict: Callable[[Tensor], Tensor] | None
    sample: Callable[[Tensor, torch.Generator], Tensor]
    divergence: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _wide(outputs: Tensor) -> Tensor:
    """At least float32."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _classification_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(_wide(outputs), targets, reduction="none")


def _sampled_classes(outputs: Tensor, generator: torch.Generator) -> Tensor:
    probabilities = _wide(outputs).softmax(-1).flatten(0, -2).cpu()
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return drawn.view(outputs.shape[:-1]).to(outputs.device)


def _class_divergence(outputs: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
    ours, theirs = (_wide(side).log_softmax(-1) for side in (outputs, teacher))
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def _squared_difference(outputs: Tensor, targets: Tensor) -> Tensor:
    return (_wide(outputs).squeeze(-1) - _wide(targets).reshape(outputs.squeeze(-1).shape)).square()


def _sampled_values(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """The squared error is the negative log-likelihood of a variance of 1/2."""
    means = _wide(outputs).squeeze(-1)
    return means + 0.5**0.5 * torch.randn(means.shape, generator=generator).to(means)


def _next_token_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Position t predicts token t + 1; `(batch, tokens, vocabulary)` and `(batch, tokens)`."""
    following = targets[:, 1:].reshape(-1)
    losses = functional.cross_entropy(
        _wide(outputs[:, :-1]).flatten(0, 1), following, reduction="none", ignore_index=IGNORED
    )
    return losses[following != IGNORED]


def _sampled_tokens(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """The token after each position, from the prediction there; the first token is never a target."""
    return functional.pad(_sampled_classes(outputs[:, :-1], generator), (1, 0))


def _next_token_divergence(outputs: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
    found = _class_divergence(outputs[:, :-1], teacher[:, :-1])
    return found.reshape(-1) if targets is None else found[targets[:, 1:] != IGNORED]


OBJECTIVES = {
    "classification": Objective(
        _classification_losses, lambda outputs: outputs.argmax(-1), _sampled_classes, _class_divergence
    ),
    "regression": Objective(
        _squared_difference,
        lambda outputs: outputs.squeeze(-1),
        _sampled_values,
        lambda outputs, teacher, targets: _squared_difference(outputs, teacher),
    ),
    "language_modelling": Objective(
        _next_token_losses,
        None,
        _sampled_tokens,
        _next_token_divergence,
    ),
}


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """Share of equal entries, in [0, 1]."""
    return float((predicted == true).mean())


def f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """F1 of class 1, in [0, 1]; 0 where class 1 is neither true nor predicted."""
    from sklearn.metrics import f1_score  # noqa: PLC0415

    return float(f1_score(true, predicted, zero_division=0))  # pyright: ignore[reportArgumentType]


def matthews(predicted: np.ndarray, true: np.ndarray) -> float:
    """Matthews correlation, in [-1, 1]; 0 where one side is constant."""
    from sklearn.metrics import matthews_corrcoef  # noqa: PLC0415

    return float(matthews_corrcoef(true, predicted))


def _correlation(predicted: np.ndarray, true: np.ndarray, kind: str) -> float:
    from scipy import stats  # noqa: PLC0415

    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return -1.0  # undefined for constant predictions: counts as worst, not as NaN
    return float(getattr(stats, kind)(predicted, true).statistic)


def pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    """Pearson correlation, in [-1, 1]; -1 where it is undefined."""
    return _correlation(predicted, true, "pearsonr")


def spearman(predicted: np.ndarray, true: np.ndarray) -> float:
    """Spearman rank correlation, in [-1, 1]; -1 where it is undefined."""
    return _correlation(predicted, true, "spearmanr")


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


def evaluate(
    model: nn.Module, batches: Iterable[Batch], objective: str, metrics: Iterable[str] = ()
) -> dict[str, float]:
    """Mean loss per target, and the metrics, in evaluation mode.

    **Arguments:** `objective`: a key of `OBJECTIVES`. `metrics`: keys of `METRICS`, or 'perplexity' = exp(loss).

    **Returns:** `loss` and each metric. Losses are computed and averaged in float64 (float32 on a
    device without).

    **Raises:** `ValueError`: no target in `batches`, or a metric that does not fit the objective.
    `FloatingPointError`: a loss that is not finite; batches are never skipped.
    """
    losses, predict, *_ = OBJECTIVES[objective]
    total, count, predicted, true = 0.0, 0, [], []
    for name in metrics:
        if (name == "perplexity") == (predict is not None) or (predict is not None and name not in METRICS):
            raise ValueError(f"`metrics` must fit the objective {objective!r}, got {name!r}.")
    with evaluating(model), torch.no_grad():
        for batch in batches:
            batch = to_device(batch, device_of(model))
            outputs, targets = logits(model, batch), labels(batch)
            outputs = outputs if outputs.device.type == "mps" else outputs.double()
            batch_losses = losses(outputs, targets)
            total += batch_losses.double().sum().item()
            count += len(batch_losses)
            if predict is not None:
                predicted.append(predict(outputs).float().cpu().numpy())
                true.append(targets.float().cpu().numpy())
    if count == 0:
        raise ValueError("`batches` must hold at least one target, got none.")
    if not np.isfinite(total):
        raise FloatingPointError(f"the loss over {count} targets is {total}: the model's outputs are not finite.")
    results = {"loss": total / count}
    for name in metrics:
        results[name] = (
            float(np.exp(results["loss"]))
            if name == "perplexity"
            else METRICS[name](np.concatenate(predicted), np.concatenate(true))
        )
    return results


def perplexity(model: nn.Module, token_ids: Int[Tensor, "*one tokens"], window: int = 2048) -> float:
    """exp of the mean next-token cross-entropy, by the protocol of the published tables.

    The text is one stream of tokens, cut into windows without overlap; each window predicts its `window` - 1 later tokens
    from scratch, and what does not fill a window is dropped. The caller tokenises: for WikiText-2 all lines of the test
    split, empty ones included, joined by blank lines, with one token of beginning where the tokenizer sets it.

    **Arguments:** `token_ids`: `(tokens,)` or `(1, tokens)`, integers. `window`: tokens, >= 2.

    **Returns:** > 0; the size of the vocabulary for a model whose logits are all equal.

    **Raises:** `ValueError`: a window below 2 or longer than the text. `FloatingPointError`: logits that are not finite.

    **Reference:** Frantar et al., GPTQ, ICLR 2023, arXiv:2210.17323, whose evaluation SVD-LLM (arXiv:2403.07378) follows.
    """
    tokens = token_ids.reshape(-1)
    if not 2 <= window <= len(tokens):
        raise ValueError(f"`window` must be in [2, {len(tokens)}], the tokens given, got {window}.")
    windows = tokens[: len(tokens) // window * window].view(-1, 1, window)

    def batches() -> Iterator[Batch]:
        for chunk in windows:
            yield {"input_ids": chunk, "labels": chunk}

    return evaluate(model, batches(), "language_modelling", ("perplexity",))["perplexity"]
