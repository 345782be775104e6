"""Models with quantised weights: saved, loaded, counted and folded; and what refuses them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, compressed, made, outputs, relative
from safetensors.torch import load_file
from torch import nn

from lowrank import (
    compress,
    find_linears,
    fold,
    load_compressed,
    parameter_counts,
    prune,
    refine_factors,
    save_compressed,
)
from lowrank.compression.checkpoint import METADATA, TENSORS
from lowrank.compression.quantize import quantize
from lowrank.io.hashing import hash_model
from lowrank.nn.profiling import weight_bytes
from lowrank.nn.quantized import QuantizedLinear
from lowrank.nn.targets import find_left_out, find_weights
from lowrank.nn.usv import USVLinear

LINEAR = "bert.encoder.layer.0.intermediate.dense"


def load(folder: Path, family: str) -> nn.Module:
    return load_compressed(folder, architecture=FAMILIES[family][0]() if family == "plain" else None)


@pytest.mark.parametrize(
    ("family", "storage", "bits"),
    [
        ("bert", "factors", 8),
        ("bert", "dense", 4),
        ("llama", "pivoted", 4),
        ("gpt2", "dense", 8),
        ("t5", "factors", 8),
        ("plain", "pivoted", 8),
    ],
)
def test_a_quantised_model_comes_back_bit_for_bit(family: str, storage: str, bits: int, tmp_path: Path) -> None:
    model, batches = made(family)[:2] if storage == "dense" else compressed(family, storage)
    before, counts = copy.deepcopy(model), parameter_counts(model, made(family)[0], LAYERS)
    rows = quantize(model, bits, LAYERS)
    assert relative(outputs(model, batches), outputs(before, batches)) < (0.05 if bits == 8 else 1.0)
    assert parameter_counts(model, made(family)[0], LAYERS) == counts
    about = save_compressed(model, tmp_path / "small")
    stored = load_file(tmp_path / "small" / TENSORS)
    assert about["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert weight_bytes(before) - weight_bytes(model) == sum(row["bytes_before"] - row["bytes"] for row in rows) > 0
    assert about["parameters"] == save_compressed(before, tmp_path / "before")["parameters"]
    loaded = load(tmp_path / "small", family)
    assert hash_model(loaded) == hash_model(model)
    assert [str(module) for module in loaded.modules()] == [str(module) for module in model.modules()]
    assert torch.equal(outputs(loaded, batches), outputs(model, batches))
    fold(loaded)
    assert not any(isinstance(module, QuantizedLinear) for module in loaded.modules())
    assert {name: t.shape for name, t in loaded.state_dict().items()} == {
        name: t.shape for name, t in made(family)[0].state_dict().items()
    }
    assert relative(outputs(loaded, batches), outputs(model, batches)) < 1e-4


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_models_in_half_precision_are_quantised(family: str, tmp_path: Path) -> None:
    """T5 asks a weight for its dtype in every pass."""
    model, batches = compressed(family)
    model.to(torch.bfloat16)
    before = outputs(model, batches)
    quantize(model)
    assert relative(outputs(model, batches), before) < 0.1
    assert torch.equal(outputs(model.to(torch.bfloat16), batches), outputs(model, batches))
    save_compressed(model, tmp_path / "small")
    loaded = load_compressed(tmp_path / "small")
    assert torch.equal(outputs(loaded, batches), outputs(model, batches))
    assert {p.dtype for p in fold(loaded).parameters()} == {torch.bfloat16}


def test_bytes_are_counted() -> None:
    model, dense = made("bert")[0], made("bert")[0]
    rows = quantize(model, 8, [LINEAR])
    assert [(row["layer"], row["out"], row["in"], row["bytes"]) for row in rows] == [(LINEAR, 40, 24, 40 * 24 + 40 * 4)]
    counts = parameter_counts(model, dense, LAYERS, with_bytes=True)
    assert counts["keep_model"] == counts["keep_targeted"] == 1
    assert (
        counts["model_bytes"] == weight_bytes(model) == weight_bytes(dense) - rows[0]["bytes_before"] + rows[0]["bytes"]
    )
    assert counts["keep_bytes"] == weight_bytes(model) / weight_bytes(dense)
    weight = dense.get_submodule(LINEAR).weight.detach()
    error = (model.get_submodule(LINEAR).weight - weight).norm() / weight.norm()
    assert rows[0]["error"] == pytest.approx(float(error), rel=1e-5)


def test_a_factored_layer_stands_for_its_factors() -> None:
    model, _ = compressed("bert", "pivoted")
    rows = quantize(model, 8, [LINEAR])
    assert [row["layer"] for row in rows] == [f"{LINEAR}.right", f"{LINEAR}.left"]
    assert [row["layer"] for row in quantize(model, 4, [rf"{LINEAR}\.left|.*\.1\.output\.dense"], group=4)] == [
        "bert.encoder.layer.1.output.dense.right",
        "bert.encoder.layer.1.output.dense.left",
    ]  # what is quantised stays as it is


def nan(model: nn.Module) -> None:
    model.get_submodule(LINEAR).weight.data[0, 0] = torch.inf


def hook(model: nn.Module) -> None:
    model.get_submodule(LINEAR).register_forward_hook(lambda *_: None)


def tie(model: nn.Module) -> None:
    model.get_submodule(LINEAR).weight = model.get_submodule("bert.encoder.layer.1.intermediate.dense").weight


def usv(model: nn.Module) -> None:
    setattr(model.get_submodule("bert.encoder.layer.0.intermediate"), "dense", USVLinear(24, 40, 24))  # noqa: B010


def nest(model: nn.Module) -> None:
    compress(model, keep="any", method="svd", layers=[LINEAR], progress=False)


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        (nan, {}, rf"`model` must have finite weights \(layer '{LINEAR}'\), got 'NaN or infinity'"),
        (hook, {}, rf"`model` must have no forward hooks on layer '{LINEAR}'"),
        (tie, {}, rf"`layers` must leave out '{LINEAR}', whose weight is shared"),
        (usv, {"layers": [LINEAR]}, rf"`layers` must match linear or factored layers .*'{LINEAR}', 'a USVLinear'"),
        (nest, {}, rf"`layers` must be cut to their size before they are quantised.*'{LINEAR}'"),
        (None, {"layers": ["bert.embeddings"]}, "`layers` must match linear .*'bert.embeddings', 'a BertEmbeddings'"),
        (None, {"layers": ["nowhere"]}, "`layers` must match linear or factored layers of the model, got 'nowhere'"),
        (None, {"layers": "classifier"}, "`layers` must be"),
        (None, {"bits": 3}, r"`bits` must be one of \[4, 8\], got 3"),
        (None, {"group": 0}, "`group` must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_name(change, options: dict[str, Any], text: str) -> None:
    model = made("bert")[0]
    if change is not None:
        change(model)
    before = hash_model(model)
    with pytest.raises(ValueError, match=text):
        quantize(model, **options)
    assert hash_model(model) == before
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_a_layer_that_is_the_model_and_a_layer_that_is_read_are_refused() -> None:
    with pytest.raises(ValueError, match="`model` must hold the layers, got one that is a Linear itself"):
        quantize(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"nn\.MultiheadAttention reads its weight itself"):
        quantize(nn.Sequential(nn.MultiheadAttention(4, 2)), layers=["0.out_proj"])


def test_what_reads_weights_refuses_quantised_ones_or_works() -> None:
    model, batches = compressed("bert")
    dense, mixed = made("bert")[0], made("bert")[0]
    quantize(model)
    quantize(dense)
    quantize(mixed, 8, [LINEAR])
    for refuse in (
        lambda: compress(dense, keep=0.5, method="svd", progress=False),
        lambda: compress(mixed, keep=0.5, method="svd", layers=[LINEAR], progress=False),
        lambda: compress(mixed, ranks={LINEAR: 3}, method="svd", progress=False),
        lambda: prune(dense, 0.5, method="magnitude"),
        lambda: quantize(dense),
    ):
        with pytest.raises(ValueError, match=r"\.dense.*quantised|\.query.*quantised"):
            refuse()
    with pytest.raises(ValueError, match="`model` must have factors in floating point: train first, then quantise"):
        refine_factors(model, batches, progress=False)
    assert "quantised" in find_left_out(mixed)[LINEAR]
    assert LINEAR not in find_linears(mixed)
    assert torch.equal(find_weights(mixed)[LINEAR] + 0, mixed.get_submodule(LINEAR).dequantize())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bits": 4}, "has shape"),
        ({"group": 5}, "has shape"),
        ({"bits": 3}, "bits"),
        ({"group": None}, "have the key 'group'"),
        ({"out": 10**9}, "has shape"),
    ],
)
def test_a_folder_with_other_sizes_is_refused(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    model = made("bert")[0]
    quantize(model, 8, [LINEAR])
    save_compressed(model, tmp_path / "small")
    record = json.loads((tmp_path / "small" / METADATA).read_text(encoding="utf8"))
    assert record["layers"][LINEAR] == {"kind": "quantized", "bits": 8, "group": 24, "in": 24, "out": 40, "bias": True}
    record["layers"][LINEAR].update(change)
    (tmp_path / "small" / METADATA).write_text(json.dumps(record), encoding="utf8")
    with pytest.raises(ValueError, match=text):
        load_compressed(tmp_path / "small")
