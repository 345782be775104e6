"""Losses and metrics: what a model's outputs mean, and how well they do on a data set."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank.batches import Batch, device_of, evaluating, labels, logits, to_device
from lowrank.layers import find_linears
from lowrank.statistics import BLOCK_TOKENS, exact_products, visit_inputs

IGNORED = -100  # the label of a position without a target, as in transformers


class Objective(NamedTuple):
    """`losses(outputs, targets)`: one loss per target, `(targets,)`; `predict(outputs)`: what metrics compare with the
    labels, None where the loss alone counts (perplexity)."""

    losses: Callable[[Tensor, Tensor], Tensor]
    predict: Callable[[Tensor], Tensor] | None


def _classification_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.float(), targets, reduction="none")


def _regression_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.float().squeeze(-1) - targets.float()).square()


def _next_token_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Position t predicts token t + 1; `(batch, tokens, vocabulary)` and `(batch, tokens)`."""
    following = targets[:, 1:].reshape(-1)
    losses = functional.cross_entropy(
        outputs[:, :-1].float().flatten(0, 1), following, reduction="none", ignore_index=IGNORED
    )
    return losses[following != IGNORED]


OBJECTIVES = {
    "classification": Objective(_classification_losses, lambda outputs: outputs.argmax(-1)),
    "regression": Objective(_regression_losses, lambda outputs: outputs.squeeze(-1)),
    "language_modelling": Objective(_next_token_losses, None),
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

    **Returns:** `loss` and each metric. Losses are computed in float32 and averaged over all targets in float64.

    **Raises:** `ValueError`: no target in `batches`, or a metric that does not fit the objective.
    `FloatingPointError`: a loss that is not finite; batches are never skipped.
    """
    losses, predict = OBJECTIVES[objective]
    total, count, predicted, true = 0.0, 0, [], []
    for name in metrics:
        if (name == "perplexity") == (predict is not None) or (predict is not None and name not in METRICS):
            raise ValueError(f"`metrics` must fit the objective {objective!r}, got {name!r}.")
    with evaluating(model), torch.no_grad():
        for batch in batches:
            batch = to_device(batch, device_of(model))
            outputs, targets = logits(model, batch), labels(batch)
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


def output_errors(
    model: nn.Module, batches: Iterable[Batch], replacements: Mapping[str, Sequence[Tensor]]
) -> dict[str, list[float]]:
    """||(W - W') X||_F of each layer for each replacement W' of its weight, measured on the activations themselves.

    This streams the inputs of the unchanged model and never forms a second moment, so it can check what a second moment
    predicts. A replacement of zeros gives ||W X||_F.

    **Arguments:** `replacements`: layer -> weights of the layer's shape.

    **Returns:** layer -> one norm per replacement, accumulated in float64.
    """
    linears = find_linears(model, replacements)
    differences = {
        name: torch.cat([(layer.weight.detach().double() - new.double()) for new in replacements[name]]).to(
            layer.weight
        )
        for name, layer in linears.items()
    }
    sums = {name: torch.zeros(len(new), dtype=torch.float64) for name, new in replacements.items()}

    def add(name: str, rows: Tensor) -> None:
        for block in rows.split(BLOCK_TOKENS):
            with exact_products(block.device):
                change = block @ differences[name].to(block).T
            per_output = change.square().sum(0, dtype=torch.float64)
            sums[name] += per_output.view(len(sums[name]), -1).sum(1).cpu()

    visit_inputs(model, batches, linears, add)
    return {name: total.sqrt().tolist() for name, total in sums.items()}
