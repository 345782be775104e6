"""A replacement, and the way back, keep dtype, flags and mode of weight and of bias, each its own."""

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import REPLACED, ZOO, of_zoo, ranks_of
from torch import nn

from lowrank.compression.block_folder import BlockFolder
from lowrank.compression.checkpoint import load_compressed, save_compressed
from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import fold, replace_layers
from lowrank.factorization.factorize import factorize
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.nn.surgery import split_packed
from lowrank.nn.usv import USVConv2d, USVLinear
from lowrank.training.oialr import OIALR, OIALRConfig

SHAPES = [(12, 6), (8, 8), (6, 12)]  # (out, in): tall, square, wide
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
every_storage = pytest.mark.parametrize("storage", FACTORED_LAYERS)


def model_of(shape: tuple[int, int], dtype: torch.dtype, bias: bool = True) -> Any:
    torch.manual_seed(0)
    out, inputs = shape
    return nn.Sequential(nn.Linear(inputs, out, bias=bias), nn.ReLU(), nn.Linear(out, inputs, bias=bias)).to(dtype)


def kinds(model: nn.Module) -> dict[str, tuple[torch.dtype, bool, torch.Size]]:
    return {name: (p.dtype, p.requires_grad, p.shape) for name, p in model.named_parameters()}


@every_storage
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=2)))
def test_factors_follow_the_weight_and_the_bias_apart(storage: str, shape: Any, flags: tuple[bool, bool]) -> None:
    for bias_dtype in (torch.float32, torch.float64):
        model = model_of(shape, torch.float32)
        model[0].weight.requires_grad_(flags[0])
        model[0].bias = nn.Parameter(model[0].bias.detach().to(bias_dtype), requires_grad=flags[1])
        before, bias = kinds(model), model[0].bias.detach().clone()
        replace_layers(model.train(), {"0": 2}, Configuration("svd", storage))
        assert model[0].training
        for name, parameter in model[0].named_parameters():
            expected = (bias_dtype, flags[1]) if name.endswith("bias") else (torch.float32, flags[0])
            assert (parameter.dtype, parameter.requires_grad) == expected
        if bias_dtype == torch.float32:
            torch.testing.assert_close(model[0].bias, bias)
            assert kinds(fold(model)) == before
            assert model[0].training


