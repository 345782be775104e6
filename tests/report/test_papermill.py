"""docs/papermill.md: the grid of the page, with papermill alone, from a folder of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from processes import copy_project

from lowrank.io.dependencies import ROOT

PAGE = (ROOT / "docs" / "papermill.md").read_text(encoding="utf8")
SETS = {"digits-vit": "digits"}
NOTEBOOK = """# %% tags=["parameters"]
set_name = "digits-vit"
task = "digits"
steps = 600
seed = 0

# %%
import pandas as pd

from lowrank.report.findings.registry import FINDINGS
from lowrank.report.notebook import Report

FINDINGS.clear()  # claims need tables that this does not write
report = Report("01_whitening", globals())
report.table(pd.DataFrame({"task": [task], "seed": [seed]}), "drawn", split=None)
report.finish()
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which notebook 01 does next to nothing, with `lowrank` as a command in bin/."""
    house = copy_project(tmp_path_factory.mktemp("house"))
    (house / "notebooks" / "01_whitening.py").write_text(NOTEBOOK, encoding="utf8")
    notebook = jupytext.reads(NOTEBOOK, "py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, house / "notebooks" / "01_whitening.ipynb")
    for name, task in SETS.items():
        (house / "params" / f"{name}.yaml").write_text(f"common: {{task: {task}}}\nwhitening: {{}}\n", encoding="utf8")
    (house / "bin").mkdir()
    (command := house / "bin" / "lowrank").write_text(f'#!/bin/sh\nexec {sys.executable} -m lowrank "$@"\n')
    command.chmod(0o755)
    return house


def call(script: str, house: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{house / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(house),
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    environment.pop("LOWRANK_OUTPUTS", None)
    folder.mkdir(exist_ok=True)
    command = ["bash", "-ec", script.replace("~/lowrank", str(house))]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_grid_of_the_page_has_a_folder_for_each_combination(house: Path, tmp_path: Path) -> None:
    (script,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    sets = " ".join(SETS)
    assert f"for set in {sets} docs-llama; do" in script
    done = call(script.replace(f"{sets} docs-llama", sets), house, tmp_path)  # one model, for the sake of time
    assert done.returncode == 0, done.stderr[-3000:]
    drafts = house / "outputs" / "draft"
    runs = {
        path.parts[-3]: json.loads(path.read_text(encoding="utf8")) for path in drafts.glob("*/01_whitening/run.json")
    }
    found = {name: (run["set"], run["parameters"]["task"], run["parameters"]["seed"]) for name, run in runs.items()}
    assert found == {
        "digits-vit": ("digits-vit", "digits", 0),
        "digits-vit@seed=1": ("digits-vit@seed=1", "digits", 1),
    }
    assert {path.name for path in tmp_path.iterdir()} == {"digits-vit.yaml", "digits-vit-0.ipynb", "digits-vit-1.ipynb"}
    assert not list(drafts.glob("*/.*"))


def test_a_wrong_name_ends_it_before_anything_is_written(house: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "tried"
    script = f"export LOWRANK_OUTPUTS={outputs}\npapermill ~/lowrank/notebooks/01_whitening.ipynb out.ipynb -p setps 40"
    done = call(script, house, tmp_path)
    assert done.returncode != 0
    assert "got ['setps']: did you mean 'steps'?" in done.stderr
    assert not outputs.exists()


def test_a_whole_set_is_no_file_of_parameters(house: Path, tmp_path: Path) -> None:
    """papermill reads it, as its sections are names, and the notebook says what to do instead."""
    outputs = tmp_path / "tried"
    line = "papermill ~/lowrank/notebooks/01_whitening.ipynb out.ipynb -f ~/lowrank/params/digits-vit.yaml"
    done = call(f"export LOWRANK_OUTPUTS={outputs}\n{line}", house, tmp_path)
    assert done.returncode != 0
    assert "`lowrank params SET 01_whitening > FILE`" in done.stderr
    assert not outputs.exists()
