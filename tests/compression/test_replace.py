"""Compressed models: sizes and errors as promised, everything that works on the dense model, and refusals that change nothing."""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from families import (
    FAMILIES,
    LAYERS,
    REPLACED,
    SMALL,
    ZOO,
    compressed,
    loss,
    made,
    of_zoo,
    outputs,
    ranks_of,
    relative,
    weights_below,
)
from torch import Tensor, nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.on_demand import OnDemand
from lowrank.compression.checkpoint import RECORD
from lowrank.compression.configuration import Configuration
from lowrank.compression.pruning import prune
from lowrank.compression.replace import decompose, fold, replace_layers
from lowrank.compression.result import parameter_counts
from lowrank.factorization.factorize import factorize
from lowrank.factorization.methods import METHODS
from lowrank.factorization.moments import LayerStatistics
from lowrank.factorization.rank_allocation import allocate_ranks, kept_parameters, rank_for_keep
from lowrank.factorization.running_moments import statistics_of_rows
from lowrank.factorization.storages import STORAGES
from lowrank.io.hashing import hash_model
from lowrank.nn.batches import Batch, compute_logits
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.nn.surgery import split_packed
from lowrank.nn.targets import find_linears

# --- sizes and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_errors_are_those_promised(family, storage, method) -> None:
    model, batches, statistics = made(family)
    dense = copy.deepcopy(model)
    names, requested = list(find_linears(model, LAYERS)), 0.6
    rows = replace_layers(model, ranks_of(model, requested, storage), Configuration(method, storage), statistics)
    assert [row["layer"] for row in rows] == names
    for row in rows:
        layer = dict(model.named_modules())[row["layer"]]
        weight = dense.get_submodule(row["layer"]).weight
        assert type(layer) is FACTORED_LAYERS[storage]
        assert (row["out"], row["in"]) == tuple(weight.shape)
        own = {f"it.{key}": t for key, t in layer.state_dict().items()}
        assert weights_below(own, "it") == (row["parameters"], row["indices"])
        assert row["parameters"] == kept_parameters(weight.shape, row["rank"], storage)
        assert row["dense_parameters"] == weight.numel()
        assert row["keep"] == row["parameters"] / weight.numel() <= requested
        assert row["predicted_error"] == pytest.approx(row["measured_error"], abs=1e-6)
        assert 0 < row["measured_error"] < 1
        assert (row["storage"], row["method"]) == (storage, method)
        assert layer.bias is None if dense.get_submodule(row["layer"]).bias is None else layer.bias is not None
    assert bool(torch.isfinite(outputs(model, batches)).all())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", SMALL)
def test_counts_are_those_of_the_table(family, storage) -> None:
    model, _, statistics = made(family)
    dense = copy.deepcopy(model)
    rows = replace_layers(model, ranks_of(model, 0.6, storage), Configuration("whitened", storage), statistics)
    counts = parameter_counts(model, dense, LAYERS)
    assert counts["targeted_parameters"] == sum(row["parameters"] for row in rows)
    assert counts["keep_targeted"] == counts["targeted_parameters"] / sum(row["dense_parameters"] for row in rows)
    assert counts["model_parameters"] == sum(p.numel() for p in model.parameters())
    saved = sum(row["dense_parameters"] - row["parameters"] for row in rows)
    assert counts["model_parameters"] == sum(p.numel() for p in dense.parameters()) - saved
    assert counts["keep_model"] == counts["model_parameters"] / sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", ["bert", "llama", "plain"])
def test_in_float64_the_error_is_the_predicted_one(family, storage, method) -> None:
    model, _, statistics = made(family, torch.float64)
    dense = copy.deepcopy(model)
    rows = replace_layers(model, ranks_of(model, 0.5, storage), Configuration(method, storage), statistics)
    for row in rows:
        assert row["predicted_error"] == pytest.approx(row["measured_error"], abs=1e-10)
        if method == "whitened":  # a second way, on the square root of the moment
            difference = dense.get_submodule(row["layer"]).weight - model.get_submodule(row["layer"]).dense()
            values, vectors = torch.linalg.eigh(statistics[row["layer"]].gram)
            root = vectors * values.clamp_min(0).sqrt()
            whole = (dense.get_submodule(row["layer"]).weight @ root).norm()
            assert ((difference @ root).norm() / whole).item() == pytest.approx(row["measured_error"], abs=1e-7)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("keep", [0.3, 0.55, 0.8, 0.97])
