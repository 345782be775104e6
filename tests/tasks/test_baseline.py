"""Baselines: shipped ones are loaded as they were written or refused, all others are trained; trained anew, both come back."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_in_two
from torch import nn

from lowrank.io.hashing import hash_files, hash_model
from lowrank.tasks.baseline import baseline_key, distance, load_baseline, train_baseline
from lowrank.tasks.pretrain import main
from lowrank.tasks.pretraining import DenseModel
from lowrank.tasks.registry import load_task
from lowrank.tasks.shipped import BLOCK, find_shipped, list_shipped, round_weights, write_shipped
from lowrank.tasks.task import Task
from lowrank.training.loop import Recipe

OPTIONS = {"width": 16, "depth": 1}
RECIPE = Recipe(BLOCK + 5, batch_size=8, seed=3)
MODELS = {"tiny": DenseModel("digits", RECIPE, OPTIONS)}
REMEDY = "restore both files of 'tiny', or train it anew with python -m lowrank.tasks.pretrain tiny --ship"


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("digits", **OPTIONS)


@pytest.fixture
def shelf(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of shipped models, in a temporary place, with none; `tiny` is the one model in the list."""
    monkeypatch.setattr("lowrank.tasks.shipped.PRETRAINED", tmp_path / "pretrained")
    monkeypatch.setattr("lowrank.tasks.pretraining.MODELS", MODELS)
    return tmp_path / "pretrained"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and a folder of shipped models, after the command has made its one model."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_CACHE", str(folder / "cache"))
        patch.setattr("lowrank.tasks.shipped.PRETRAINED", folder / "pretrained")
        patch.setattr("lowrank.tasks.pretraining.MODELS", MODELS)
        assert main(["--ship"]) == 0
    return folder


@pytest.fixture
def shipped(shelf: Path, cache: Path, made: Path) -> Path:
    """The same with the model, which the cache has too."""
    shutil.copytree(made / "pretrained", shelf)
    shutil.copytree(made / "cache", cache)
    return shelf


def forbid(*_: object, **__: object) -> None:
    raise AssertionError("trained")


def test_a_shipped_model_is_loaded_in_its_own_precision(task, shipped, monkeypatch) -> None:
    trained = train_baseline(task, RECIPE)
    monkeypatch.setattr("lowrank.tasks.baseline.train_baseline", forbid)
    baseline = load_baseline(task, RECIPE)
    assert baseline.origin == "shipped"
    assert baseline.shipped is None
    assert not baseline.model.training
    expected = copy.deepcopy(trained.model)
    round_weights(expected)
    assert hash_model(baseline.model) == hash_model(expected) != hash_model(trained.model)
    assert {p.dtype for p in baseline.model.parameters()} == {torch.float32}
    assert 0 < distance(baseline.model, trained.model) < 1e-3


def test_what_is_written_says_how_the_model_was_made(task, shipped) -> None:
    assert sorted(path.name for path in shipped.iterdir()) == ["tiny.json", "tiny.safetensors"]
    about = json.loads((shipped / "tiny.json").read_text(encoding="utf8"))
    assert {name: about[name] for name in ("task", "recipe")} == baseline_key(task, RECIPE)
    trained, baseline = train_baseline(task, RECIPE), load_baseline(task, RECIPE)
    assert about["validation"] == pytest.approx(task.evaluate(baseline.model))
    assert "accuracy" in about["validation"]
    assert about["environment"] == trained.environment == baseline.environment
    assert {"git_commit", "versions", "cpu"} <= trained.environment.keys()
    assert about["wall_s"] == trained.seconds == baseline.seconds
    losses = [row["loss"] for row in trained.history]
    assert [row["step"] for row in baseline.history] == [BLOCK - 1, BLOCK + 4]
    expected = [sum(losses[:BLOCK]) / BLOCK, sum(losses[BLOCK:]) / 5]
    assert [row["loss"] for row in baseline.history] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("place", [0, 100, 0.5, -1])
@pytest.mark.parametrize("retrain", [False, True])
def test_a_flipped_byte_of_the_weights_is_named(task, shipped, place, retrain, monkeypatch) -> None:
    content = bytearray((shipped / "tiny.safetensors").read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    (shipped / "tiny.safetensors").write_bytes(content)
    monkeypatch.setattr("lowrank.tasks.baseline.train", forbid)
    with pytest.raises(ValueError, match=rf"tiny.safetensors` must have the hash that tiny.json says \({REMEDY}\)"):
        load_baseline(task, RECIPE, retrain=retrain)


def rename_key(about: dict) -> dict:
    return about | {"key": about["key"][::-1]}


def change_recipe(about: dict) -> dict:
    return about | {"recipe": about["recipe"] | {"seed": 4}}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: json.dumps(rename_key(json.loads(text))),
        lambda text: json.dumps(change_recipe(json.loads(text))),
        lambda text: text.replace('"wall_s"', '"wall"'),
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
    ],
)
def test_a_changed_description_is_named(task, shipped, damage: Callable[[str], str]) -> None:
    path = shipped / "tiny.json"
    path.write_text(damage(path.read_text(encoding="utf8")), encoding="utf8")
    with pytest.raises(ValueError, match=rf"tiny.json` must have the key, .* that tiny.json says \({REMEDY}\)"):
        load_baseline(task, RECIPE)


