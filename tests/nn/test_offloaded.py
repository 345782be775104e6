"""Models that accelerate offloads give the statistics of the same model in memory; what needs all weights is refused by name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from families import LAYERS, REPLACED, ZOO, loss, made, of_zoo, outputs
from torch import nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.divergence import mean_divergence
from lowrank.calibration.storage import save_statistics
from lowrank.compression.checkpoint import save_compressed
from lowrank.compression.compress import compress
from lowrank.compression.pruning import prune
from lowrank.compression.replace import fold
from lowrank.io.hashing import check_in_memory, hash_model
from lowrank.io.weights import read_tensors
from lowrank.nn.batches import device_of
from lowrank.nn.offloaded import check_weights, weights_of
from lowrank.nn.surgery import split_packed, unify_linears
from lowrank.nn.targets import find_linears
from lowrank.selection.scoring import layer_scores
from lowrank.training.loop import Recipe, fit
from lowrank.training.oialr import OIALR, OIALRConfig
from lowrank.training.prehab import PrehabConfig, prehab

OFFLOADS: dict[str, Callable[[Any, Path], nn.Module]] = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "cpu, with buffers": lambda model, folder: accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu")),
}


@pytest.mark.parametrize("family", ["plain", pytest.param("llama", marks=pytest.mark.slow), "vit"])
@pytest.mark.parametrize("kind", OFFLOADS)
def test_statistics_are_those_of_the_model_in_memory(kind: str, family: str, tmp_path: Path) -> None:
    model, batches, _ = made(family)
    expected = {
        side: collect_statistics(model, batches, LAYERS, loss=loss, side=side) for side in ("inputs", "smaller")
    }
    before = outputs(model, batches)
    model = OFFLOADS[kind](model, tmp_path)
    layers = find_linears(model, LAYERS)
    assert all(layer.weight.is_meta for layer in layers.values())
    assert device_of(model).type == "cpu"
    for side, wanted in expected.items():
        found = collect_statistics(model, batches, LAYERS, loss=loss, side=side)
        for name, layer in found.items():
            assert layer.moments().keys() == wanted[name].moments().keys()
            for field, value in layer.moments().items():
                torch.testing.assert_close(value, getattr(wanted[name], field), msg=f"{field} of {name}")
    assert all(layer.weight.is_meta for layer in layers.values())  # offloaded again
    assert torch.equal(outputs(model, batches), before)
    assert mean_divergence(model, made(family)[0], batches) == pytest.approx(0.0, abs=1e-9)


def test_the_weights_of_a_layer_are_there_inside_the_block() -> None:
    layer = nn.Linear(3, 5)
    weight = layer.weight.detach().clone()
    net = accelerate.cpu_offload(nn.Sequential(layer, nn.ReLU()), torch.device("cpu"))
    with pytest.raises(KeyError), weights_of(layer):  # also if the block fails
        assert torch.equal(layer.weight, weight)
        raise KeyError
    assert layer.weight.is_meta
    check_weights(net)
    rule = "`model` must have all weights in memory: load 'bias'"
    with pytest.raises(ValueError, match=rule), weights_of(half()):
        pass
    with pytest.raises(ValueError, match=rule):
        check_weights(half())


def half() -> nn.Module:
    """A module with one parameter in memory and one on the meta device."""
    layer = nn.Linear(3, 5)
    layer.bias = nn.Parameter(torch.empty(5, device="meta"))
    return layer


def never_loaded(model: nn.Module, folder: Path) -> nn.Module:
    return model.to("meta")


ALL = OFFLOADS | {"never loaded": never_loaded}
NEEDS_ALL: dict[str, Callable[[nn.Module, list, dict, Path], Any]] = {
    "compress": lambda model, batches, found, folder: compress(model, batches, 0.5, layers=LAYERS, progress=False),
    "compress by svd": lambda model, batches, found, folder: compress(
        model, keep=0.5, layers=LAYERS, method="svd", progress=False
    ),
    "compress, retargeted": lambda model, batches, found, folder: compress(
        model, batches, 0.5, layers=LAYERS, retarget=True, progress=False
    ),
    "hash": lambda model, batches, found, folder: hash_model(model),
    "save": lambda model, batches, found, folder: save_compressed(model, folder / "new"),
    "save statistics": lambda model, batches, found, folder: save_statistics(folder / "new", found, model, "data"),
}


@pytest.mark.parametrize("what", NEEDS_ALL)
@pytest.mark.parametrize("kind", ["disk", "never loaded"])
def test_what_needs_all_weights_is_refused_before_anything_changes(kind: str, what: str, tmp_path: Path) -> None:
    model, batches, found = made("plain")
    model = ALL[kind](model, tmp_path / "offload").train()
    before = dict(model.named_modules())
    with pytest.raises(
        ValueError, match=r"`model` must have all weights in memory: load '0.weight', .* got 'the meta device'"
    ):
        NEEDS_ALL[what](model, batches, found, tmp_path)
    assert dict(model.named_modules()) == before
    assert all(module.training for module in model.modules())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("family", ZOO)
def test_every_family_is_read_as_in_memory_or_refused_by_name(family: str, tmp_path: Path) -> None:
    model, batches = of_zoo(family)
    names = "|".join(map(re.escape, model.state_dict()))
    expected = collect_statistics(model, batches, REPLACED[family], loss=loss)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    # accelerate brings the weights of modules that are called: BEiT's `qkv` is none, so it cannot run
    found = collect_statistics(model, batches, REPLACED[family], loss=loss) if family != "BEiT" else {}
    for name, layer in found.items():
        for field, value in layer.moments().items():
            torch.testing.assert_close(value, getattr(expected[name], field), msg=f"{field} of {name}")
    for refused in (model, of_zoo(family)[0].to("meta")):
        before = dict(refused.named_modules())
        for what in ("compress", "compress by svd", "save"):
            with pytest.raises(ValueError, match=f"`model` must have all weights in memory: load '({names})', "):
                NEEDS_ALL[what](refused, batches, {}, tmp_path)
        assert dict(refused.named_modules()) == before
    assert not list(tmp_path.iterdir())


PARTS: dict[str, Callable[[nn.Module], Any]] = {
    "split": lambda model: split_packed(model, ["0"]),
    "unify": unify_linears,
    "fold": fold,
    "prune": lambda model: prune(model, 0.5, "magnitude", layers=["0"]),
    "train": lambda model: fit(model, lambda done: [torch.ones(2, 12)], Recipe(1), loss, progress=False),
    "OIALR": lambda model: OIALR(model, OIALRConfig(1)).step(torch.optim.SGD(model.parameters())),
    "PREHAB": lambda model: prehab(model, made("plain")[2], made("plain")[1], PrehabConfig(steps=1), progress=False),
    "scores": lambda model: layer_scores(model, layers=["0"], progress=False),
    "tensors": lambda model: read_tensors(model, ["0"]),
}


@pytest.mark.parametrize("what", PARTS)
def test_parts_that_change_or_read_weights_refuse_offloaded_ones(what: str) -> None:
    model = OFFLOADS["cpu"](made("plain")[0], Path())
    before = dict(model.named_modules())
    with pytest.raises(
        ValueError, match="`model` must have all weights in memory: (load '0.weight'|module '0' must not be)"
    ):
        PARTS[what](model)
    assert dict(model.named_modules()) == before


def test_an_architecture_without_weights_can_be_rebuilt() -> None:
    model = nn.Sequential(nn.Linear(4, 6, device="meta"))
    assert split_packed(model, ["0"]) == ["0.q", "0.k", "0.v"]
    assert fold(model)[0].weight.shape == (6, 4)


@pytest.mark.parametrize("wanted", [None, loss])
def test_statistics_of_weights_that_were_never_loaded_are_refused(wanted: Any) -> None:
    model, batches, _ = made("vit")
    with pytest.raises(ValueError, match="`model` must have all weights in memory: load 'cls_token'"):
        collect_statistics(model.to("meta"), batches, LAYERS, loss=wanted)


def test_values_that_are_no_tensors_are_in_memory() -> None:
    check_in_memory({"extra": {"a": 1}, "weight": torch.ones(2)})
    with pytest.raises(ValueError, match="load 'b'"):
        check_in_memory({"a": torch.ones(2), "b": torch.ones(2, device="meta")})
