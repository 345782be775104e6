"""Parameters that anyone sets in a running notebook: what is refused, and which folder a combination gets."""

import json
import os
import re
from pathlib import Path

import matplotlib
import pandas as pd
import pytest

matplotlib.use("agg")

from lowrank.report.errors import ParameterError
from lowrank.report.folders import open_results
from lowrank.report.namespace import LONGEST_NAME, name_results, read_namespace
from lowrank.report.notebook import Report
from lowrank.report.parameters import VARIANT, notebook_names, read_defaults, read_parameters, set_names, split_variant

DEFAULTS = read_defaults("01_whitening")
CELL = "\n".join(f"{name} = {value!r}  # unit" for name, value in DEFAULTS.items())
TABLE = pd.DataFrame({"rank": [1, 2]})


def run_cells(*cells: str) -> dict[str, object]:
    """The namespace of a kernel that has run some cells, as IPython keeps it."""
    namespace: dict[str, object] = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, namespace)
    return namespace


@pytest.mark.parametrize("notebook", notebook_names())
def test_the_parameters_cell_of_every_notebook_is_taken(notebook: str) -> None:
    defaults = read_defaults(notebook)
    cell = "\n".join(f"{name} = {value!r}" for name, value in defaults.items())
    assert read_namespace(notebook, run_cells(cell, "import json")) == defaults
    assert name_results(notebook, defaults) == defaults["set_name"]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("# Parameters\nsetps = 40\n", r"must be among \[.*'steps'.*\], got \['setps'\]: did you mean 'steps'\?"),
        ("# Parameters\nsteps = 40\nunrelated = 1\n", r"must be among .*, got \['unrelated'\]\.$"),
        (
            'rank_shares = "[0.25]"',
            r"`rank_shares` .* must be of type list .* got '\[0.25\]': `papermill -p` passes no lis",
        ),
        (
            'learning_rate = "1e-3"',
            "`learning_rate` .* must be of type float .* got '1e-3': YAML takes 1e-3 .* for texts",
        ),
        ("steps = 40.5", "`steps` of '01_whitening' must be of type int .* got 40.5"),
        ("precision = 16", "`precision` .* must be of type str .* got 16: `papermill -r` passes"),
        ("retrain = 1", "`retrain` .* must be of type bool"),
        ('set_name = "../other"', "`set_name` .* as it names a folder, got '../other'"),
        ('set_name = ""', "as it names a folder, got ''"),
    ],
)
def test_what_no_parameter_takes_is_named(cell: str, words: str, outputs: Path) -> None:
    with pytest.raises(ParameterError, match=words):
        Report("01_whitening", run_cells(CELL, cell, "import json\nreport = None"))
    assert not outputs.exists()


def test_a_name_that_is_added_to_the_parameters_cell_is_named() -> None:
    with pytest.raises(ParameterError, match=r"got \['setps'\]"):
        read_namespace("01_whitening", run_cells(f"{CELL}\nsetps = 40", "import json"))


def test_a_parameter_that_is_missing_is_named() -> None:
    with pytest.raises(ParameterError, match=r"must have all parameters of '01_whitening', got none for \['steps'\]"):
        read_namespace("01_whitening", {name: value for name, value in DEFAULTS.items() if name != "steps"})


