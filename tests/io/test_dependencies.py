"""The house: what depends on what, which modules know reports, and how long modules and functions are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.io.dependencies import PACKAGE, ROOT, sources

REPORTING = {"matplotlib", "pandas", "seaborn", "yaml", "papermill", "jupytext", "IPython"}
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_MODULE, LONGEST_FUNCTION = 300, 40


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its name to its end; the docstring does not count."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    last = function.end_lineno or function.lineno
    return last - function.lineno + 1 - ((docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0)


def test_packages_import_only_from_below() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_there_are_fourteen_entries() -> None:
    entries = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    packages = ["io", "factorization", "nn", "calibration", "compression", "training", "lora", "selection"]
    packages += ["tasks", "pi3", "report", "cli"]
    assert entries == {"__init__.py", "__main__.py", *packages}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_described_short_and_knows_no_report(path: Path) -> None:
    text = path.read_text(encoding="utf8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert text.count("\n") <= LONGEST_MODULE
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {node.name: lines_of(node) for node in functions if lines_of(node) > LONGEST_FUNCTION} == {}
    if not name_of(path).startswith("report/"):
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & REPORTING


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=name_of)
def test_the_docstring_of_a_package_is_its_table_of_contents(path: Path) -> None:
    if path.parent == PACKAGE:
        return
    tree = ast.parse(path.read_text(encoding="utf8"))
    assert len(tree.body) == 1  # no import, so that a file of the package can be had alone
    contents = ast.get_docstring(tree) or ""
    for child in path.parent.iterdir():
        if (child.suffix == ".py" and child != path) or (child / "__init__.py").exists():
            assert f"`{child.stem}`" in contents, child.name


def test_sources_follow_imports_and_names() -> None:
    found = {name_of(path) for path in sources(PACKAGE / "tasks/training.py")}
    assert {"training/loop.py", "tasks/task.py", "nn/batches.py", "nn/targets.py"} <= found
    assert not {name for name in found if name.startswith(("compression/", "report/"))}
    found = {name_of(path) for path in sources(PACKAGE / "factorization/spectra.py")}
    assert found == {"factorization/spectra.py", "factorization/precision.py", "io/checks.py"}
