"""Surgery keeps what a model shares: layers under several names, tied weights, weights that are read."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lowrank.nn.surgery import PackedLinear, copy_mode, replace_module, split_packed, unify_linears


class Twice(nn.Module):
    """One layer under two names, and one alone."""

    def __init__(self, shared: nn.Module, alone: nn.Module) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared), nn.Sequential(alone)])

    def forward(self, x: Tensor) -> Tensor:
        return self.h[0](x) + self.h[1](2 * x) - self.h[2](x)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_conv1d_under_two_names_becomes_one_layer() -> None:
    model, x = Twice(Conv1D(6, 4), Conv1D(6, 4)), torch.randn(5, 4)
    before, count = model(x), parameters(model)
    assert unify_linears(model) == ["h.0.0", "h.2.0"]
    first: Any = model.h[0]
    assert type(first[0]) is nn.Linear
    assert model.get_submodule("h.1.0") is first[0]
    assert parameters(model) == count
    torch.testing.assert_close(model(x), before)


def test_a_packed_layer_under_two_names_stays_one() -> None:
    model, x = Twice(nn.Linear(4, 6), nn.Linear(4, 6)), torch.randn(5, 4)
    before, count = model(x), parameters(model)
    assert split_packed(model, ["h.0.0"]) == ["h.0.0.q", "h.0.0.k", "h.0.0.v"]
    assert model.get_submodule("h.1.0") is model.get_submodule("h.0.0")
    assert parameters(model) == count
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("kind", [Conv1D, nn.Linear])
def test_weights_that_two_layers_share_are_refused(kind: Any) -> None:
    one, two = kind(6, 6), kind(6, 6)
    two.weight = one.weight
    model = Twice(one, two)
    layers = list(model.h)
    operate = (lambda: unify_linears(model)) if kind is Conv1D else (lambda: split_packed(model, [r".*"]))
    with pytest.raises(ValueError, match=r"`model` must hold the weight of 'h.0.0' in one module.*'h.2.0.weight'"):
        operate()
    assert list(model.h) == layers
    assert type(layers[0][0]) is kind  # pyright: ignore


def test_a_layer_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="got one that is a Conv1D itself"):
        unify_linears(Conv1D(4, 4))
    with pytest.raises(ValueError, match="got one that is a Linear itself"):
        split_packed(nn.Linear(4, 6), [".*"])
    with pytest.raises(ValueError, match="`name` must be that of a submodule, got ''"):
        replace_module(nn.Linear(4, 6), "", nn.Linear(4, 6))


@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)])
def test_new_layers_follow_the_flags_of_weight_and_bias(flags: tuple[bool, bool]) -> None:
    model: Any = nn.Sequential(Conv1D(6, 4), nn.Linear(6, 6))
    for layer in model:
        layer.weight.requires_grad_(flags[0])
        layer.bias.requires_grad_(flags[1])
    unify_linears(model.eval())
    split_packed(model, ["1"])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == flags[name.endswith("bias")]
    assert not any(module.training for module in model.modules())
    assert copy_mode(nn.Linear(2, 2), model[0]).weight.requires_grad == flags[0]


def test_the_weight_of_a_packed_layer_is_that_of_its_parts() -> None:
    parts = [nn.Linear(4, rows) for rows in (6, 2, 3)]
    layer, x = PackedLinear(parts, "abc"), torch.randn(5, 4)
    assert layer.weight.shape == (11, 4)
    torch.testing.assert_close(functional.linear(x, layer.weight, layer.bias), layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["beit", "eva", "swinv2"])
def test_models_that_read_a_packed_weight_compute_the_same(family: str) -> None:
    sizes: dict[str, Any] = dict(img_size=16, patch_size=4, num_classes=3)
    build = {
        "beit": lambda: timm.models.Beit(**sizes, embed_dim=24, depth=1, num_heads=2),
        "eva": lambda: timm.models.Eva(**sizes, embed_dim=24, depth=1, num_heads=2, qkv_bias=True),
        "swinv2": lambda: timm.models.SwinTransformerV2(
            **sizes, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4
        ),
    }[family]
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, before = torch.randn(2, 3, 16, 16), copy.deepcopy(model)
    assert split_packed(model, [r".*\.qkv"])
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-4)
