"""What the pages of docs/ name is there: sets, notebooks, their tables and parameters, functions."""

import json
import pkgutil
import re
from pathlib import Path

import pytest
from processes import copy_project, start_report

from lowrank.io.dependencies import ROOT
from lowrank.report.parameters import jobs, notebook_names, notebook_path, read_defaults, set_names

COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in COMMANDS.splitlines()
    if line.startswith("| ") and not line.startswith("| original")
]


def quoted(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def test_the_commands_of_every_original_are_there() -> None:
    assert len(ROWS) >= 40
    assert {row[2].strip("`") for row in ROWS} == set(notebook_names())


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:40] for row in ROWS])
def test_a_command_leads_to_what_exists(row: list[str]) -> None:
    _, where, (notebook,), result, functions = row[0], row[1], quoted(row[2]), row[3], quoted(row[4])
    names = [name for name in quoted(where) if name in set_names()]
    others = set(quoted(where)) - set(names) - {"--ratio", "keep", "make report PROFILE=slurm"}
    assert names or where.startswith("any")
    assert all((name, notebook) in jobs([name]) for name in names)
    assert others <= set(read_defaults(notebook)), f"no parameters of {notebook}: {others}"
    source = notebook_path(notebook).read_text(encoding="utf8")
    assert all(re.search(rf"\b{name}\b", source) for name in quoted(result))
    for name in functions:
        assert name.startswith("--") or pkgutil.resolve_name(name)


def test_the_data_set_of_own_data_runs_when_the_page_is_followed(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "own-data.md").read_text(encoding="utf8")
    (code,), (parameters,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "yaml"))
    assert len(code.splitlines()) <= 50
    house = copy_project(tmp_path)
    (house / "lowrank" / "tasks" / "wine.py").write_text(code.partition("\n\ntask = ")[0], encoding="utf8")
    registry = house / "lowrank" / "tasks" / "registry.py"
    tasks = registry.read_text(encoding="utf8").replace("TASKS = {", 'TASKS = {"wine": "lowrank.tasks.wine",')
    registry.write_text(tasks, encoding="utf8")
    (house / "params" / "wine-mlp.yaml").write_text(parameters, encoding="utf8")
    report = start_report(house, "outputs", "wine-mlp")
    assert report.wait(timeout=300) == 0, (house / "outputs.log").read_text()[-3000:]
    result = json.loads((house / "outputs" / "wine-mlp" / "01_whitening" / "run.json").read_text(encoding="utf8"))
    assert result["inputs"]["metric"] == "accuracy"
    assert result["inputs"]["task"] == {"task": "wine", "options": {"width": 20}, "data": "scikit-learn"}
