"""π³ on a device: outputs, evaluation, losses, compression, adaptive ranks and speed as on the CPU."""

import copy
from pathlib import Path

import pi3_models
import pytest
import torch
from safetensors.torch import save_file

from lowrank.calibration.collect import collect_statistics
from lowrank.compression.compress import compress
from lowrank.nn.batches import device_of
from lowrank.pi3.adaptive import AdaptiveRank, EntropyScale, FixedRegimes, image_entropy
from lowrank.pi3.checkpoint import load_pi3
from lowrank.pi3.data import rendered_scenes
from lowrank.pi3.evaluation import PROTOCOLS, evaluate_pi3
from lowrank.pi3.loss import distillation_loss, sampled_loss
from lowrank.pi3.model import Pi3Config
from lowrank.pi3.predictions import predict
from lowrank.pi3.small import scene_batch, scene_loss
from lowrank.pi3.speed import TARGETS, build_forward, compare_speed, published_ranks, random_pi3
from lowrank.training.loop import Recipe, fit

CONFIG = Pi3Config(**pi3_models.TINY)


def test_predictions_and_evaluation(device: torch.device) -> None:
    model = pi3_models.model()
    there, images = copy.deepcopy(model).to(device), pi3_models.images(2, 3, 3, 16, 24)
    expected, found = predict(model, images), predict(there, images)
    assert {value.device.type for value in found.values()} == {"cpu"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    scenes = list(rendered_scenes(0, 2, 3, 16))
    one, two = (evaluate_pi3(each, scenes, PROTOCOLS["scenes"]) for each in (model, there))
    for task, metrics in one.items():
        assert two[task] == pytest.approx(metrics, rel=1e-2, abs=1e-3, nan_ok=True)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_compressing(device: torch.device, storage: str) -> None:
    model = pi3_models.model()
    there, batches = copy.deepcopy(model).to(device), [pi3_models.images(2, 2, 3, 16, 16)]
    for each in (model, there):
        moments = collect_statistics(each, batches, TARGETS["decoder"], loss=sampled_loss(0))
        compress(each, keep=0.6, statistics=moments, layers=TARGETS["decoder"], storage=storage, progress=False)
    assert device_of(there) == device
    expected, found = predict(model, batches[0]), predict(there, batches[0])
    torch.testing.assert_close(found["points"], expected["points"], rtol=0.05, atol=0.05)


def test_adaptive_ranks(device: torch.device) -> None:
    model, images = pi3_models.model(), pi3_models.images(4, 2, 3, 16, 16)
    compress(model, keep=0.9, layers=TARGETS["decoder"], method="svd", storage="factors", progress=False)
    scale = EntropyScale.fit(image_entropy(images).flatten())
    assert EntropyScale.fit(image_entropy(images.to(device)).flatten()) == scale
    expected, found = (
        AdaptiveRank(copy.deepcopy(model).to(place), 0.9, scale)(images.to(place))["points"]
        for place in ("cpu", device)
    )
    assert found.device == device
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
    fixed = FixedRegimes(AdaptiveRank(copy.deepcopy(model).to(device), 0.9, scale), [0, 1, 2, 0])
    assert fixed(images.to(device))["points"].device == device


def test_training(trainer: torch.device) -> None:
    model = pi3_models.model()
    loss = distillation_loss(copy.deepcopy(model).to(trainer))
    with torch.no_grad():
        model.register_token.add_(0.5)
    batches = [pi3_models.images(1, 2, 3, 16, 16)] * 2
    assert len(fit(model, lambda done: batches[done:], Recipe(2, learning_rate=1e-4), loss, progress=False)) == 2
    scenes = [scene_batch(0, 1, 2)]
    assert len(fit(model, lambda done: scenes[done:], Recipe(1, learning_rate=1e-4), scene_loss, progress=False)) == 1
    assert device_of(model) == trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_speed(device: torch.device, precision: str) -> None:
    shape = (1, 2, 3, 16, 16)
    dense, saved = random_pi3(CONFIG, device=device)
    ranks = published_ranks(dense, "all linears", 0.2)
    small, less = random_pi3(CONFIG, ranks, device)
    assert not saved
    assert less
    assert {p.device for p in small.parameters()} == {device}
    build_forward(small, torch.rand(shape).to(device), precision)()
    rows = compare_speed({"dense": dense, "small": small}, shape, precision, repeats=1, warmup=0)
    assert [row["model"] for row in rows] == ["dense", "small"]


def test_loading(device: torch.device, tmp_path: Path) -> None:
    model = pi3_models.model()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    images = pi3_models.images(1, 2, 3, 16, 16)
    loaded = load_pi3(tmp_path / "model.safetensors", CONFIG).to(device)
    torch.testing.assert_close(
        predict(loaded, images)["points"], predict(model, images)["points"], rtol=1e-3, atol=1e-4
    )
