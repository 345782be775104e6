"""Metrics against closed forms and independent libraries; measured output errors."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank.evaluation import METRICS, evaluate
from lowrank.output_error import output_errors


class Fixed(nn.Module):
    """Returns its input as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_classification(generator) -> None:
    outputs = torch.randn(30, 4, generator=generator)
    targets = torch.randint(0, 4, (30,), generator=generator)
    found = evaluate(Fixed(), zip(outputs.split(7), targets.split(7), strict=True), "classification", ["accuracy"])
    assert found["accuracy"] == pytest.approx((outputs.argmax(1) == targets).double().mean().item())
    expected = -outputs.double().log_softmax(1)[torch.arange(30), targets].mean().item()
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("vocabulary", [2, 100, 5000])
def test_uniform_logits_have_the_vocabulary_as_perplexity(vocabulary: int) -> None:
    batch = (torch.zeros(2, 5, vocabulary), torch.zeros(2, 5, dtype=torch.long))
    assert evaluate(Fixed(), [batch], "language_modelling", ["perplexity"])["perplexity"] == pytest.approx(vocabulary)


def test_positions_predict_the_next_token_and_ignored_ones_do_not_count() -> None:
    targets = torch.tensor([[0, 1, 2, -100]])
    outputs = torch.full((1, 4, 3), -20.0)
    outputs[0, 0, 1] = outputs[0, 1, 2] = 20.0  # position 0 says token 1, position 1 says token 2
    assert evaluate(Fixed(), [(outputs, targets)], "language_modelling")["loss"] == pytest.approx(0, abs=1e-6)


def test_batches_of_unequal_size_weigh_by_targets(generator) -> None:
    outputs = torch.randn(10, 1, generator=generator)
    targets = torch.randn(10, generator=generator)
    whole = evaluate(Fixed(), [(outputs, targets)], "regression", ["pearson"])
    parts = evaluate(Fixed(), zip(outputs.split([9, 1]), targets.split([9, 1]), strict=True), "regression", ["pearson"])
    assert whole["loss"] == pytest.approx(parts["loss"])
    assert whole["pearson"] == pytest.approx(np.corrcoef(outputs[:, 0], targets)[0, 1])


def test_metrics_in_closed_form() -> None:
    predicted, true = np.array([1, 1, 0, 0, 1.0]), np.array([1, 0, 0, 1, 1.0])
    assert METRICS["accuracy"](predicted, true) == pytest.approx(3 / 5)
    assert METRICS["f1"](predicted, true) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert METRICS["matthews"](predicted, true) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert METRICS["spearman"](np.array([1, 2, 9.0]), np.array([0.1, 0.2, 0.3])) == pytest.approx(1)
    constant = np.ones(5)
    assert METRICS["pearson"](constant, true) == METRICS["spearman"](constant, true) == -1
    assert METRICS["matthews"](constant, true) == 0


def test_a_loss_that_is_not_finite_fails_loudly() -> None:
    bad = torch.tensor([[float("nan"), 0.0]])
    with pytest.raises(FloatingPointError, match="the loss over 2 targets is nan"):
        evaluate(Fixed(), [(torch.zeros(1, 2), torch.zeros(1).long()), (bad, torch.zeros(1).long())], "classification")
    with pytest.raises(ValueError, match="at least one target, got none"):
        evaluate(Fixed(), [], "classification")


@pytest.mark.parametrize(
    ("objective", "metric"), [("classification", "perplexity"), ("language_modelling", "accuracy")]
)
def test_metrics_must_fit_the_objective(objective: str, metric: str) -> None:
    with pytest.raises(ValueError, match=f"must fit the objective '{objective}', got '{metric}'"):
        evaluate(Fixed(), [], objective, [metric])


def test_output_errors_are_those_of_the_outputs(shape, generator) -> None:
    out, inputs = shape
    model = nn.Sequential(nn.Linear(inputs, out), nn.ReLU(), nn.Linear(out, 3)).double()
    x = torch.randn(50, inputs, generator=generator, dtype=torch.float64)
    new = [torch.randn(out, inputs, generator=generator, dtype=torch.float64), torch.zeros(out, inputs)]
    weight = model[0].weight.detach()
    found = output_errors(model, x.split(7), {"0": new, "2": [torch.zeros(3, out)]})
    assert found["0"] == pytest.approx([((weight - w) @ x.T).norm().item() for w in new])
    hidden = model[1](model[0](x)).detach()
    assert found["2"] == pytest.approx([(model[2].weight.detach() @ hidden.T).norm().item()])
