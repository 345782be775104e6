"""Quantised layers: closed forms, the bound of rounding, and what a pass computes."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank.nn.low_rank import LowRankLinear, PivotedLinear
from lowrank.nn.quantized import LARGEST, QuantizedLinear, _pack, _unpack, count_parameters

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def linear(weight: Tensor, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return layer


def parts(layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Codes and scales, `(out, in)`, float64."""
    codes = layer.codes if layer.bits == 8 else _unpack(layer.codes, layer.in_features)
    scale = layer.scale.double().repeat_interleave(layer.group, 1)[:, : layer.in_features]
    return codes.double(), scale


def test_codes_are_those_of_the_formula() -> None:
    eight = QuantizedLinear.from_linear(
        linear(torch.tensor([[127.0, -127.0, 3.4, -0.6, 0.0], [0.0, 0.6, 1.0, 2.1, -4]]))
    )
    assert eight.codes.tolist() == [[127, -127, 3, -1, 0], [0, 19, 32, 67, -127]]
    assert eight.scale[:, 0].tolist() == pytest.approx([1.0, 4 / 127])
    assert eight.codes.dtype == torch.int8
    four = QuantizedLinear.from_linear(linear(torch.tensor([[7.0, -3.6, 0.2, 14.0, -7.0]])), 4, group=3)
    assert _unpack(four.codes, 5).tolist() == [[7, -4, 0, 7, -4]]  # -3.5 rounds to even
    assert four.scale.tolist() == [[1.0, 2.0]]
    assert four.codes.shape == (1, 3)
    assert torch.equal(four.dequantize(), torch.tensor([[7.0, -4.0, 0.0, 14.0, -8.0]]))


@pytest.mark.parametrize("inputs", [1, 2, 5, 16])
def test_packed_codes_come_back(inputs: int) -> None:
    codes = (torch.arange(3 * inputs) % 15 - 7).to(torch.int8).view(3, inputs)
    packed = _pack(codes)
    assert packed.shape == (3, math.ceil(inputs / 2))
    assert torch.equal(_unpack(packed, inputs), codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-6, 3e4])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 3), (4, None), (4, 1), (4, 5)])
def test_no_weight_changes_by_more_than_half_a_scale(bits, group, size, dtype) -> None:
    for shape in ((1, 1), (40, 6), (17, 17), (3, 300)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(size).clamp(-6e4, 6e4).to(dtype)
        layer = QuantizedLinear.from_linear(linear(weight), bits, group)
        codes, scale = parts(layer)
        assert layer.scale.dtype == dtype
        assert codes.abs().max() <= LARGEST[bits]
        assert ((weight.double() - codes * scale).abs() <= scale / 2 * (1 + 1e-12)).all()
        assert torch.equal(layer.dequantize(), (codes.to(dtype) * scale.to(dtype)))


@pytest.mark.parametrize("bits", LARGEST)
def test_zeros_stay_zeros(bits: int) -> None:
    weight = torch.tensor([[0.0, -0.0, 0.0], [-0.0, 2.0, 0.0]])
    layer = QuantizedLinear.from_linear(linear(weight), bits)
    assert torch.equal(layer.dequantize() != 0, weight != 0)
    assert torch.allclose(layer.dequantize(), weight)
    assert layer.scale[0].tolist() == [1.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", LARGEST)
def test_outputs_are_within_the_bound_of_the_weights(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(150, 20, dtype=dtype), torch.randn(2, 5, 150, dtype=dtype, requires_grad=True)
    layer = QuantizedLinear.from_linear(dense, bits)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, functional.linear(x, layer.dequantize(), dense.bias))
    codes, scale = parts(layer)
    exact = x.double() @ (codes * scale).T + dense.bias.double()
    wanted = x.double() @ dense.weight.double().T + dense.bias.double()
    bound = x.double().abs() @ (scale / 2).T
    assert ((exact - wanted).abs() <= bound * (1 + 1e-9)).all()
    rounding = 4 * torch.finfo(dtype).eps * (x.double().abs() @ dense.weight.double().abs().T + 1)
    assert ((y.double() - wanted).abs() <= bound + rounding).all()
    y.sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand_as(x), rtol=0.05, atol=0.05)
    assert layer.bias is not dense.bias
    assert count_parameters(layer) == count_parameters(dense)


@pytest.mark.parametrize("bits", LARGEST)
@pytest.mark.parametrize("kind", [LowRankLinear, PivotedLinear])
def test_factored_layers_work_with_quantised_parts(kind, bits: int) -> None:
    torch.manual_seed(0)
    layer = kind(30, 20, 6)
    layer.left = QuantizedLinear.from_linear(layer.left, bits)
    layer.right = QuantizedLinear.from_linear(layer.right, bits)
    x = torch.randn(4, 30)
    dense = layer.dense()
    assert torch.allclose(layer(x), (x.double() @ dense.T + layer.bias.double()).float(), atol=1e-5)
    assert torch.allclose(layer.weight @ x.T, (dense @ x.T.double()).float(), atol=1e-5)
    assert torch.allclose(layer.multiply(x.T.double()), dense @ x.T.double())
    assert (layer.weight.dtype, layer.weight.shape) == (torch.float32, (20, 30))


@pytest.mark.parametrize("bits", LARGEST)
def test_a_state_fills_an_empty_layer(bits: int) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(7, 5), bits, group=4)
    with torch.device("meta"):
        other = QuantizedLinear(7, 5, bits, 4)
    other.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 7)
    assert torch.equal(other(x), layer(x))
    half = layer.to(torch.bfloat16)
    assert half.codes.dtype in (torch.int8, torch.uint8)
    assert half(x.bfloat16()).dtype == half.weight.dtype == torch.bfloat16