def test_weights_that_are_missing_are_named_and_the_remedy_helps(task, shipped) -> None:
    before = hash_files([shipped / "tiny.safetensors"])
    (shipped / "tiny.safetensors").unlink()
    with pytest.raises(ValueError, match=r"tiny.safetensors` must have the hash .* got None"):
        load_baseline(task, RECIPE)
    assert main(["tiny", "--ship"]) == 0
    assert load_baseline(task, RECIPE).origin == "shipped"
    assert hash_files([shipped / "tiny.safetensors"]) == before


def test_another_task_or_recipe_is_trained(task, shipped) -> None:
    for other, recipe in (
        (task, replace(RECIPE, seed=4)),
        (load_task("digits", **OPTIONS | {"dropout": 0.2}), RECIPE),
    ):
        assert find_shipped(baseline_key(other, recipe)) is None
        baseline = load_baseline(other, recipe)
        assert (baseline.origin, baseline.shipped) == ("trained", None)
        assert len(baseline.history) == RECIPE.steps
    assert load_baseline(task, replace(RECIPE, workers=1)).origin == "shipped"  # which does not change results


def test_nothing_need_be_shipped(task, shelf) -> None:
    assert list_shipped() == []
    assert load_baseline(task, RECIPE).origin == load_baseline(task, RECIPE, retrain=True).origin == "trained"
    assert load_baseline(task, replace(RECIPE, steps=0)).origin == "as it comes"


def test_a_model_that_is_trained_anew_comes_with_the_shipped_one(task, shipped) -> None:
    other = train_baseline(task, replace(RECIPE, learning_rate=1e-2)).model
    metadata = json.loads((shipped / "tiny.json").read_text(encoding="utf8"))
    round_weights(other)
    write_shipped("tiny", other, {name: value for name, value in metadata.items() if name not in ("key", "weights")})
    baseline = load_baseline(task, RECIPE, retrain=True)
    assert baseline.origin == "trained"
    assert baseline.shipped is not None
    assert not baseline.shipped.training
    assert hash_model(baseline.model) == hash_model(train_baseline(task, RECIPE).model)
    assert hash_model(baseline.shipped) == hash_model(other)
    assert distance(baseline.model, baseline.shipped) > 0.01


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.tensor([2**20 + 1]))
        self.register_buffer("scale", torch.tensor([1 / 3]))
        self.register_buffer("angles", torch.tensor([1 / 3]), persistent=False)


def test_tied_weights_stay_tied_and_only_floats_are_rounded(shelf: Path) -> None:
    torch.manual_seed(0)
    model, made_from = Tied(), {"task": {"task": "tied"}, "recipe": {"steps": 1}}
    exact = copy.deepcopy(model)
    round_weights(model)
    about = made_from | {"loss": [1.0], "validation": {}, "wall_s": 0.1, "environment": {}}
    written = write_shipped("tied", model, about)
    assert hash_model(model) != hash_model(exact)  # rounded by us, and left in float32 by the writer
    found = find_shipped(made_from)
    assert found is not None
    assert (found.weights, found.metadata) == (written.weights, written.metadata)
    loaded = found.load(Tied())
    assert isinstance(loaded, Tied)
    assert loaded.head.weight is loaded.embedding.weight
    assert hash_model(loaded) == hash_model(model)
    assert torch.equal(loaded.embedding.weight, exact.embedding.weight.half().float())
    assert (loaded.count.item(), loaded.angles.item()) == (2**20 + 1, exact.angles.item())  # pyright: ignore
    assert found.weights.stat().st_size < 1000  # the tied matrix once, in two bytes each


def test_the_distance_is_relative_and_counts_tied_weights_once() -> None:
    torch.manual_seed(0)
    model = Tied()
    other, larger = copy.deepcopy(model), copy.deepcopy(model).double()
    assert distance(model, other) == 0
    with torch.no_grad():
        for parameter in larger.parameters():
            parameter.mul_(1.25)
        other.embedding.weight[0, 0] += 3
    assert distance(larger, model) == pytest.approx(0.25)
    norm = torch.cat([p.flatten() for p in other.parameters()]).norm().item()
    assert distance(model, other) == pytest.approx(3 / norm, rel=1e-6)
    with pytest.raises(
        ValueError, match=r"`other` must have the parameters of `model`, .* got \['embedding.weight', 'inn"
    ):
        distance(Tied(), nn.Embedding(7, 4))


WORKER = """
from pathlib import Path
from accelerate import PartialState
from lowrank.io.hashing import hash_model
from lowrank.tasks import shipped
from lowrank.tasks.baseline import load_baseline
from lowrank.tasks.registry import load_task
from lowrank.training.loop import Recipe
shipped.PRETRAINED = Path({shelf!r})
assert PartialState(cpu=True).num_processes == 2
task, recipe = load_task("digits", width=16, depth=1), Recipe({steps}, batch_size=8, seed=3)
both = load_baseline(task, recipe, retrain=True)
assert both.origin == "trained"
for baseline in (load_baseline(task, recipe).model, both.shipped):
    assert hash_model(baseline) == {wanted!r}
"""


@pytest.mark.slow
def test_every_process_loads_the_shipped_model(task, shipped: Path, tmp_path: Path) -> None:
    wanted = hash_model(load_baseline(task, RECIPE).model)
    (tmp_path / "worker.py").write_text(WORKER.format(shelf=str(shipped), steps=RECIPE.steps, wanted=wanted))
    run_in_two(tmp_path / "worker.py")
