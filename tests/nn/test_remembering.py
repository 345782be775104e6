"""A model that remembers: one call for each batch, within its limit, and nothing else changed."""

import torch
from torch import Tensor, nn

from lowrank.nn.remembering import Remembering


class _Counting(nn.Module):
    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: float | list[float] = 1.0) -> Tensor:
        self.calls += 1
        return self.layer(x) * (scale if isinstance(scale, float) else scale[0])


def test_the_same_tensors_are_run_once_and_others_of_the_same_values_again() -> None:
    model, x = _Counting(), torch.randn(2, 4)
    remembering = Remembering(model)
    first = remembering(x)
    assert remembering(x) is first
    assert model.calls == 1
    assert torch.equal(remembering(x.clone()), first)
    assert model.calls == 2
    assert torch.equal(remembering(x, scale=2.0), 2 * first)
    assert torch.equal(remembering(x), first)
    assert model.calls == 3


def test_outputs_beyond_the_limit_and_of_inputs_without_an_identity_are_computed_anew() -> None:
    model, x, other = _Counting(), torch.randn(2, 4), torch.randn(2, 4)
    remembering = Remembering(model, limit=2 * 3 * 4)  # bytes of one output
    for batch in (x, other, x, other):
        assert torch.equal(remembering(batch), model.layer(batch))
    assert model.calls == 3
    for scale in (2.0, 3.0):
        assert torch.equal(remembering(x, scale=[scale]), scale * model.layer(x))


def test_attributes_and_modes_are_those_of_the_model() -> None:
    remembering = Remembering(_Counting())
    assert remembering.num_classes == 3
    remembering.eval()
    assert not remembering.model.training
    assert not hasattr(remembering, "config")
