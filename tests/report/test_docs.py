"""What the pages of docs/ name is there: sets, notebooks, their tables and parameters, functions."""

import pkgutil
import re

import pytest

from lowrank.io.dependencies import ROOT
from lowrank.report.parameters import defaults, jobs, notebook_names, notebook_path, set_names

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
    assert others <= set(defaults(notebook)), f"no parameters of {notebook}: {others}"
    source = notebook_path(notebook).read_text(encoding="utf8")
    assert all(re.search(rf"\b{name}\b", source) for name in quoted(result))
    for name in functions:
        assert name.startswith("--") or pkgutil.resolve_name(name)
