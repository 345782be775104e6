"""The dense models of the embedded sets: their list is what the notebooks ask for, and all that may be shipped come along."""

import re
from pathlib import Path

import pytest

from lowrank.report.parameters import jobs, notebook_path, read_parameters
from lowrank.tasks.baseline import baseline_key, load_baseline
from lowrank.tasks.pretrain import main
from lowrank.tasks.pretraining import MODELS, DenseModel
from lowrank.tasks.registry import load_task
from lowrank.tasks.shipped import PRETRAINED, find_shipped, list_shipped
from lowrank.training.loop import Recipe, recipe_options

SETS = ["digits-vit", "docs-bert", "docs-llama", "sst2-minilm"]
SHIPPED = {name: model for name, model in MODELS.items() if model.shipped}
PAIRS = [pair for pair in jobs(SETS) if "load_baseline(" in notebook_path(pair[1]).read_text(encoding="utf8")]
MISSING = "run python -m lowrank.tasks.pretrain --ship"
LARGEST_IN_ALL = 10_000_000  # bytes


def dense_models(set_name: str, notebook: str) -> list[DenseModel]:
    """What a notebook of a set passes to `load_task` and `load_baseline`."""
    values = read_parameters(set_name, notebook)
    names = ("steps", "batch_size", "learning_rate", "weight_decay", "precision")
    options = values["task_options"] | values.get("base_options", {})
    recipe = {name: values[name] for name in names}
    seeds = [values["seed"], *values.get("more_seeds", [])]
    models = [DenseModel(values["task"], Recipe(**recipe, seed=seed), options) for seed in seeds]
    return [model for model in models if model.recipe.steps > 0]


def same(one: DenseModel, other: DenseModel) -> bool:
    return (one.task, one.options, recipe_options(one.recipe)) == (
        other.task,
        other.options,
        recipe_options(other.recipe),
    )


def name_of(model: DenseModel) -> str | None:
    return next((name for name, listed in MODELS.items() if same(model, listed)), None)


@pytest.mark.parametrize(("set_name", "notebook"), PAIRS, ids=map("-".join, PAIRS))
def test_what_a_notebook_asks_for_is_in_the_list(set_name: str, notebook: str) -> None:
    for model in dense_models(set_name, notebook):
        name = name_of(model)
        assert name is not None, f"MODELS must have {model}"
        assert name.startswith(set_name)


def test_a_notebook_asks_for_every_model_of_the_list() -> None:
    assert len(PAIRS) >= 15, PAIRS
    assert {name_of(model) for pair in PAIRS for model in dense_models(*pair)} == set(MODELS)
    kept = {name for name, model in MODELS.items() if not model.shipped}
    assert kept == {"docs-bert-0", "sst2-minilm"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_model_of_the_list_comes_along_and_is_as_good_as_it_says(name: str) -> None:
    model = MODELS[name]
    task = load_task(model.task, **model.options)
    found = find_shipped(baseline_key(task, model.recipe))
    assert found is not None, MISSING
    assert found.name == name
    baseline = load_baseline(task, model.recipe)
    assert baseline.origin == "shipped"
    assert task.evaluate(baseline.model) == pytest.approx(found.metadata["validation"], rel=1e-3)


def test_nothing_else_comes_along_and_all_of_it_is_small() -> None:
    assert [shipped.name for shipped in list_shipped()] == sorted(SHIPPED), MISSING
    names = {f"{name}{suffix}" for name in SHIPPED for suffix in (".json", ".safetensors")}
    assert {path.name for path in PRETRAINED.iterdir()} == names
    assert sum(path.stat().st_size for path in PRETRAINED.iterdir()) <= LARGEST_IN_ALL


@pytest.fixture
def tiny(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command with two models in its list, and with a temporary folder of those that are shipped."""
    models = {
        "tiny": DenseModel("digits", Recipe(3, seed=1), {"width": 16, "depth": 1}),
        "kept": DenseModel("digits", Recipe(2), {"width": 16, "depth": 1}, shipped=False),
    }
    monkeypatch.setattr("lowrank.tasks.shipped.PRETRAINED", tmp_path / "pretrained")
    monkeypatch.setattr("lowrank.tasks.pretraining.MODELS", models)
    return tmp_path / "pretrained"


def test_the_command_trains_into_the_cache_and_ships_only_when_told(tiny: Path, cache: Path, capsys) -> None:
    assert main(["kept"]) == 0
    assert not tiny.exists()
    assert len(list(cache.glob("baselines/*/model.safetensors"))) == 1
    assert main(["--ship"]) == 0
    assert sorted(path.name for path in tiny.iterdir()) == ["tiny.json", "tiny.safetensors"]
    assert main([]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("kept: trained in ")
    assert ", validation loss " in second
    assert "shipped" not in second
    assert third.startswith(second)
    assert third.endswith("from the shipped one")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kept", "--ship"], r"`NAME` must be among \['tiny'\] with --ship, got \['kept'\]"),
        (["none", "tiny"], r"`NAME` must be among \['tiny', 'kept'\], got \['none'\]"),
    ],
)
def test_names_that_the_command_cannot_take_are_named(tiny, words, message, capsys) -> None:
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)
