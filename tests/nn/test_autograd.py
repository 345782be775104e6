"""Versions of tensors, weights of inference mode, and checkpoints that are recomputed without reentry."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank.nn.autograd import check_differentiable, version_of, without_reentry


def test_a_version_changes_with_the_tensor() -> None:
    x = torch.ones(3)
    before = version_of(x)
    assert version_of(x) == before
    x.add_(1)
    assert version_of(x) != before
    with torch.inference_mode():
        made = torch.ones(3)
    assert version_of(made) != version_of(made)  # it has none, so it is never known to be the same


def test_weights_of_inference_mode_are_named() -> None:
    check_differentiable(nn.Linear(2, 3))
    with torch.inference_mode():
        norm = nn.BatchNorm1d(3, affine=False)
    with pytest.raises(ValueError, match="copy '1.running_mean', got 'a tensor of inference mode'"):
        check_differentiable(nn.Sequential(nn.Linear(2, 3), norm))


def test_gradients_inside_a_reentrant_checkpoint_can_be_asked_for() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    inside = []

    def block(x: torch.Tensor) -> torch.Tensor:
        inside.append(first(x))
        return last(inside[-1].tanh())

    (expected,) = torch.autograd.grad(block(x).square().sum(), inside)
    inside.clear()
    before = torch.utils.checkpoint.CheckpointFunction
    with without_reentry():
        total = checkpoint(block, x, use_reentrant=True).square().sum()
    assert torch.utils.checkpoint.CheckpointFunction is before
    (found,) = torch.autograd.grad(total, inside[:1])
    torch.testing.assert_close(found, expected)
    with pytest.raises(KeyError), without_reentry():
        raise KeyError
    assert torch.utils.checkpoint.CheckpointFunction is before