def test_variables_of_other_cells_are_no_parameters() -> None:
    after = run_cells("a = 1", CELL, "steps = 40", "import json\nb = 2", "setps = 3")
    assert read_namespace("01_whitening", after) == DEFAULTS | {"steps": 40}
    mended = run_cells(CELL, "setps = 3", "import json", CELL, "steps = 3")
    assert read_namespace("01_whitening", mended)["steps"] == 3


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "digits-vit"),
        ({"seed": 1}, "digits-vit@seed=1"),
        ({"seed": 1, "steps": 3}, "digits-vit@steps=3@seed=1"),
        ({"learning_rate": 1e-05, "retrain": True}, "digits-vit@learning_rate=1e-05@retrain=True"),
        ({"rank_shares": [0.25, 0.5], "precision": "bf16"}, "digits-vit@precision=bf16@rank_shares=0.25,0.5"),
        ({"set_name": "digits-vit@seed=1", "seed": 1}, "digits-vit@seed=1"),
        ({"set_name": "mine"}, "mine"),
        ({"set_name": "mine", "seed": 1}, "mine@seed=1"),
    ],
)
def test_a_combination_has_the_name_of_its_variant(changes: dict[str, object], name: str) -> None:
    parameters = DEFAULTS | changes
    assert name_results("01_whitening", parameters) == name
    if name.partition("@")[0] in set_names():  # the runner makes the same of it
        assert read_parameters(name, "01_whitening") == parameters | {"set_name": name}


def test_what_no_variant_can_say_has_a_hash() -> None:
    others = [{"task_options": {"width": width}} for width in (1, 2)] + [{"rank_shares": []}, {"task": "a b"}]
    others += [{"shrinkages": [float(f"0.{i + 1}1") for i in range(LONGEST_NAME)]}]
    names = [name_results("01_whitening", DEFAULTS | other) for other in others]
    assert len(set(names)) == len(others)
    for name in names:
        assert re.fullmatch("digits-vit@parameters=[0-9a-f]{16}", name)
        assert VARIANT.fullmatch(name.removeprefix("digits-vit"))
        assert split_variant(name)[0] == "digits-vit"


@pytest.mark.usefixtures("without_findings")
def test_two_seeds_have_two_folders_and_the_set_keeps_its_own(outputs: Path, capsys) -> None:
    for seed in (0, 1):
        report = Report("01_whitening", DEFAULTS | {"seed": seed})
        report.table(TABLE, "ranks", split=None)
        report.finish()
    runs = {path.relative_to(outputs).as_posix(): json.loads(path.read_text()) for path in outputs.glob("*/*/run.json")}
    assert set(runs) == {"digits-vit/01_whitening/run.json", "digits-vit@seed=1/01_whitening/run.json"}
    assert {run["set"]: run["parameters"]["seed"] for run in runs.values()} == {"digits-vit": 0, "digits-vit@seed=1": 1}
    said = capsys.readouterr().out
    assert said.count("results go to") == 1  # those of the set go where they always do, and nothing is said
    assert str(outputs / "digits-vit@seed=1" / "01_whitening") in said


@pytest.mark.usefixtures("without_findings")
def test_old_results_stay_until_new_ones_are_whole(outputs: Path) -> None:
    result = outputs / "digits-vit" / "01_whitening"

    def run(name: str) -> Report:
        report = Report("01_whitening", DEFAULTS)
        report.table(TABLE, name, split=None)
        return report

    first = run("old")
    assert not result.exists()  # nothing is half there
    first.finish()
    second = run("new")
    assert {path.name for path in result.iterdir()} == {"claims.csv", "old.csv", "run.json"}
    second.finish()
    assert {path.name for path in result.iterdir()} == {"claims.csv", "new.csv", "run.json"}
    second.table(TABLE, "more", split=None)  # a cell that is run again after the last one
    second.finish()
    assert {path.name for path in result.iterdir()} == {"claims.csv", "more.csv", "new.csv", "run.json"}
    assert [path.name for path in result.parent.iterdir()] == ["01_whitening"]


def test_what_a_dead_process_left_is_deleted_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    final = tmp_path / "set" / "01_whitening"
    filled = open_results(final)
    (filled / "table.csv").write_text("1")
    prefix = filled.name.removesuffix(f"{os.getpid()}.partial")
    dead, living = (filled.with_name(f"{prefix}{process}.partial") for process in (2**22 + 1, os.getppid()))
    dead.mkdir()
    living.mkdir()
    assert list(open_results(final).iterdir()) == []  # the notebook starts again in the same process
    assert {path.name for path in final.parent.iterdir()} == {filled.name, living.name}