@every_storage
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_there_and_back_keeps_every_dtype(storage: str, dtype: torch.dtype, bias: bool) -> None:
    model = model_of((8, 8), dtype, bias)
    before, x = kinds(model), torch.randn(3, 8).to(dtype)
    replace_layers(model, {"0": 2, "2": 3}, Configuration("svd", storage))
    expected = model(x)
    assert kinds(fold(model)) == before
    torch.testing.assert_close(model(x), expected, **({"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {}))


def test_a_packed_layer_comes_back_with_the_flags_of_its_parts() -> None:
    model = nn.Sequential(nn.Linear(6, 12))
    model[0].bias.requires_grad_(False)
    before = kinds(model)
    split_packed(model, ["0"])
    assert all(flag == name.endswith("weight") for name, (_, flag, _) in kinds(model).items())
    replace_layers(model, {"0.k": 2}, "svd")
    assert kinds(fold(model)) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("later", DTYPES)
def test_layers_of_oialr_follow_a_later_cast(dtype: torch.dtype, later: torch.dtype, tmp_path: Path) -> None:
    for back in ("merge", "fold", "load and fold"):
        model, x = model_of((8, 8), dtype), torch.randn(3, 8)
        before = kinds(model_of((8, 8), dtype).to(later))
        training = OIALR(model, OIALRConfig(delay=1, sigma_cutoff=0), exclude=())
        training.step(torch.optim.SGD(model.parameters(), lr=0.1))
        model.to(later).eval()
        assert isinstance(model[0], USVLinear)
        assert model[0].weight.dtype == later
        expected = model(x.to(later))
        if back == "load and fold":
            save_compressed(model, tmp_path / "model")
            model = load_compressed(tmp_path / "model", architecture=model_of((8, 8), torch.float32))
            assert torch.equal(model(x.to(later)), expected)
        model = training.merge() if back == "merge" else fold(model)
        assert {name: kind[0] for name, kind in kinds(model).items()} == {n: kind[0] for n, kind in before.items()}
        tolerance = {"rtol": 0.1, "atol": 0.1} if torch.bfloat16 in (dtype, later) else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(model(x.to(later)), expected, **tolerance)


@pytest.mark.parametrize("trained", ["weight", "bias"])
@pytest.mark.parametrize("family", ZOO)
def test_every_family_keeps_the_flags_and_dtypes_of_weights_and_biases(family: str, trained: str) -> None:
    """Weights in float32 and biases in float64, or the other way round; the one is trained and the other frozen."""
    model, _ = of_zoo(family)
    ranks = ranks_of(model, layers=REPLACED[family])
    for name in ranks:
        for part, parameter in model.get_submodule(name).named_parameters():
            parameter.requires_grad_(part == trained)
            parameter.data = parameter.data.to(torch.float64 if part == "bias" else torch.float32)
    before = kinds(model)
    replace_layers(model, ranks, "svd")
    for name in ranks:
        for part, parameter in model.get_submodule(name).named_parameters():
            like = before[f"{name}.{'bias' if part.endswith('bias') else 'weight'}"]
            assert (parameter.dtype, parameter.requires_grad) == like[:2], (name, part)
    assert kinds(fold(model)) == before
    if trained == "weight":  # what is frozen is not converted
        training = OIALR(model, OIALRConfig(delay=1, sigma_cutoff=0), include=list(ranks), exclude=())
        training.step(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
        assert list(training.ranks) == list(training.layers)
        assert kinds(training.merge()) == before
    assert {kind[0] for kind in kinds(fold(model.to(torch.bfloat16))).values()} == {torch.bfloat16}


def convolutions() -> Any:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, stride=2, padding=1))


def test_converted_convolutions_are_folded_also_once_they_are_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = convolutions().bfloat16()
    model[1].bias.requires_grad_(False)
    before, x = kinds(model), torch.randn(2, 3, 9, 9).bfloat16()
    expected = model(x)
    OIALR(model, OIALRConfig(delay=1, sigma_cutoff=0), exclude=()).step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(model[0], USVConv2d)
    save_compressed(model, tmp_path / "model")
    loaded = load_compressed(tmp_path / "model", architecture=convolutions())
    torch.testing.assert_close(loaded(x), model(x))
    assert {name: kind[0] for name, kind in kinds(fold(loaded)).items()} == {n: kind[0] for n, kind in before.items()}
    assert kinds(fold(model)) == before
    for folded in (model, loaded):
        torch.testing.assert_close(folded(x), expected, rtol=0.05, atol=0.05)


def test_blocks_read_from_a_folder_keep_the_flags(tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Linear(6, 8))
    dense[0].bias.requires_grad_(False)
    model = copy.deepcopy(dense)
    rows = replace_layers(model, {"0": 2}, "svd")
    folder = BlockFolder(tmp_path / "blocks", {"any": 1})
    folder.write("block", {"0": model[0]}, {"0": rows[0]})
    found = folder.read("block", dense)
    assert found is not None
    assert kinds(found[0]["0"]) == kinds(model[0])


@pytest.mark.parametrize("rank", [2.0, 2.5, float("nan"), "2", None, 0, 9, -1])
def test_one_rank_that_is_no_whole_number_changes_nothing(rank: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    layers = list(model)
    for place in "012":
        with pytest.raises(ValueError, match=rf"`ranks.*'{place}'.* got {re.escape(repr(rank))}"):
            replace_layers(model, dict.fromkeys("012".replace(place, ""), 2) | {place: rank}, "svd")
        assert list(model) == layers


def test_layers_with_hooks_are_refused() -> None:
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        getattr(model[1], register)(lambda *_: None)
        with pytest.raises(ValueError, match="`model` must have no forward hooks on layer '1'"):
            replace_layers(model, {"0": 2, "1": 2}, "svd")
        assert type(model[0]) is nn.Linear


def test_a_factored_layer_alone_is_refused_by_fold() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    replace_layers(model, {"0": 2}, "svd")
    with pytest.raises(ValueError, match="got one that is a LowRankLinear itself"):
        fold(model[0])


@every_storage
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_has_one_dtype_unless_the_bias_is_given_another(storage: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = factorize(torch.randn(12, 8, generator=generator, dtype=torch.float64), 3)
    bias = torch.randn(12, generator=generator, dtype=torch.float64)
    layer = FACTORED_LAYERS[storage].from_factors(factors, bias, dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(torch.ones(2, 8, dtype=dtype)).dtype == dtype
    torch.testing.assert_close(layer.bias, bias.to(dtype))
    apart = FACTORED_LAYERS[storage].from_factors(factors, bias, dtype, torch.float64)
    assert torch.equal(apart.bias, bias)