def test_a_budget_for_all_layers_is_kept(keep, storage) -> None:
    model, _, statistics = made("llama")
    spectra = {name: f.spectrum for name, f in decompose(model, "two_sided", statistics).items()}
    shapes = {name: tuple(layer.weight.shape) for name, layer in find_linears(model, LAYERS).items()}
    rows = replace_layers(
        model, allocate_ranks(shapes, keep, spectra, storage=storage), Configuration("two_sided", storage), statistics
    )
    assert sum(row["parameters"] for row in rows) <= keep * sum(row["dense_parameters"] for row in rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", STORAGES)
def test_the_weights_stored_are_those_of_the_method(storage, method) -> None:
    model, _, statistics = made("bert", torch.float64)
    layers = {name: layer.weight.detach().clone() for name, layer in find_linears(model, LAYERS).items()}
    ranks = ranks_of(model, 0.5, storage)
    replace_layers(model, ranks, Configuration(method, storage), statistics)
    for name, weight in layers.items():
        expected = factorize(weight, ranks[name], METHODS[method](statistics[name], weight)).dense()
        assert relative(model.get_submodule(name).dense(), expected) <= 1e-10


@pytest.mark.parametrize("storage", STORAGES)
def test_a_layer_that_would_not_shrink_stays_as_it_is(storage) -> None:
    model, _, statistics = made("bert")
    shapes = {name: tuple(layer.weight.shape) for name, layer in find_linears(model, LAYERS).items()}
    ranks = ranks_of(model, 0.6, storage)
    kept = "bert.encoder.layer.0.intermediate.dense"
    out, inputs = shapes[kept]
    ranks[kept] = min(
        rank for rank in range(1, min(out, inputs) + 1) if kept_parameters((out, inputs), rank, storage) == out * inputs
    )
    layer = model.get_submodule(kept)
    weight, bias, content = layer.weight, layer.bias, layer.weight.detach().clone()
    rows = {
        row["layer"]: row
        for row in replace_layers(model, ranks, Configuration("whitened", storage, centre=True), statistics)
    }
    assert model.get_submodule(kept) is layer
    assert layer.weight is weight
    assert layer.bias is bias
    assert torch.equal(weight, content)
    row = rows[kept]
    assert (row["storage"], row["rank"], row["keep"], row["indices"]) == ("dense", min(out, inputs), 1.0, 0)
    assert row["parameters"] == row["dense_parameters"] == out * inputs
    assert row["predicted_error"] == row["measured_error"] == 0.0
    assert sum(row["storage"] == storage for row in rows.values()) == len(rows) - 1
    below = rank_for_keep((out, inputs), 1 - 1e-9, storage)  # one rank less is smaller, and factored
    assert kept_parameters((out, inputs), below, storage) < out * inputs
    assert replace_layers(model, {kept: below}, Configuration("whitened", storage), statistics)[0]["storage"] == storage


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", SMALL)
def test_full_rank_reproduces_the_outputs(family, storage) -> None:
    model, batches, statistics = made(family)
    before, state = outputs(model, batches), hash_model(model)
    ranks = {name: min(layer.weight.shape) for name, layer in find_linears(model, LAYERS).items()}
    rows = replace_layers(model, ranks, Configuration("whitened", storage), statistics)
    assert {row["storage"] for row in rows} == {"dense"}
    assert hash_model(model) == state
    assert torch.equal(outputs(model, batches), before)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS)
def test_weights_of_low_rank_lose_nothing(method, storage) -> None:
    model, batches, statistics = made("bert", torch.float64)
    with torch.no_grad():
        for layer in find_linears(model, LAYERS).values():
            u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_((u[:, :5] * s[:5]) @ v[:5])
    before = outputs(model, batches)
    replace_layers(model, dict.fromkeys(find_linears(model, LAYERS), 5), Configuration(method, storage), statistics)
    assert relative(outputs(model, batches), before) <= 1e-6


