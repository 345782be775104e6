"""Batches of every form: models run on them, they move and convert as wholes, and labels stay out of the model."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.nn.batches import (
    as_double,
    batches_on,
    compute_logits,
    count_samples,
    device_of,
    eval_mode,
    get_labels,
    get_token_mask,
    has_labels,
    is_empty,
    move_batch,
)

X, Y = torch.ones(2, 3), torch.tensor([0, 1])
BATCHES: dict[str, Any] = {"tensor": X, "mapping": {"x": X, "labels": Y}, "pair": (X, Y), "list": [X, Y]}


class Model(nn.Module):
    """Takes inputs only, and returns what it is told to."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(2 * x)


OUTPUTS: dict[str, Any] = {
    "tensor": lambda y: y,
    "logits": lambda y: SimpleNamespace(loss=torch.zeros(()), logits=y),
    "mapping": lambda y: {"hidden": y, "pooled": -y},
    "tuple": lambda y: (y, -y),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("form", BATCHES)
def test_logits_come_from_every_form_of_batch_and_output(form: str, output: str) -> None:
    assert torch.equal(compute_logits(Model(OUTPUTS[output]), BATCHES[form]), 2 * X)


@pytest.mark.parametrize("form", BATCHES)
def test_a_batch_moves_and_converts_as_a_whole(form: str) -> None:
    batch = BATCHES[form]
    parts = lambda value: [value] if isinstance(value, Tensor) else list(getattr(value, "values", lambda: value)())  # noqa: E731
    assert all(part.device.type == "meta" for part in parts(move_batch(batch, torch.device("meta"))))
    assert [part.dtype for part in parts(as_double(batch))] == [torch.float64, torch.int64][: len(parts(batch))]
    assert X.dtype == torch.float32


def test_labels_are_returned_or_asked_for() -> None:
    for form in ("mapping", "pair", "list"):
        assert has_labels(BATCHES[form])
        assert get_labels(BATCHES[form]) is Y
    for batch in (X, {"x": X}, (X,)):
        assert not has_labels(batch)
        with pytest.raises(ValueError, match="`batch` must have labels: a mapping with the key 'labels', or"):
            get_labels(batch)


@dataclass
class Fielded:
    x: Tensor
    labels: Tensor | None = None
    attention_mask: Tensor | None = None


def test_a_dataclass_is_read_as_keyword_arguments() -> None:
    class Masked(Model):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
            return super().forward(x)

    batch = move_batch(Fielded(X, Y, torch.ones(2, 3)), torch.device("cpu"))
    assert isinstance(batch, Fielded)
    assert torch.equal(compute_logits(Masked(OUTPUTS["tensor"]), batch), 2 * X)
    assert get_labels(batch) is Y
    assert not has_labels(Fielded(X))
    assert not has_labels({"x": X, "labels": None})
    mask = get_token_mask(batch)
    assert mask is not None
    assert mask.all()
    assert as_double(batch).x.dtype == torch.float64


def test_samples_are_counted_in_the_first_tensor() -> None:
    for batch in (X, {"flag": True, "scale": torch.tensor(2.0), "x": X}, ([X, X], Y), Fielded(X), ("a.png", X)):
        assert count_samples(batch) == 2
        assert not is_empty(batch)
    with pytest.raises(ValueError, match="`batch` must hold a tensor with samples in its first dimension, got list"):
        count_samples(["a.png"])
    assert is_empty({"mask": None, "x": X[:0]})
    assert not is_empty(["a.png"])
    assert [len(batch) for batch in batches_on([X, X[:0], X[:1]], torch.device("cpu"))] == [2, 1]


def test_tensors_of_inference_mode_are_copied_to_be_used_outside() -> None:
    with torch.inference_mode():
        made = torch.ones(2, 3)
        assert move_batch(made, torch.device("cpu")) is made
    moved = move_batch({"x": made, "y": X}, torch.device("cpu"))
    assert not moved["x"].is_inference()
    assert moved["y"] is X


def test_a_mask_is_boolean_and_of_two_dimensions() -> None:
    mask = get_token_mask({"input_ids": Y, "attention_mask": torch.tensor([[1, 1, 0]])})
    assert mask is not None
    assert mask.tolist() == [[True, True, False]]
    assert get_token_mask({"input_ids": Y}) is None
    assert get_token_mask((X, Y)) is None
    assert get_token_mask({"input_ids": Y, "attention_mask": None}) is None


def test_evaluation_mode_ends_with_the_block_also_by_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout())).train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == before


def test_the_device_is_that_of_the_parameters() -> None:
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.Identity()).type == "cpu"
