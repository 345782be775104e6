"""Resources: every committed set asks for what its committed runs took, and what does not fit is named."""

import json
from pathlib import Path

import pytest
import yaml

from lowrank.io.dependencies import ROOT
from lowrank.report import parameters as module
from lowrank.report.errors import ParameterError
from lowrank.report.parameters import jobs, set_names
from lowrank.report.resources import DEFAULTS, read_resources

RUNS = sorted((ROOT / "outputs").glob("[a-z]*/[0-9]*/run.json"))


@pytest.mark.parametrize("name", set_names())
def test_every_set_asks_for_something_that_exists(name: str) -> None:
    for job in jobs([name]):
        assert read_resources(*job).keys() == DEFAULTS.keys()
    first_lines = (ROOT / "params" / f"{name}.yaml").read_text(encoding="utf8").split("common:")[0]
    assert (read_resources(*jobs([name])[0])["gpus"] > 0) == ("GPU" in first_lines and "CPU" not in first_lines)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.parent.name}-{path.parent.name}")
def test_it_is_as_much_as_the_committed_run_took(path: Path) -> None:
    about = json.loads(path.read_text(encoding="utf8"))
    asked = read_resources(about["set"], about["notebook"])
    assert about["peak_memory_mb"]["host"] < asked["memory_mb"]
    assert about["wall_s"] < 60 * asked["minutes"]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with two small notebooks."""
    monkeypatch.setattr(module, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(module, "SETS", tmp_path)
    for name in ("01_small", "02_large"):
        (tmp_path / f"{name}.py").write_text('# %% tags=["parameters"]\nset_name = "a"\nseed = 0\n')
    return tmp_path


def write(house: Path, asked: object) -> None:
    (house / "a.yaml").write_text(yaml.safe_dump({"small": {}, "large": {}, "resources": asked}))


def test_defaults_then_those_of_the_set_then_own(house: Path) -> None:
    write(house, {"gpus": 1, "minutes": 5, "large": {"minutes": 600}})
    assert read_resources("a", "01_small") == DEFAULTS | {"gpus": 1, "minutes": 5}
    assert read_resources("a", "02_large") == DEFAULTS | {"gpus": 1, "minutes": 600}
    assert read_resources("a@seed=3", "02_large") == read_resources("a", "02_large")
    write(house, {})
    assert read_resources("a", "01_small") == DEFAULTS


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"memory": 4000},
            r"among \['memory_mb', 'minutes', 'cpus', 'gpus', 'large', 'small'\], got \['memory'\]",
        ),
        ({"none": {"gpus": 1}}, r"got \['none'\] in set 'a'"),
        ({"small": {"time": 3}}, r"got \['time'\]"),
        ({"small": 3}, "resources of '01_small' must be a mapping, got 3 in set 'a'"),
        ({"minutes": 0}, "resource `minutes` must be a whole number >= 1, got 0 in set 'a'"),
        ({"gpus": -1}, "resource `gpus` must be a whole number >= 0, got -1"),
        ({"memory_mb": "4 GB"}, "must be a whole number >= 1, got '4 GB'"),
        ({"cpus": True}, "must be a whole number >= 1, got True"),
        ([1], "must map sections to parameters"),
    ],
)
def test_bad_resources_are_named(house: Path, asked: object, words: str) -> None:
    write(house, asked)
    with pytest.raises(ParameterError, match=words):
        read_resources("a", "01_small")