def find_ties(model: nn.Module) -> list[set[str]]:
    """The names of each parameter that has several."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return [group for group in names.values() if len(group) > 1]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", ZOO)
def test_replaced_layers_of_every_family_compute_the_same_if_nothing_is_cut(family, storage) -> None:
    model, batches = of_zoo(family, torch.float64)
    linears = find_linears(model, REPLACED[family])
    with torch.no_grad():
        for layer in linears.values():
            u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_((u[:, :5] * s[:5]) @ v[:5])
    before, ties = outputs(model, batches), find_ties(model)
    rows = replace_layers(model, dict.fromkeys(linears, 5), Configuration("svd", storage))
    assert {row["storage"] for row in rows} == {storage}
    assert relative(outputs(model, batches), before) <= 1e-9
    assert find_ties(model) == ties


TIED = dict.fromkeys(("BART", "T5", "Llama", "Gemma 3", "GPT-2", "OPT"), "lm_head") | {"Whisper": "proj_out"}


@pytest.mark.parametrize("family", ZOO)
def test_tied_layers_of_every_family_are_refused_by_name(family) -> None:
    model, _ = of_zoo(family)
    linears = find_linears(model, [".*"])
    tied = {name.removesuffix(".weight") for group in find_ties(model) for name in group} & linears.keys()
    assert tied == {TIED[family]} if family in TIED else not tied
    state, modules = hash_model(model), dict(model.named_modules())
    for name in tied:
        first = next(iter(linears))
        with pytest.raises(ValueError, match=f"`ranks` must leave out layer '{name}': its weight is shared"):
            replace_layers(model, {first: 2, name: 2}, "svd")
        with pytest.raises(ValueError, match=f"`ratios` must leave out layer '{name}': its weight is shared"):
            prune(model, {first: 0.5, name: 0.5}, "magnitude")
    assert hash_model(model) == state
    assert dict(model.named_modules()) == modules


def test_modes_devices_and_frozen_weights_are_kept() -> None:
    model, _, statistics = made("bert")
    names = list(find_linears(model, LAYERS))
    model.get_submodule(names[0]).requires_grad_(False)
    model.get_submodule(names[1]).train()
    replace_layers(model, ranks_of(model), "whitened", statistics)
    assert [p.requires_grad for p in model.get_submodule(names[0]).parameters()] == [False] * 3
    assert [p.requires_grad for p in model.get_submodule(names[1]).parameters()] == [True] * 3
    assert [module.training for module in model.get_submodule(names[1]).modules()] == [True] * 3
    assert not model.get_submodule(names[2]).training


# --- the mean output --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", ["svd", "whitened", "two_sided"])
def test_centring_keeps_the_mean_output_of_layers_with_a_bias(method, storage) -> None:
    model, _, statistics = made("plain", torch.float64)
    model[0].bias.data += 3.0  # means that matter
    batch = 2 + torch.randn(200, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layers = ["0", "2", "4"]
    statistics = collect_statistics(model, [batch], layers, loss=loss)
    dense = copy.deepcopy(model)
    rows = replace_layers(model, {"0": 4, "2": 6, "4": 5}, Configuration(method, storage, centre=True), statistics)
    assert [row["centre"] for row in rows] == [True, False, True]
    assert model[2].bias is None
    for position in (0, 4):
        x = dense[:position](batch)  # the inputs that the statistics saw
        before, after = dense[position](x).mean(0), model[position](x).mean(0)
        assert relative(after, before) <= 1e-12
        assert (model[position].bias - dense[position].bias).norm() > 1e-3 * dense[position].bias.norm()
    assert all(row["predicted_error"] == pytest.approx(row["measured_error"], abs=1e-10) for row in rows)


def test_centring_never_does_worse_on_the_calibration_data() -> None:
    errors = []
    batch = 2 + torch.randn(200, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for centre in (False, True):
        model, _, _ = made("plain", torch.float64)
        dense, statistics = copy.deepcopy(model), collect_statistics(model, [batch], ["0"])
        replace_layers(model, {"0": 4}, Configuration("whitened", centre=centre), statistics)
        errors.append((model[0](batch) - dense[0](batch)).norm().item())
    assert errors[1] < errors[0]


def test_without_centring_biases_stay() -> None:
    model, _, statistics = made("bert")
    biases = {name: layer.bias.detach().clone() for name, layer in find_linears(model, LAYERS).items()}
    rows = replace_layers(model, ranks_of(model), "whitened", statistics)
    assert not any(row["centre"] for row in rows)
    assert all(torch.equal(model.get_submodule(name).bias, bias) for name, bias in biases.items())


# --- the ways to the same model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", STORAGES)
def test_factors_made_before_give_the_same_model(storage, method, centre) -> None:
    direct, batches, statistics = made("bert", torch.float64)
    sweep = copy.deepcopy(direct)
    factors = decompose(direct, method, statistics, LAYERS, centre=centre)
    assert {f.left.dtype for f in factors.values()} == {torch.float64}
    assert all(f.rank == min(len(f.left), f.right.shape[1]) == len(f.spectrum) for f in factors.values())
    ranks = ranks_of(direct, 0.5, storage)
    rows = replace_layers(direct, ranks, Configuration(method, storage, centre=centre), statistics)
    others = replace_layers(sweep, ranks, Configuration(method, storage, centre=centre), statistics, factors=factors)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        assert row["predicted_error"] == pytest.approx(other["predicted_error"], abs=1e-10)
        assert row["measured_error"] == pytest.approx(other["measured_error"], abs=1e-10)
        assert {k: v for k, v in row.items() if "error" not in k} == {
            k: v for k, v in other.items() if "error" not in k
        }
        name = row["layer"]
        assert relative(sweep.get_submodule(name).dense(), direct.get_submodule(name).dense()) <= 1e-9
    assert relative(outputs(sweep, batches), outputs(direct, batches)) <= 1e-8


def test_the_order_of_the_rows_is_that_of_the_model_whatever_was_asked_first() -> None:
    model, _, statistics = made("bert")
    ranks = ranks_of(model)
    rows = replace_layers(model, dict(reversed(ranks.items())), "whitened", statistics)
    assert [row["layer"] for row in rows] == list(ranks)


def test_two_calls_are_one_and_extend_the_record() -> None:
    once, _, statistics = made("bert")
    twice, before, ranks = copy.deepcopy(once), hash_model(once), ranks_of(once)
    rows = replace_layers(once, ranks, "whitened", statistics)
    names = list(ranks)
    parts = [{name: ranks[name] for name in names[:5]}, {name: ranks[name] for name in names[5:]}]
    found = [row for part in parts for row in replace_layers(twice, part, "whitened", statistics)]
    assert found == rows
    assert hash_model(twice) == hash_model(once)
    for model in (once, twice):
        record = getattr(model, RECORD)
        assert record["model"] == before  # of the dense model, also after the second call
        assert record["layers"] == {row["layer"]: row for row in rows}


class LayerByLayer(OnDemand):
    """Statistics that are collected when a layer asks for them, from the model as it is then."""

    def __init__(self, model: nn.Module, batches: list[Batch]) -> None:
        self.model, self.batches = model, batches
        self.names = list(find_linears(model, LAYERS))
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> LayerStatistics:
        self.asked.append(name)
        return collect_statistics(self.model, self.batches, [name])[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@pytest.mark.parametrize("method", ["asvd", "whitened"])
@pytest.mark.parametrize("family", SMALL)
@pytest.mark.usefixtures("unchecked")
def test_statistics_on_demand_are_those_of_the_dense_inputs(family, method) -> None:
    model, batches, statistics = made(family, torch.float64)
    other = copy.deepcopy(model)
    mapping, ranks = LayerByLayer(other, batches), ranks_of(model)
    rows = replace_layers(model, ranks, method, statistics)
    found = replace_layers(other, ranks, method, mapping)
    assert list(dict.fromkeys(mapping.asked)) == list(reversed(ranks))
    for row, late in zip(rows, found, strict=True):
        assert late["measured_error"] == pytest.approx(row["measured_error"], abs=1e-10)
        name = row["layer"]
        assert relative(other.get_submodule(name).dense(), model.get_submodule(name).dense()) <= 1e-9


@pytest.mark.parametrize("method", ["asvd", "whitened"])
@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
@pytest.mark.usefixtures("unchecked")
def test_blocks_on_demand_give_the_same_model_and_one_block_is_held(family, method) -> None:
    model, batches, statistics = made(family, torch.float64)
    other, ranks = copy.deepcopy(model), ranks_of(model)
    mapping = OnDemand(other, batches, ranks)
    assert list(mapping) == list(ranks)
    assert len(mapping) == len(ranks)
    assert "nope" not in mapping
    with pytest.raises(KeyError):
        mapping["nope"]
    rows, found = replace_layers(model, ranks, method, statistics), replace_layers(other, ranks, method, mapping)
    for row, late in zip(rows, found, strict=True):
        assert late["measured_error"] == pytest.approx(row["measured_error"], abs=1e-10)
        assert relative(other.get_submodule(row["layer"]).dense(), model.get_submodule(row["layer"]).dense()) <= 1e-7
    assert set(mapping.in_memory) == set(next(names for names in mapping.blocks.values() if next(iter(ranks)) in names))
    with pytest.raises(ValueError, match="`batches` must allow one pass per block"):
        OnDemand(other, iter(batches))


# --- back to dense layers ---------------------------------------------------------------------------------------------


def layout(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", SMALL)
def test_folding_gives_the_dense_layout_and_the_same_outputs(family, storage) -> None:
    model, batches, statistics = made(family)
    before = layout(model)
    ranks = ranks_of(model, 0.5, storage)
    replace_layers(model, ranks, Configuration("whitened", storage), statistics)
    expected = outputs(model, batches)
    assert layout(model) != before
    assert fold(model) is model
    assert layout(model) == before
    assert relative(outputs(model, batches), expected) <= 1e-5
    assert all(type(model.get_submodule(name)) is nn.Linear for name in ranks)
    for name, rank in ranks.items():
        assert int(torch.linalg.matrix_rank(model.get_submodule(name).weight.double(), rtol=1e-5)) == rank


@pytest.mark.parametrize("storage", STORAGES)
def test_folding_joins_packed_projections_again(storage) -> None:
    model, batches, _ = made("vit")
    before, packed = layout(model), [f"blocks.{i}.attn.qkv" for i in (0, 1)]
    names = split_packed(model, packed)
    statistics = collect_statistics(model, batches)
    ranks = ranks_of(model, 0.5, storage) | {names[4]: 24}  # one part stays dense
    rows = {row["layer"]: row for row in replace_layers(model, ranks, Configuration("whitened", storage), statistics)}
    assert rows[names[4]]["storage"] == "dense"
    expected, stacked = outputs(model, batches), [model.get_submodule(name).weight for name in names[:3]]
    fold(model)
    assert layout(model) == before
    assert torch.allclose(model.get_submodule(packed[0]).weight, torch.cat(stacked), atol=1e-5)
    assert relative(outputs(model, batches), expected) <= 1e-5


def test_folding_keeps_modes_and_frozen_weights_and_dense_models() -> None:
    model, _, statistics = made("bert")
    state, names = hash_model(model), list(find_linears(model, LAYERS))
    assert hash_model(fold(model)) == state
    model.get_submodule(names[0]).requires_grad_(False)
    replace_layers(model, ranks_of(model), "whitened", statistics)
    fold(model)
    assert [p.requires_grad for p in model.get_submodule(names[0]).parameters()] == [False] * 2
    assert [p.requires_grad for p in model.get_submodule(names[1]).parameters()] == [True] * 2
    assert not model.get_submodule(names[0]).training


@pytest.mark.parametrize("storage", STORAGES)
def test_folding_takes_factors_that_are_factored_themselves(storage) -> None:
    model, batches, statistics = made("plain")
    replace_layers(model, {"2": 8}, Configuration("whitened", storage), statistics)
    replace_layers(model, {"2.right": 3}, Configuration("svd", storage), None)
    expected = outputs(model, batches)
    fold(model)
    assert list(model.state_dict()) == list(made("plain")[0].state_dict())
    assert relative(outputs(model, batches), expected) <= 1e-5


# --- what works on a dense model works on a compressed one ------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", SMALL)
def test_state_goes_from_one_model_to_another(family, storage, assign) -> None:
    model, batches = compressed(family, storage)
    other, _ = compressed(family, storage, "svd")
    assert hash_model(other) != hash_model(model)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert hash_model(other) == hash_model(model)
    assert torch.equal(outputs(other, batches), outputs(model, batches))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", SMALL)
def test_bfloat16_models_run_close_to_float32_ones(family, storage) -> None:
    model, batches = compressed(family, storage)
    expected = outputs(model, batches)
    model.to(torch.bfloat16)
    halves = [batch.bfloat16() if isinstance(batch, Tensor) else batch for batch in batches]
    found = outputs(model, halves)
    assert found.dtype == torch.bfloat16
    assert relative(found, expected) <= 0.1
    assert {b.dtype for name, b in model.named_buffers() if name.endswith((".pivots", ".others"))} <= {torch.int64}


def test_bfloat16_models_are_compressed_in_their_dtype() -> None:
    model, _, statistics = made("llama")
    model.to(torch.bfloat16)
    for storage in STORAGES:
        twin = copy.deepcopy(model)
        rows = replace_layers(twin, ranks_of(twin, 0.6, storage), Configuration("whitened", storage), statistics)
        assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
        for row in rows:  # rounding adds to what was given up, in quadrature
            assert row["measured_error"] == pytest.approx(row["predicted_error"], abs=0.01)
            assert row["measured_error"] != row["predicted_error"]


@pytest.mark.parametrize(("family", "storage"), [("bert", "factors"), ("llama", "pivoted")])
@pytest.mark.usefixtures("unchecked")
def test_compiled_models_give_the_same_outputs(family, storage) -> None:
    model, batches = compressed(family, storage)
    expected = outputs(model, batches[:1])
    torch._dynamo.reset()
    graph = torch.compile(model, backend="eager")
    assert torch.allclose(outputs(graph, batches[:1]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.usefixtures("unchecked")
def test_a_factored_layer_compiles_without_a_break(storage) -> None:
    model, batches = compressed("plain", storage)
    torch._dynamo.reset()
    graph = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(outputs(graph, batches), outputs(model, batches), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_gradient_checkpointing_changes_no_gradient(family, storage) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, batches = compressed(family, storage)
        assert isinstance(batches[0], dict)
        model.train()
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.is_gradient_checkpointing
        output = model(**batches[0], **({} if family == "bert" else {"use_cache": False}))
        output.logits.float().logsumexp(-1).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    factors = [name for name in gradients[0] if ".right." in name or ".left." in name]
    assert len(factors) >= 24
    assert any(gradients[0][name].norm() > 0 for name in factors)
    assert all(torch.allclose(g, gradients[1][name], rtol=1e-4, atol=1e-7) for name, g in gradients[0].items())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", SMALL)
def test_a_copy_is_apart(family, storage) -> None:
    model, batches = compressed(family, storage)
    twin = copy.deepcopy(model)
    expected = outputs(model, batches)
    assert torch.equal(outputs(twin, batches), expected)
    assert getattr(twin, RECORD) == getattr(model, RECORD)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(outputs(model, batches), expected)


@pytest.mark.parametrize("factor", ["left", "right", "both"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", ["bert", "llama", "plain"])
def test_adapters_attach_to_factors_and_merge(family, storage, factor) -> None:
    model, batches = compressed(family, storage)
    expected, before = outputs(model, batches), layout(model)
    both = ("left", "right") if factor == "both" else (factor,)
    names = [f"{name}.{side}" for name in ranks_of(made(family)[0]) for side in both]
    torch.manual_seed(0)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=names))
    adapted.eval()
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == len(names)
    assert torch.equal(outputs(adapted, batches), expected)
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    compute_logits(adapted, batches[0]).square().mean().backward()
    optimiser.step()
    trained = outputs(adapted, batches)
    assert not torch.allclose(trained, expected, atol=1e-6)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert layout(merged) == before  # the same ranks, the same number of parameters
    assert relative(outputs(merged, batches), trained) <= 1e-5


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", SMALL)
def test_a_step_of_training_changes_the_factors_and_lowers_the_loss(family, storage) -> None:
    model, batches = compressed(family, storage)
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    objective = lambda: compute_logits(model, batches[0]).square().mean()  # noqa: E731
    start = objective()
    start.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    optimiser.param_groups[0]["lr"] = 1e-3 / norm
    optimiser.step()
    assert objective().item() < start.item()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    names = [n for n in ranks_of(made(family)[0]) if "attn" not in n and "attention" not in n.lower()]
    assert names
    assert {f"{name}.{side}.weight" for name in names for side in ("left", "right")} <= changed
    assert not any(name.endswith(".pivots") for name in changed)


@pytest.mark.parametrize("storage", STORAGES)
def test_generation_gives_the_same_tokens_with_and_without_its_cache(storage) -> None:
    model, batches = compressed("llama", storage)
    assert isinstance(batches[0], dict)
    ids = batches[0]["input_ids"][:2]
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    cached, plain_run = (
        model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=c, **options) for c in (1, 0)
    )
    assert cached.shape == (2, ids.shape[1] + 6)
    assert torch.equal(cached[:, : ids.shape[1]], ids)
    assert torch.equal(cached, plain_run)
    folded = fold(copy.deepcopy(model)).generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(folded, cached)


# --- refusals ---------------------------------------------------------------------------------------------------------


def without(statistics: dict[str, LayerStatistics], layer: str, *parts: str) -> dict[str, LayerStatistics]:
    return statistics | {layer: replace(statistics[layer], **dict.fromkeys(parts))}


BAD: dict[str, tuple[Callable[[nn.Module, dict[str, LayerStatistics]], Any], str]] = {
    "no layer": (lambda m, s: replace_layers(m, {}, "svd"), "`ranks` must name at least one layer"),
    "unknown layer": (lambda m, s: replace_layers(m, {"0": 2, "nope": 2}, "svd"), "`ranks` .*'nope'"),
    "layer that is not linear": (lambda m, s: replace_layers(m, {"1": 2}, "svd"), "`ranks` .*'1'"),
    "pattern": (
        lambda m, s: replace_layers(m, {"[02]": 2}, "svd"),
        r"`ranks` must name nn.Linear layers of the model, not patterns or others, got '\[02\]'",
    ),
    "rank 0": (
        lambda m, s: replace_layers(m, {"0": 2, "4": 0}, "svd"),
        r"`ranks` must be an int in \[1, 16\] for layer '4' .*got 0",
    ),
    "rank below 0": (lambda m, s: replace_layers(m, {"0": -1, "4": 2}, "svd"), r"`ranks` .* layer '0' .*got -1"),
    "rank too large": (lambda m, s: replace_layers(m, {"0": 13, "4": 2}, "svd"), r"\[1, 12\] for layer '0' .*got 13"),
    "unknown method": (lambda m, s: replace_layers(m, {"0": 2}, "svq", s), "`method` must be one of .*got 'svq'"),
    "unknown storage": (
        lambda m, s: replace_layers(m, {"0": 2}, Configuration("svd", "zip"), s),
        "`storage` must be one of .*got 'zip'",
    ),
    "no statistics": (
        lambda m, s: replace_layers(m, {"0": 2}, "whitened"),
        "`statistics` must hold second moments of the inputs, got None: see collect_statistics.*'whitened'",
    ),
    "statistics of fewer layers": (
        lambda m, s: replace_layers(m, {"0": 2, "4": 2}, "whitened", {"4": s["4"]}),
        "`statistics` must hold every layer of `ranks`, got none for layer '0'",
    ),
    "statistics of another model": (
        lambda m, s: replace_layers(m, {"0": 2, "4": 2}, "whitened", s | {"0": s["4"]}),
        r"`statistics` must be of this model: layer '0' has shape \(24, 12\)",
    ),
    "statistics that are not finite": (
        lambda m, s: replace_layers(
            m, {"0": 2, "4": 2}, "whitened", s | {"0": replace(s["0"], gram=s["0"].gram * math.nan)}
        ),
        "`statistics.* must be finite.*'0'",
    ),
    "statistics of no token": (
        lambda m, s: replace_layers(m, {"0": 2, "4": 2}, "whitened", s | {"0": replace(s["0"], tokens=0)}),
        "`statistics` must .* at least one token.*'0'",
    ),
    "no gradients": (
        lambda m, s: replace_layers(m, {"4": 2}, "two_sided", without(s, "4", "gradient_gram", "row_fisher")),
        "`statistics` must .*gradient",
    ),
    "no gradients in the layer that comes last": (
        lambda m, s: replace_layers(m, {"0": 2, "4": 2}, "two_sided", without(s, "0", "gradient_gram", "row_fisher")),
        "`statistics` must .*gradient.*'0'",
    ),
    "no Fisher information in the layer that comes last": (
        lambda m, s: replace_layers(m, {"0": 2, "4": 2}, "fwsvd", without(s, "0", "gradient_gram", "row_fisher")),
        "`statistics` must .*'0'",
    ),
    "magnitudes that are not finite": (
        lambda m, s: replace_layers(
            m, {"0": 2, "4": 2}, "asvd", s | {"0": replace(s["0"], abs_mean=s["0"].mean * math.nan)}
        ),
        "`statistics` must be finite.*'0'",
    ),
    "means that are not finite": (
        lambda m, s: replace_layers(
            m,
            {"0": 2, "4": 2},
            Configuration("svd", centre=True),
            s | {"0": replace(s["0"], mean=s["0"].mean * math.nan)},
        ),
        "`statistics` must be finite.*'0'",
    ),
    "gradients that are not finite": (
        lambda m, s: replace_layers(
            m, {"0": 2, "4": 2}, "two_sided", s | {"0": replace(s["0"], gradient_gram=torch.eye(24) * math.nan)}
        ),
        "`statistics` must be finite.*'0'",
    ),
    "centred without a mean": (
        lambda m, s: replace_layers(m, {"0": 2, "4": 2}, Configuration("svd", centre=True)),
        "`statistics` must be given",
    ),
    "factors of fewer layers": (
        lambda m, s: replace_layers(m, {"0": 2, "4": 2}, "svd", factors=decompose(m, "svd", layers=["4"])),
        "`factors` must .*'0'",
    ),
    "factors of a smaller rank": (
        lambda m, s: replace_layers(
            m,
            {"0": 3, "4": 2},
            "svd",
            factors={n: f.truncate(2) for n, f in decompose(m, "svd", layers=["0", "4"]).items()},
        ),
        "`(factors|ranks)` must .*'0'",
    ),
    "factors of another layer": (
        lambda m, s: replace_layers(
            m, {"0": 3, "4": 2}, "svd", factors=dict.fromkeys(["0", "4"], decompose(m, "svd", layers=["4"])["4"])
        ),
        "`factors` must .*'0'",
    ),
    "decompose without statistics": (
        lambda m, s: decompose(m, "whitened", layers=["0"]),
        "`statistics` must hold .*, got None",
    ),
    "decompose by an unknown method": (lambda m, s: decompose(m, "svq", s, ["0"]), "`method` must be one of"),
    "decompose an unknown layer": (lambda m, s: decompose(m, "svd", None, ["nope"]), "`layers` .*'nope'"),
    "decompose a single string": (
        lambda m, s: decompose(m, "svd", None, "0"),
        "`layers` must be Iterable.* single string '0'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_changes_nothing(case) -> None:
    model, _, statistics = made("plain")
    modules, state = dict(model.named_modules()), hash_model(model)
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call(model, statistics)
    assert hash_model(model) == state
    assert dict(model.named_modules()) == modules
    assert not hasattr(model, RECORD)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(bad) -> None:
    model, _, statistics = made("plain")
    with torch.no_grad():
        model[0].weight[3, 5] = bad
    state = hash_model(model)
    with pytest.raises(ValueError, match="`model` must have finite weights, got NaN or infinity in layer '0'"):
        replace_layers(model, {"0": 2, "4": 2}, "whitened", statistics)
    assert hash_model(model) == state


def test_shared_weights_are_named_with_all_their_names() -> None:
    model, _, _ = made("llama")
    state = hash_model(model)
    with pytest.raises(
        ValueError, match=r"'lm_head': its weight is shared \(model.embed_tokens.weight, lm_head.weight\)"
    ):
        replace_layers(model, {"model.layers.0.mlp.up_proj": 4, "lm_head": 4}, "svd")
    assert hash_model(model) == state


def test_a_layer_under_two_names_is_refused() -> None:
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    with pytest.raises(ValueError, match=r"'0': its weight is shared \(0.weight, 2.weight\)"):
        replace_layers(model, {"0": 2}, "svd")
    assert model[0] is model[2] is layer


def test_each_dense_weight_goes_as_its_factors_come(monkeypatch) -> None:
    """Memory beyond the model stays that of one layer: nothing keeps the layers that were replaced."""
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(4)))
    given = {str(number): statistics_of_rows(torch.randn(40, 12)) for number in range(4)}
    weights = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(weight() is not None for weight in weights))
        return factorize(*arguments, **options)

    monkeypatch.setattr("lowrank.compression.replace.factorize", watched)
    replace_layers(model, dict.fromkeys(given, 3), "whitened", given)
    assert alive == [4, 3, 2, 1]
    assert not any(weight() is not None for weight in weights)
