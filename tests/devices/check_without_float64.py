"""A device without float64, as Apple's are: what is exact is computed on the CPU, and the results go back to the device."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pi3_models
import pytest
import torch
import virtual_accelerator
from families import LAYERS, difference, loss, made, ranks_of
from torch import nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.output_error import output_errors
from lowrank.compression.checkpoint import load_compressed, save_compressed
from lowrank.compression.compress import compress
from lowrank.compression.configuration import Configuration
from lowrank.compression.pruning import prune
from lowrank.compression.replace import fold, replace_layers
from lowrank.factorization.factorize import factorize, weighted_norm
from lowrank.factorization.methods import METHODS
from lowrank.factorization.precision import float64_device
from lowrank.factorization.sides import SIDES
from lowrank.factorization.storages import STORAGES
from lowrank.io.hashing import hash_model
from lowrank.lora.deltas import delta_factors, delta_spectra
from lowrank.nn.targets import find_linears
from lowrank.pi3.adaptive import EntropyScale, image_entropy
from lowrank.selection.scoring import layer_scores
from lowrank.tasks.evaluation import evaluate
from lowrank.training.loop import Hooks, Recipe, fit
from lowrank.training.oialr import OIALR, OIALRConfig
from lowrank.training.prehab import PrehabConfig, prehab
from lowrank.training.refine import model_loss
from lowrank.training.stability import BasisMonitor


@pytest.fixture
def device() -> Iterator[torch.device]:
    found = virtual_accelerator.register()
    with virtual_accelerator.without_double():
        float64_device.cache_clear()
        yield found
    float64_device.cache_clear()


def both(family: str, device: torch.device) -> tuple[nn.Module, nn.Module, list[Any], Any]:
    model, batches, statistics = made(family)
    return model, copy.deepcopy(model).to(device), batches, statistics


def everything_on(model: nn.Module, device: torch.device) -> bool:
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {device}


def test_the_device_has_none(device: torch.device) -> None:
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, device=device, dtype=torch.float64)
    assert float64_device(device) == float64_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("products", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", SIDES)
def test_statistics(device: torch.device, side: str, products: torch.dtype) -> None:
    model, there, batches, _ = both("bert", device)
    exact, found = (
        collect_statistics(each, batches, LAYERS, loss=loss, side=side, products=products) for each in (model, there)
    )
    for name, moments in found.items():
        for field, value in moments.moments().items():
            expected = getattr(exact[name], field)
            assert (value.device.type, value.dtype) == ("cpu", torch.float64)
            if "sketch" not in field:
                torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS)
def test_methods_storages_and_files(device: torch.device, method: str, storage: str, tmp_path: Path) -> None:
    model, there, batches, statistics = both("opt", device)
    configuration = Configuration(method, storage, centre=method in ("whitened", "two_sided"))
    for each in (model, there):
        replace_layers(each, ranks_of(each, storage=storage), configuration, statistics)
    assert everything_on(there, device)
    assert difference(there, model, batches) < 1e-3
    save_compressed(there, tmp_path / "small")
    assert hash_model(load_compressed(tmp_path / "small", device)) == hash_model(there)
    assert everything_on(fold(there), device)
    assert difference(there, model, batches) < 1e-3


@pytest.mark.parametrize("choices", [{}, {"allocation": "depth"}, {"retarget": True, "method": "whitened"}])
def test_compressing(device: torch.device, choices: dict[str, Any]) -> None:
    model, there, batches, _ = both("llama", device)
    for each in (model, there):
        compress(each, batches * 2, 0.6, loss=loss, progress=False, **choices)
    assert everything_on(there, device)
    # ranks that are measured are measured in float32 on the device, in float64 on the CPU, and may differ
    assert difference(there, model, batches) < (0.5 if "allocation" in choices else 1e-2)


def test_one_matrix(device: torch.device) -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    factors = factorize(weight.to(device), 3)
    assert (factors.left.device, factors.left.dtype) == (device, torch.float32)
    assert weighted_norm(weight.to(device)) == pytest.approx(weighted_norm(weight))
    assert factorize(weight.to(device), 3, dtype=torch.float64).left.device.type == "cpu"


def test_training(device: torch.device, trainer: torch.device) -> None:
    model, batches, _ = made("vit")
    labelled = [(batch, torch.arange(len(batch)) % 3) for batch in batches]
    prehab(
        model, collect_statistics(model, batches, LAYERS), labelled, PrehabConfig(steps=2, refresh=2), progress=False
    )
    method, monitor = OIALR(model, OIALRConfig(delay=1, frequency=1, sigma_cutoff=0.5)), BasisMonitor(1, progress=False)
    monitor.step(model)
    hooks = Hooks(after_step=method.step)
    fit(model, lambda done: (labelled * 2)[done:], Recipe(3), model_loss, hooks=hooks, progress=False)
    assert method.ranks
    assert everything_on(method.merge(), trainer)
    assert evaluate(model, labelled, "classification")["loss"] > 0


def test_what_is_measured(device: torch.device) -> None:
    model, there, batches, statistics = both("llama", device)
    expected, found = (layer_scores(each, progress=False).layers for each in (model, there))
    assert [row["raw_metric"] for row in found] == pytest.approx([row["raw_metric"] for row in expected])
    zeros = {name: [torch.zeros_like(layer.weight)] for name, layer in find_linears(model).items()}
    errors = (output_errors(each, batches, zeros) for each in (there, model))
    torch.testing.assert_close(*errors, rtol=1e-4, atol=0)
    tuned, moved = copy.deepcopy(model), copy.deepcopy(model).to(device)
    with torch.no_grad():
        for layer in find_linears(tuned).values():
            layer.weight.mul_(2)
    spectra = delta_spectra(moved, copy.deepcopy(tuned).to(device), progress=False)
    for name, spectrum in delta_spectra(model, tuned, progress=False).items():
        torch.testing.assert_close(spectra[name].sigma, spectrum.sigma)
    assert delta_factors(moved, copy.deepcopy(tuned).to(device), dict.fromkeys(spectra, 1), progress=False)
    prune(there, 0.5, statistics=statistics)
    prune(model, 0.5, statistics=statistics)
    assert difference(there, model, batches) < 1e-4
    images = pi3_models.images(4, 2, 3, 16, 16)
    scale = EntropyScale.fit(image_entropy(images.to(device)).flatten())
    assert scale.find_regimes(image_entropy(images.to(device))).shape == (4, 2)
