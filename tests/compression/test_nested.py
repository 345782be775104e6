"""Any size after: factors at full rank, cut later, are the model that `compress` gives for that size."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, made, outputs, relative
from torch import nn

from lowrank import METHODS, collect_statistics, compress, fold, load_compressed, save_compressed
from lowrank.compression.checkpoint import METADATA
from lowrank.compression.nested import cut_layers
from lowrank.compression.stored_state import RECORD
from lowrank.factorization.storages import STORAGES
from lowrank.io.hashing import hash_model
from lowrank.nn.nested import NestedLinear

ALL = (r"\d\.0",)


def stack() -> nn.Module:
    """Blocks of a tall, a square and a wide layer, in float64; the square one has no bias."""
    torch.manual_seed(0)
    layers = nn.Linear(9, 20), nn.Linear(20, 20, bias=False), nn.Linear(20, 7)
    return nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers)).double().eval()


@pytest.fixture(scope="module")
def statistics() -> Any:
    batches = [1 + torch.randn(64, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]
    return collect_statistics(stack(), batches, ALL, loss=lambda model, batch: model(batch).square().sum())


def both(statistics: Any, keep: float, **choices: Any) -> tuple[nn.Module, nn.Module, Any]:
    """The model that is cut to a size, the model that is compressed to it, and the result of that."""
    cut, wanted = stack(), stack()
    options = dict(statistics=statistics, layers=ALL, progress=False, **choices)
    compress(cut, None, "any", **options)
    cut_layers(cut, keep)
    return cut, wanted, compress(wanted, None, keep, **options)


@pytest.mark.parametrize("keep", [0.35, 0.7, 1.0])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_cut_model_is_the_model_of_that_size(method: str, storage: str, keep: float, statistics) -> None:
    cut, wanted, result = both(statistics, keep, method=method, storage=storage)
    assert [type(module) for module in cut.modules()] == [type(module) for module in wanted.modules()]
    assert getattr(cut, RECORD)["model"] == getattr(wanted, RECORD)["model"]
    rows = getattr(cut, RECORD)["layers"]
    assert rows.keys() == result.ranks.keys()
    for row, own in ((row, rows[row["layer"]]) for row in result.layers):
        exact = ("layer", "rank", "storage", "method", "centre", "parameters", "indices", "dense_parameters", "keep")
        assert {key: own[key] for key in exact} == {key: row[key] for key in exact}
        assert own["predicted_error"] == pytest.approx(row["predicted_error"], rel=1e-9)
        assert own["measured_error"] == (0.0 if row["storage"] == "dense" else None)
        assert "cut" not in own
    for one, two in zip(fold(cut).parameters(), fold(wanted).parameters(), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "choices",
    [
        {"allocation": "uniform"},
        {"allocation": "first_dense"},
        {"multiple": 4},
        {"centre": False},
        {"method": "whitened", "centre": True, "multiple": 2},
        {"method": "asvd", "centre": True},
    ],
)
def test_every_choice_is_that_of_the_first_call(choices: dict[str, Any], statistics) -> None:
    cut, wanted, result = both(statistics, 0.6, **choices)
    assert {name: row["rank"] for name, row in getattr(cut, RECORD)["layers"].items()} == result.ranks
    x = torch.randn(30, 9, dtype=torch.float64)
    assert torch.allclose(cut(x), wanted(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_folder_is_cut_when_it_is_loaded(family: str, tmp_path: Path) -> None:
    nested, batches, _ = made(family)
    dense = copy.deepcopy(nested)
    result = compress(nested, batches, "any", layers=LAYERS, progress=False)
    assert all(row["storage"] == "nested" and row["measured_error"] < 1e-6 for row in result.layers)
    assert result.keep_targeted > 1
    assert "nested" in str(result)
    assert relative(outputs(nested, batches), outputs(dense, batches)) < 1e-5
    save_compressed(nested, tmp_path / "any")
    assert hash_model(load_compressed(tmp_path / "any")) == hash_model(nested)
    for keep in (0.7, 0.4):
        wanted = copy.deepcopy(dense)
        ranks = compress(wanted, batches, keep, layers=LAYERS, progress=False).ranks
        cut = load_compressed(tmp_path / "any", keep=keep)
        assert {name: row["rank"] for name, row in getattr(cut, RECORD)["layers"].items()} == ranks
        assert relative(outputs(cut, batches), outputs(wanted, batches)) < 1e-4
        assert all(parameter.requires_grad for parameter in cut.parameters())
        assert not any(module.training for module in cut.modules())
        save_compressed(cut, tmp_path / str(keep))
        assert hash_model(load_compressed(tmp_path / str(keep))) == hash_model(cut)
    fold(nested)
    assert relative(outputs(nested, batches), outputs(dense, batches)) < 1e-5


def test_a_cast_leaves_spectra_and_means_alone() -> None:
    model, batches, statistics = made("bert")
    compress(model, None, "any", statistics=statistics, layers=LAYERS, progress=False)
    layers = [module for module in model.modules() if isinstance(module, NestedLinear)]
    before = [(layer.spectrum, layer.mean_bits.clone()) for layer in layers]
    model.to(torch.bfloat16)
    assert all(
        torch.equal(layer.spectrum, spectrum) and torch.equal(layer.mean_bits, mean)
        for layer, (spectrum, mean) in zip(layers, before, strict=True)
    )
    assert all(bool(mean.any()) for _, mean in before)
    cut_layers(model, 0.5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert outputs(model, batches).isfinite().all()


def test_frozen_parameters_stay_frozen(statistics) -> None:
    model = stack()
    model[0][0].weight.requires_grad_(False)
    compress(model, None, "any", statistics=statistics, layers=ALL, progress=False)
    cut_layers(model, 0.6)
    assert {name: p.requires_grad for name, p in model[0][0].named_parameters()} == {
        name: name.endswith("bias") for name, _ in model[0][0].named_parameters()
    }
    assert all(p.requires_grad for p in model[2].parameters())


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ({"allocation": "measured"}, r"`allocation` must be one of \['uniform', 'first_dense', 'spectrum'\]"),
        ({"allocation": "relative"}, r"`allocation` must be one of .*, got 'relative'"),
        ({"method": "whitened", "allocation": "spectrum"}, r"one of \['uniform', 'first_dense'\] for keep='any'"),
        ({"retarget": True}, "`retarget` must be None for keep='any'"),
        ({"ranks": {"0.0": 2}}, "`keep` must be given, or `ranks`, and not both"),
    ],
)
def test_what_cannot_wait_is_refused(choices: dict[str, Any], text: str, statistics) -> None:
    model = stack()
    before = hash_model(model)
    with pytest.raises(ValueError, match=text):
        compress(model, None, "any", statistics=statistics, layers=ALL, progress=False, **choices)
    assert hash_model(model) == before


def test_only_factors_at_full_rank_are_cut(tmp_path: Path) -> None:
    model, _, statistics = made("bert")
    nested = copy.deepcopy(model)
    compress(model, None, 0.5, statistics=statistics, layers=LAYERS, progress=False)
    save_compressed(model, tmp_path / "half")
    with pytest.raises(ValueError, match=r"`keep` must be None for '.*half', which does not hold factors at full rank"):
        load_compressed(tmp_path / "half", keep=0.4)
    with pytest.raises(ValueError, match="`model` must hold factors at full rank"):
        cut_layers(model, 0.4)
    compress(nested, None, "any", statistics=statistics, layers=LAYERS, progress=False)
    save_compressed(nested, tmp_path / "any")
    for keep, text in ((0, r"`keep` must be in \(0, 1\]"), (1.5, r"`keep` must be in"), (1e-6, "must allow the least")):
        with pytest.raises(ValueError, match=text):
            load_compressed(tmp_path / "any", keep=keep)


def test_layers_of_two_calls_share_no_budget(statistics) -> None:
    model = stack()
    for layers, method in (["0.0"], "svd"), (["1.0"], "whitened"):
        compress(model, None, "any", statistics=statistics, layers=layers, method=method, progress=False)
    with pytest.raises(ValueError, match="`model` must have nested layers of one call of `compress`"):
        cut_layers(model, 0.5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cut": {}}, "`model` must have rows with `method` and `cut`"),
        ({"cut": {"storage": "x", "allocation": "uniform", "multiple": 1}}, "`storage` must be one of"),
        ({"cut": {"storage": "factors", "allocation": "depth", "multiple": 1}}, "`allocation` must be one of"),
    ],
)
def test_a_damaged_record_is_named(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    model, _, statistics = made("bert")
    compress(model, None, "any", statistics=statistics, layers=LAYERS, progress=False)
    save_compressed(model, tmp_path / "any")
    record = json.loads((tmp_path / "any" / METADATA).read_text(encoding="utf8"))
    for row in record["layers"].values():
        row.update(change)
    (tmp_path / "any" / METADATA).write_text(json.dumps(record), encoding="utf8")
    with pytest.raises(ValueError, match=text):
        load_compressed(tmp_path / "any", keep=0.5)
