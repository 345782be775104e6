"""Find the files of this package that a source file depends on, and hash their code."""

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


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


def hash_code(paths: Iterable[Path]) -> str:
    """Hash the code of Python files: the same for other comments, docstrings, markdown cells or line breaks.

    Results depend on code, not on words, so that mending a sentence re-runs nothing.

    - `paths`: Python files, notebooks as jupytext writes them among them; their names and order count.

    Returns 16 hex digits.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf8"))
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        digest.update(f"{path.name} {ast.dump(tree)};".encode())
    return digest.hexdigest()
