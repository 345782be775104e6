"""docs/methods.md: every method that it names is where it says."""

import inspect
import pkgutil
import re

import pytest

from lowrank import METHODS
from lowrank.io.dependencies import ROOT

TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf8")
ROWS = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| ") and "`lowrank/" in line]
WANTED = "SVD-LLM DRONE ASVD FWSVD PIFA PREHAB OIALR AlphaPruning Wanda EVA pi3".split()  # noqa: SIM905 (a list of words)


@pytest.mark.parametrize("name", WANTED)
def test_the_page_has_the_method(name: str) -> None:
    assert any(row[0].startswith(name) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_leads_to_its_code(row: list[str]) -> None:
    here, file = re.findall("`([^`]+)`", row[2])[0], row[3].strip("`")
    entry = re.fullmatch(r'METHODS\["(\w+)"\]', here)
    value = METHODS[entry[1]] if entry else pkgutil.resolve_name(here)
    assert inspect.getsourcefile(inspect.unwrap(value)) == str(ROOT / file)
