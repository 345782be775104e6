"""Floors: a module imports only from floors below it, and mathematics knows nothing of reports."""

import ast
from pathlib import Path

import pytest

from lowrank.imports import PACKAGE, imported_modules, sources

# Floor of each room; a folder's rooms share one. `tasks` stands on `evaluation`, whose losses and metrics its sets name.
FLOORS = [
    {
        "imports",
        "fingerprint",
        "layers",
        "batches",
        "spectra",
        "moments",
        "budget",
        "penalties",
        "optimizer_state",
        "assignment",
        "gram",
        "record_file",
        "objectives",
        "processes",
    },
    {"cache", "statistics", "efficiency", "evaluation", "stability", "usv", "esd"},
    {"factorize", "statistics_file", "output_error", "pruning", "on_demand"},
    {"recipes", "tasks", "modules"},
    {"training", "checkpoint", "whitened_linear", "source"},
    {"baseline", "factored", "refine", "oialr_file", "deltas", "selection"},
    {"sweep", "prehab", "lora_ranks", "oialr"},
    {"rank_config"},
    {"adapters", "pi3"},
]
SIDE = {
    "parameters",
    "resources",
    "report",
    "run",
    "pair",
    "readme",
    "pretrain",
    "compare",
    "site",
    "pages",
    "reference",
    "sizing",
}
REPORTING = {"matplotlib", "pandas", "seaborn", "yaml", "papermill", "jupytext", "IPython"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(path: Path) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(path) in rooms)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_stands_on_lower_floors(path: Path) -> None:
    if room(path) in SIDE:
        return
    for imported in imported_modules(path) - {PACKAGE / "__init__.py"}:
        assert room(imported) not in SIDE, f"{path.name} imports {imported.name}"
        assert room(imported) == room(path) or floor(imported) < floor(path), f"{path.name} imports {imported.name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_mathematics_does_not_report(path: Path) -> None:
    if room(path) in SIDE:
        return
    tree = ast.parse(path.read_text(encoding="utf8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & REPORTING


def test_every_module_has_a_floor_and_a_docstring() -> None:
    placed = set().union(*FLOORS) | SIDE
    for path in MODULES:
        assert room(path) in placed
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf8")))


def test_sources_follow_imports_and_names() -> None:
    found = {path.relative_to(PACKAGE).as_posix() for path in sources(PACKAGE / "training.py")}
    assert {"training.py", "tasks/__init__.py", "tasks/digits.py", "tasks/docs.py", "layers.py"} <= found
    assert not found & {"factorize.py", "report.py"}
    assert {path.name for path in sources(PACKAGE / "spectra.py")} == {"spectra.py"}
