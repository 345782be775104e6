"""Lazy weights: facts without a product, values and gradients as of the product."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5EncoderModel

from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import replace_layers
from lowrank.factorization.factorize import Factors, factorize
from lowrank.nn.lazy_weight import _FACTS, LazyWeight
from lowrank.nn.low_rank import LowRankLinear, PivotedLinear
from lowrank.nn.surgery import PackedLinear
from lowrank.nn.targets import find_linears
from lowrank.nn.usv import USV, USVConv2d, USVLinear

SHAPES = [(9, 5), (6, 6), (4, 11)]  # tall, square, wide


def usv_of(weight: Tensor) -> USV:
    u, sigma, vh = torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)
    return USV(u, sigma.diag(), vh)


def factors_of(layer: nn.Linear) -> Factors:
    return factorize(layer.weight.detach().double(), 3)


def usv_conv(layer: nn.Linear) -> USVConv2d:
    out, inputs = layer.weight.shape
    conv = nn.Conv2d(inputs, out, 1)
    return USVConv2d.from_dense(conv, usv_of(conv.weight))


KINDS: dict[str, Callable[[nn.Linear], Any]] = {
    "factors": lambda layer: LowRankLinear.from_factors(factors_of(layer), layer.bias, torch.float32),
    "pivoted": lambda layer: PivotedLinear.from_factors(factors_of(layer), layer.bias, torch.float32),
    "usv": lambda layer: USVLinear.from_dense(layer, usv_of(layer.weight)),
    "usv convolution": usv_conv,
    "packed": lambda layer: PackedLinear([layer, copy.deepcopy(layer)], ["a", "b"]),
}


@pytest.fixture(params=[(kind, shape) for kind in KINDS for shape in SHAPES], ids=str)
def layer(request: pytest.FixtureRequest) -> Any:
    kind, (out, inputs) = request.param
    torch.manual_seed(0)
    return KINDS[kind](nn.Linear(inputs, out))


def dense(layer: Any) -> Tensor:
    value = layer.dense()
    return value.unflatten(1, (layer.in_channels, 1, 1)) if isinstance(layer, USVConv2d) else value


def test_values_are_those_of_the_dense_weight(layer: Any) -> None:
    expected, weight = dense(layer), layer.weight
    assert isinstance(weight, Tensor)
    assert weight.shape == expected.shape
    assert (weight.dtype, weight.device) == (torch.float32, torch.device("cpu"))
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((2 * weight + 1).double(), 2 * expected + 1, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight[0], weight.detach()[0])


def test_facts_need_no_product(layer: Any) -> None:
    products: list[Any] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            products.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        weight = layer.weight
        facts = weight.dtype, weight.shape, weight.device, weight.ndim, weight.dim(), weight.numel(), weight.size(0)
        assert isinstance(weight, Tensor)
        assert not products
        _ = weight + 1
        assert products
    assert facts[1].numel() == facts[5]


def test_gradients_reach_the_parts(layer: Any) -> None:
    if isinstance(layer, USVConv2d):
        probe = torch.randn(2, layer.in_channels, 3, 3)
        called, read = layer(probe), functional.conv2d(probe, layer.weight, layer.bias)
    else:
        probe = torch.randn(7, layer.weight.shape[1])
        called, read = layer(probe), functional.linear(probe, layer.weight, layer.bias)
    torch.testing.assert_close(called, read, rtol=1e-4, atol=1e-5)
    parts = [part for part in layer.parameters() if part.requires_grad]
    by_call, by_read = (torch.autograd.grad(y.square().sum(), parts) for y in (called, read))
    for one, other in zip(by_call, by_read, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_each_use_sees_the_parts_as_they_are_now() -> None:
    part = torch.ones(2, 3)
    weight = LazyWeight(part, (2, 3), lambda: part * 2)
    assert weight.sum() == 12
    part += 1
    assert weight.sum() == 24


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # torchao has taken over
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_model_that_asks_for_a_dtype_multiplies_nothing_out(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 asks `wo.weight.dtype` in every pass; after dynamic quantisation too, where a weight is a method."""
    sizes = dict(vocab_size=30, d_model=24, d_kv=12, d_ff=40, num_layers=2, num_heads=2)
    model = T5EncoderModel(T5Config(**sizes)).eval()
    ids = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    names = list(find_linears(model))
    replace_layers(model, dict.fromkeys(names, 6), Configuration("svd", storage))
    uses, compute = [], LazyWeight.__torch_function__.__func__  # pyright: ignore

    def count(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        uses.append(func)
        return compute(cls, func, types, args, kwargs)

    monkeypatch.setattr(LazyWeight, "__torch_function__", classmethod(count))
    with torch.no_grad():
        expected = model(input_ids=ids)[0]
    assert uses
    assert set(uses) <= _FACTS
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    with torch.no_grad():
        output = quantised(input_ids=ids)[0]
    assert (output - expected).norm() < 0.1 * expected.norm()
    layer: Any = quantised.get_submodule(names[-1])
    assert (layer.weight - model.get_submodule(names[-1]).weight).norm() < 0.05 * layer.weight.norm()
