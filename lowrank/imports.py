"""Which files of this package a source file depends on, read from its import statements."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent


def imported_modules(path: Path) -> set[Path]:
    """The files of this package that one Python file imports or names, anywhere in its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # modules that are imported by name, as the tasks are
    found: set[Path] = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == PACKAGE.name:
            stem = PACKAGE.joinpath(*parts[1:])
            found |= {file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.exists()}
    return found


def sources(*paths: Path) -> list[Path]:
    """The given files and all files of this package that they depend on, sorted."""
    done: set[Path] = set()
    waiting = [path.resolve() for path in paths]
    while waiting:
        path = waiting.pop()
        if path not in done:
            done.add(path)
            waiting += imported_modules(path)
    return sorted(done)
