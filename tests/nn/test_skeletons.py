"""Architectures are built without memory, and only as far as a file of weights can hold them."""

import pytest
import torch
from torch import nn

from lowrank.nn.skeletons import SLACK, bounded_skeleton, check_counts


@pytest.mark.parametrize("tensors", [2, 50])
def test_parameters_are_counted_while_they_are_made(tensors) -> None:
    most = 4 * tensors + SLACK
    with bounded_skeleton(tensors):
        layers = [nn.Linear(10**7, 10**7) for _ in range(most // 2)]
    assert all(p.is_meta for layer in layers for p in layer.parameters())
    words = f"`folder` must describe a model of its {tensors} tensors, got 'one of more than {most}'"
    with pytest.raises(ValueError, match=words), bounded_skeleton(tensors):
        [nn.Linear(3, 3) for _ in range(10**9)]
    assert not nn.Linear(3, 3).weight.is_meta  # and nothing is counted or moved any more
    assert torch.zeros(2).device.type == "cpu"
    [nn.Linear(1, 1) for _ in range(most)]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"num_hidden_layers": 2000}, "num_hidden_layers 2000"),
        ({"text_config": {"n_layer": 2000}}, "n_layer 2000"),
        ({"base": [{"options": {"depths": [1, 2000]}}]}, "depths 2000"),
    ],
)
def test_counts_of_layers_are_bounded_by_the_file(content, name) -> None:
    check_counts(content, 1000)
    with pytest.raises(ValueError, match=f"`folder` must describe a model of its 999 tensors, got '{name}'"):
        check_counts(content, 999)


def test_other_numbers_are_not_counts() -> None:
    check_counts({"vocab_size": 10**9, "layer_norm_eps": 1e9, "layer_types": ["full"], "use_layer_scale": True}, 0)
