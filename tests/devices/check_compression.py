"""Statistics, methods, storages, retargeting, pruning and files on a device: the same as on the CPU."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, difference, loss, made, ranks_of
from torch import nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.hooks import collect_inputs
from lowrank.calibration.on_demand import OnDemand
from lowrank.calibration.output_error import output_errors
from lowrank.calibration.predictive_loss import predictive_loss
from lowrank.calibration.storage import hash_statistics, load_statistics, save_statistics
from lowrank.compression.checkpoint import load_compressed, save_compressed
from lowrank.compression.compress import compress
from lowrank.compression.configuration import Configuration
from lowrank.compression.pruning import prune
from lowrank.compression.replace import decompose, fold, replace_layers
from lowrank.factorization.methods import METHODS
from lowrank.factorization.moments import LayerStatistics
from lowrank.factorization.sides import SIDES
from lowrank.factorization.storages import STORAGES
from lowrank.io.hashing import hash_model
from lowrank.nn.batches import device_of
from lowrank.nn.surgery import split_packed
from lowrank.nn.targets import find_linears

FEW = ["llama", "vit"]  # tokens and images
PLACES = [("device", method, storage) for method in METHODS for storage in STORAGES]  # of statistics
PLACES += [("cpu", "two_sided", storage) for storage in STORAGES]


def on(device: torch.device, family: str) -> tuple[nn.Module, nn.Module, list[Any], dict[str, LayerStatistics]]:
    """A model on the CPU, its copy on a device, batches, and statistics from the CPU."""
    model, batches, statistics = made(family)
    return model, copy.deepcopy(model).to(device), batches, statistics


def test_tensors_of_two_devices_do_not_meet(device: torch.device) -> None:
    there, here = torch.ones(3, 3, device=device), torch.ones(3, 3)
    for meet in (
        lambda: there @ here,
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: here.add_(there),
    ):
        with pytest.raises(RuntimeError, match="device"):
            meet()
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=device, generator=torch.Generator())
    assert (there + torch.tensor(1.0)).device == there[torch.tensor([0, 1])].device == there.device
    there[:2, :2].addcmul_(there[:2, :2], 2 * there[:2, :2])
    assert there.cpu().sum() == 4 * 3 + 5
    assert torch.equal(copy.deepcopy(nn.Parameter(there)).cpu(), there.cpu())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FEW)
def test_statistics(device: torch.device, family: str, side: str) -> None:
    model, there, batches, _ = on(device, family)
    for make_loss in (lambda: loss, predictive_loss, lambda: None):
        exact, found = (
            collect_statistics(each, batches, LAYERS, side=side, loss=make_loss(), products=torch.float64)
            for each in (model, there)
        )
        for name, moments in found.items():
            for field, value in moments.moments().items():
                expected = getattr(exact[name], field)
                assert value.device == device
                if "sketch" not in field:  # its signs depend on the last bit of the data
                    torch.testing.assert_close(
                        value.cpu(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
                    )


@pytest.mark.parametrize(("home", "method", "storage"), PLACES)
def test_methods_and_storages(device: torch.device, home: str, method: str, storage: str) -> None:
    """Wherever the statistics are, layers stay on the device of the model and are those of the CPU."""
    model, there, batches, statistics = on(device, "opt")
    moments = collect_statistics(there, batches, LAYERS, loss=loss, side="smaller") if home == "device" else statistics
    for centre in (False, True):
        one, two = copy.deepcopy(model), copy.deepcopy(there)
        configuration = Configuration(method, storage, centre)
        replace_layers(one, ranks_of(model, storage=storage), configuration, statistics)
        rows = replace_layers(two, ranks_of(model, storage=storage), configuration, moments)
        assert {tensor.device for tensor in two.state_dict().values()} == {device}
        assert rows
        assert difference(two, one, batches) < 1e-3
        assert {p.device for p in fold(two).parameters()} == {device}
    assert {factors.left.device for factors in decompose(there, method, moments, LAYERS).values()} == {device}


@pytest.mark.parametrize("family", FEW)
def test_compressing_in_one_call(device: torch.device, family: str) -> None:
    model, there, batches, _ = on(device, family)
    for compressed in (model, there):
        compress(compressed, batches, 0.6, layers=LAYERS, loss=loss, progress=False)
    assert device_of(there) == device
    assert difference(there, model, batches) < 1e-3


@pytest.mark.parametrize("allocation", ["depth", "measured"])
def test_rules_for_ranks(device: torch.device, allocation: str) -> None:
    _, there, batches, _ = on(device, "llama")
    result = compress(there, batches * 3, 0.6, allocation=allocation, progress=False)
    assert len(result.layers) == len(find_linears(made("llama")[0]))


@pytest.mark.parametrize("family", FEW)
def test_retargeting(device: torch.device, family: str, tmp_path: Path) -> None:
    model, there, batches, _ = on(device, family)
    for compressed in (model, there):
        compress(compressed, batches, 0.6, retarget=True, progress=False, method="whitened")
    assert device_of(there) == device
    assert difference(there, model, batches) < 1e-2


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", ["llama", "plain"])
def test_saving_and_loading(device: torch.device, family: str, storage: str, tmp_path: Path) -> None:
    model, there, batches, statistics = on(device, family)
    plain = {"architecture": made(family)[0]} if family == "plain" else {}
    replace_layers(there, ranks_of(model, storage=storage), Configuration("whitened", storage), statistics)
    save_compressed(there, tmp_path / "small")
    again = load_compressed(tmp_path / "small", **copy.deepcopy(plain))
    assert {tensor.device.type for tensor in again.state_dict().values()} == {"cpu"}
    assert hash_model(again) == hash_model(there)
    back = load_compressed(tmp_path / "small", device, **plain)
    assert {tensor.device for tensor in (*back.parameters(), *back.buffers())} == {device}
    assert hash_model(back) == hash_model(there)
    assert difference(back, there, batches) == 0


def test_statistics_as_a_file(device: torch.device, tmp_path: Path) -> None:
    model, there, batches, _ = on(device, "llama")
    found = collect_statistics(there, batches, LAYERS, loss=loss)
    save_statistics(tmp_path / "moments.safetensors", found, there, "texts")
    read = load_statistics(tmp_path / "moments.safetensors", model, "texts")
    assert {n: hash_statistics(s) for n, s in read.items()} == {n: hash_statistics(s) for n, s in found.items()}
    assert read["model.layers.0.self_attn.q_proj"].gram is read["model.layers.0.self_attn.k_proj"].gram


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_pruning(device: torch.device, method: str) -> None:
    model, there, _, statistics = on(device, "opt")
    for options in (dict(ratios=0.5), dict(ratios=0.3, per="matrix"), dict(pattern=(2, 4))):
        one, two = copy.deepcopy(model), copy.deepcopy(there)
        for pruned in (one, two):
            prune(pruned, method=method, statistics=statistics, **options)
        assert hash_model(one) == hash_model(two)


def test_what_is_measured_of_activations(device: torch.device) -> None:
    model, there, batches, _ = on(device, "llama")
    names = list(find_linears(model, LAYERS))
    rows, theirs = (collect_inputs(each, batches, names, 50) for each in (model, there))
    for name in names:
        torch.testing.assert_close(theirs[name], rows[name])
    zeros = {name: [torch.zeros_like(layer.weight)] for name, layer in find_linears(model, names).items()}
    here = output_errors(model, batches, zeros)
    for replacements in (zeros, {name: [new.to(device) for new in weights] for name, weights in zeros.items()}):
        torch.testing.assert_close(output_errors(there, batches, replacements), here, rtol=1e-4, atol=0)


def test_statistics_on_demand_and_packed_layers(device: torch.device) -> None:
    model, there, batches, _ = on(device, "vit")
    for each in (model, there):
        split_packed(each, [r".*\.qkv"])
        demanded = OnDemand(each, batches, side="smaller", methods=["whitened"])
        replace_layers(each, ranks_of(each), "whitened", demanded)
    assert difference(there, model, batches) < 1e-3
