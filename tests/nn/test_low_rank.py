"""Factored layers: exactness, sizes, pivots, state; packed and transposed projections as plain linear layers."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lowrank.calibration.collect import collect_statistics
from lowrank.compression.replace import replace_layers
from lowrank.factorization.factorize import Factors, factorize
from lowrank.factorization.methods import METHODS, whitened
from lowrank.factorization.moments import LayerStatistics
from lowrank.factorization.running_moments import statistics_of_rows
from lowrank.io.hashing import hash_model
from lowrank.nn.low_rank import FACTORED_LAYERS, LowRankLinear, PivotedLinear
from lowrank.nn.pivots import MAX_COEFFICIENT
from lowrank.nn.surgery import PackedLinear, split_packed, unify_linears
from lowrank.nn.targets import find_linears

KINDS = list(FACTORED_LAYERS.values())
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6}


def problem(shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, LayerStatistics, Tensor]:
    """A weight, statistics with gradients, a bias."""
    out, inputs = shape
    weight = torch.randn(out, inputs, generator=generator, dtype=torch.float64)
    rows = torch.randn(200, inputs, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, inputs)
    gradients = torch.randn(200, out, generator=generator, dtype=torch.float64) * torch.logspace(-1, 0, out)
    fisher = torch.rand(out, generator=generator, dtype=torch.float64)
    statistics = replace(statistics_of_rows(rows), gradient_gram=statistics_of_rows(gradients).gram, row_fisher=fisher)
    return weight, statistics, torch.randn(out, generator=generator, dtype=torch.float64)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_what_its_factors_say(shape, kind, method, with_bias, dtype, generator) -> None:
    weight, statistics, bias = problem(shape, generator)
    for rank in (1, min(shape) // 3, min(shape) - 1):
        factors = factorize(weight, rank, METHODS[method](statistics, weight))
        layer = kind.from_factors(factors, bias.to(dtype) if with_bias else None, dtype)
        expected = factors.dense()
        assert relative(layer.dense(), expected) <= DTYPES[dtype]
        assert relative(layer.weight, expected) <= DTYPES[dtype]
        assert layer.dense().dtype == torch.float64
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert (layer.bias is not None) == with_bias
        for lead in ((), (5,), (2, 3), (2, 3, 4), (0,)):
            x = torch.randn(*lead, shape[1], generator=generator, dtype=torch.float64).to(dtype)
            y = layer(x)
            wanted = x.double() @ expected.T + (bias if with_bias else 0.0)
            assert y.shape == (*lead, shape[0])
            assert y.dtype == dtype
            assert (y.double() - wanted).norm() <= 4 * DTYPES[dtype] * wanted.norm()


@pytest.mark.parametrize("with_bias", [True, False])
def test_sizes_are_those_of_the_formulas(shape, with_bias, generator) -> None:
    weight, _, bias = problem(shape, generator)
    out, inputs = shape
    for rank in (1, 7, min(shape) - 1):
        factors, extra = factorize(weight, rank), out if with_bias else 0
        plain, pivoted = (kind.from_factors(factors, bias if with_bias else None, torch.float64) for kind in KINDS)
        assert sum(p.numel() for p in plain.parameters()) == rank * (out + inputs) + extra
        assert sum(p.numel() for p in pivoted.parameters()) == rank * (out + inputs) - rank**2 + extra
        assert pivoted.state_dict()["pivots"].numel() == rank
        stored = sum(t.numel() for t in pivoted.state_dict().values())
        assert stored == rank * (out + inputs) - rank**2 + extra + rank


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_keeps_the_weight(shape, kind, generator) -> None:
    weight, _, bias = problem(shape, generator)
    if kind is PivotedLinear and shape[0] <= shape[1]:  # the weight itself: nothing is left for other rows to say
        with pytest.raises(
            ValueError, match=f"`factors` must have a rank below the {shape[0]} outputs, got {shape[0]}"
        ):
            kind.from_factors(factorize(weight, min(shape)), bias, torch.float64)
        return
    layer = kind.from_factors(factorize(weight, min(shape)), bias, torch.float64)
    x = torch.randn(4, shape[1], generator=generator, dtype=torch.float64)
    assert relative(layer.dense(), weight) <= 1e-12
    assert relative(layer(x), nn.functional.linear(x, weight, bias)) <= 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_pivots_are_distinct_rows_of_the_weight_and_the_others_lean_on_them_lightly(shape, method, generator) -> None:
    weight, statistics, _ = problem(shape, generator)
    for rank in (1, 5, min(shape) // 2, min(shape) - 1):
        factors = factorize(weight, rank, METHODS[method](statistics, weight))
        layer = PivotedLinear.from_factors(factors, None, torch.float64)
        assert layer.pivots.dtype == torch.int64
        assert len(set(layer.pivots.tolist())) == rank
        assert layer.left.weight.abs().max().item() <= MAX_COEFFICIENT * (1 + 1e-9)
        assert relative(layer.right.weight, factors.dense()[layer.pivots]) <= 1e-12


def test_pivots_are_light_where_partial_pivoting_alone_is_not(generator) -> None:
    size = 12  # on this matrix, a classic, LU with partial pivoting lets entries grow like 2^n
    hard = torch.eye(size, dtype=torch.float64) - torch.ones(size, size, dtype=torch.float64).tril(-1)
    hard[:, -1] = 1.0
    left = torch.cat([hard, torch.randn(20, size, generator=generator, dtype=torch.float64) * 3])
    right = torch.randn(size, 30, generator=generator, dtype=torch.float64)
    layer = PivotedLinear.from_factors(Factors(left, right, torch.zeros(30, dtype=torch.float64)), None, torch.float64)
    assert layer.left.weight.abs().max().item() <= MAX_COEFFICIENT * (1 + 1e-9)
    assert relative(layer.dense(), left @ right) <= 1e-12


@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ill_scaled_factors_stay_exact(shape, kind, compensated, generator) -> None:
    weight, _, _ = problem(shape, generator)
    factors = factorize(weight, 8)
    scales = torch.logspace(-8, 8, 8, dtype=torch.float64)[torch.randperm(8, generator=generator)]
    right = factors.right / scales[:, None] if compensated else factors.right
    scaled = Factors(factors.left * scales, right, factors.spectrum)
    layer = kind.from_factors(scaled, None, torch.float64)
    assert relative(layer.dense(), scaled.dense()) <= 1e-12
    single = kind.from_factors(scaled, None, torch.float32)
    assert relative(single.dense(), scaled.dense()) <= 1e-6


@pytest.mark.parametrize("content", ["zero", "rank 3", "one row"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_less_rank_than_asked_stay_exact(shape, kind, method, content, generator) -> None:
    weight, statistics, bias = problem(shape, generator)
    if content == "zero":
        weight = weight * 0
    elif content == "rank 3":
        weight = factorize(weight, 3).dense()
    else:
        weight[1:] = 0
    layer = kind.from_factors(factorize(weight, 6, METHODS[method](statistics, weight)), bias, torch.float64)
    assert torch.allclose(layer.dense(), weight, rtol=0, atol=1e-10)
    assert all(bool(torch.isfinite(p).all()) for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_finite_and_close(shape, kind, method, dtype, generator) -> None:
    weight, statistics, bias = problem(shape, generator)
    factors = factorize(weight, 8, METHODS[method](statistics, weight))
    layer = kind.from_factors(factors, bias.to(dtype), dtype)
    y = layer(torch.randn(6, shape[1], generator=generator).to(dtype))
    assert y.dtype == dtype
    assert bool(torch.isfinite(y).all())
    assert relative(layer.dense(), factors.dense()) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_large_biases_take_no_digits_of_other_outputs(shape, kind, dtype, generator) -> None:
    weight, _, _ = problem(shape, generator)
    factors, x = factorize(weight, 7), torch.randn(50, shape[1], generator=generator, dtype=torch.float64)
    bias = 0.1 * torch.randn(shape[0], generator=generator, dtype=torch.float64)
    large = torch.arange(shape[0]) % 4 == 0
    errors = []
    for size in (0.1, 1e2, 1e4):
        bias[large] = size
        layer = kind.from_factors(factors, bias.to(dtype), dtype)
        assert torch.equal(layer.bias.detach(), bias.to(dtype))  # rounded once
        wanted = x @ factors.dense().T + bias
        errors.append(relative(layer(x.to(dtype))[:, ~large], wanted[:, ~large]))
    assert max(errors) <= 1.001 * errors[0]
    assert errors[0] <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_runs_under_autocast(shape, kind, generator) -> None:
    weight, _, bias = problem(shape, generator)
    layer = kind.from_factors(factorize(weight, 7), bias.float(), torch.float32)
    x = torch.randn(5, shape[1], generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative(y, layer(x)) <= 4 * torch.finfo(torch.bfloat16).eps


def test_terms_weigh_the_same_on_both_sides(shape, generator) -> None:
    weight, statistics, _ = problem(shape, generator)
    layer = LowRankLinear.from_factors(factorize(weight, 8, whitened(statistics, weight)), None, torch.float64)
    assert torch.allclose(layer.left.weight.norm(dim=0), layer.right.weight.norm(dim=1), rtol=1e-12)


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_state_fills_a_new_layer(shape, kind, assign, generator) -> None:
    weight, _, bias = problem(shape, generator)
    layer = kind.from_factors(factorize(weight, 7), bias, torch.float64)
    state = layer.state_dict()
    assert "others" not in state
    if assign:
        with torch.device("meta"):
            other = kind(shape[1], shape[0], 7)
    else:
        other = kind(shape[1], shape[0], 7, dtype=torch.float64)
    nn.Sequential(other).load_state_dict({f"0.{name}": t for name, t in state.items()}, assign=assign)
    x = torch.randn(3, shape[1], generator=generator, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.dense(), layer.dense())
    assert hash_model(other) == hash_model(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_apart(shape, kind, generator) -> None:
    weight, _, bias = problem(shape, generator)
    layer = kind.from_factors(factorize(weight, 7), bias, torch.float64)
    x = torch.randn(3, shape[1], generator=generator, dtype=torch.float64)
    twin, before = copy.deepcopy(layer), layer(x)
    assert torch.equal(twin(x), before)
    other = kind.from_factors(factorize(weight.flip(0), 7), bias, torch.float64)
    twin.load_state_dict(other.state_dict())  # the hook that follows must be the copy's own
    assert torch.equal(twin(x), other(x))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_can_be_sent_to_another_process(shape, kind, generator) -> None:
    weight, _, bias = problem(shape, generator)
    layer = kind.from_factors(factorize(weight, 7), bias, torch.float64)
    x = torch.randn(3, shape[1], generator=generator, dtype=torch.float64)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_cast_keeps_the_indices(shape, dtype, generator) -> None:
    weight, _, bias = problem(shape, generator)
    layer = PivotedLinear.from_factors(factorize(weight, 7), bias, torch.float64)
    pivots, others = layer.pivots.clone(), layer.others.clone()
    layer.to(dtype)
    assert layer.pivots.dtype == layer.others.dtype == torch.int64
    assert torch.equal(layer.pivots, pivots)
    assert torch.equal(layer.others, others)
    assert layer(torch.ones(shape[1], dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_layer_names_its_sizes(kind) -> None:
    assert "in_features=9, out_features=11, rank=4" in repr(kind(9, 11, 4))


# --- packed projections -----------------------------------------------------------------------------------------------


def vit(qkv_bias: bool = True) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3)
    model = VisionTransformer(**sizes, qkv_bias=qkv_bias).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def images(generator: torch.Generator) -> Tensor:
    return torch.randn(6, 3, 16, 16, generator=generator)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_splitting_changes_no_output_and_keeps_the_order(qkv_bias, generator) -> None:
    model, x = vit(qkv_bias), images(generator)
    dense = copy.deepcopy(model)
    names = split_packed(model, [r".*\.qkv"])
    assert names == [f"blocks.{i}.attn.qkv.{part}" for i in (0, 1) for part in "qkv"]
    assert relative(model(x), dense(x)) <= 1e-6
    for position, name in enumerate(names[3:]):
        rows = slice(24 * position, 24 * (position + 1))
        part, packed = model.get_submodule(name), dense.blocks[1].attn.qkv
        assert torch.equal(part.weight, packed.weight[rows])
        assert part.bias is None if not qkv_bias else torch.equal(part.bias, packed.bias[rows])
    joined = model.blocks[0].attn.qkv
    assert torch.equal(joined.dense(), dense.blocks[0].attn.qkv.weight.double())
    assert joined.bias is None if not qkv_bias else torch.equal(joined.bias, dense.blocks[0].attn.qkv.bias)


def test_one_shared_moment_truncates_as_three_matrices(generator) -> None:
    model, batch = vit(), images(generator)
    packed = collect_statistics(model, [batch], ["blocks.0.attn.qkv"])["blocks.0.attn.qkv"]
    weights = model.blocks[0].attn.qkv.weight.detach().double().chunk(3)
    names = split_packed(model, ["blocks.0.attn.qkv"])
    found = collect_statistics(model, [batch], names)
    assert len({found[name].gram.data_ptr() for name in names}) == 1
    replace_layers(model, dict(zip(names, (3, 5, 7), strict=True)), "whitened", found)
    for name, weight, rank in zip(names, weights, (3, 5, 7), strict=True):
        assert (
            relative(model.get_submodule(name).dense(), factorize(weight, rank, whitened(packed, weight)).dense())
            <= 1e-6
        )


def test_parts_have_the_names_given(generator) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8)).eval()
    dense, x = copy.deepcopy(model), torch.randn(3, 4, generator=generator)
    assert split_packed(model, ["0", "1"], ("gate", "up")) == ["0.gate", "0.up", "1.gate", "1.up"]
    assert isinstance(model[0], PackedLinear)
    assert torch.allclose(model(x), dense(x), atol=1e-6)
    assert not any(module.training for module in model.modules())


def test_sizes_that_do_not_divide_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 7))
    before = hash_model(model)
    with pytest.raises(ValueError, match=r"`layers` must pack 3 equal parts, got 7 outputs in '1'"):
        split_packed(model, [r"\d"])
    assert hash_model(model) == before
    assert all(type(layer) is nn.Linear for layer in model)


# --- transposed projections -------------------------------------------------------------------------------------------


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def ids(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (16, 12), generator=generator)}


def test_unified_layers_compute_the_same_and_compress(generator) -> None:
    model, batch = gpt2(), ids(generator)
    before = model(**batch).logits.detach()
    names = unify_linears(model)
    assert len(names) == 8
    assert relative(model(**batch).logits, before) <= 1e-6
    assert list(find_linears(model)) == names
    statistics = collect_statistics(model, [batch])
    rows = replace_layers(model, dict.fromkeys(names, 6), "whitened", statistics)
    assert [row["layer"] for row in rows] == names
    assert all(row["storage"] == "factors" and 0 < row["measured_error"] < 1 for row in rows)
    assert bool(torch.isfinite(model(**batch).logits).all())
    assert unify_linears(model) == []


@pytest.mark.parametrize("entry", ["transformer.h.0.attn.c_attn", r".*\.\d+\..*"])
def test_transposed_layers_are_refused_with_the_remedy(entry: str) -> None:
    with pytest.raises(ValueError, match=r"'transformer.h.0.attn.c_attn', a Conv1D: call .*unify_linears"):
        find_linears(gpt2(), [entry])


def test_frozen_weights_stay_frozen_when_they_are_split_or_unified() -> None:
    split, unified = vit().requires_grad_(False), gpt2().requires_grad_(False)
    split_packed(split, [r".*\.qkv"])
    unify_linears(unified)
    for model in (split, unified):
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == []
