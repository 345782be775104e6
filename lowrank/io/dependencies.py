"""Find the files of this package that a source file depends on, and hash their code.

Notebooks import the public names with `from lowrank import compress`. Such a name counts as the module that defines it, by
the table in `lowrank/__init__.pyi`, so that a notebook depends on the modules it uses and on no others.
"""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
PUBLIC_TABLE = PACKAGE / "__init__.pyi"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def public_names() -> dict[str, str]:
    """Return the public names of this package: name -> dotted name of the module that defines it."""
    return _read_table(PUBLIC_TABLE.read_text(encoding="utf8"), PUBLIC_TABLE) if PUBLIC_TABLE.exists() else {}


@cache
def _read_table(source: str, path: Path) -> dict[str, str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: _origin(node, path) for node in nodes for alias in node.names}


def imported_modules(path: Path) -> set[Path]:
    """Return the files of this package that a Python file imports or names, anywhere in its code."""
    if path == PACKAGE / "__init__.py":
        return set()  # it loads public names on demand, so it needs none of the modules in its table
    public = public_names()
    modules = set()
    for name in _names(path.read_text(encoding="utf8"), path):
        if name == f"{PACKAGE.name}.*":
            modules |= set(public.values())
        package, _, rest = name.partition(".")
        first = rest.partition(".")[0]
        modules.add(public[first] if package == PACKAGE.name and first in public else name)
    return {file for module in modules for file in _files(module)}


@cache  # by content: the Snakefile asks for each job, and most jobs share most files
def _names(source: str, path: Path) -> frozenset[str]:
    """Return every dotted name that may be a module: from imports, from strings, and from attributes of the package."""
    tree = ast.parse(source)
    names: set[str] = set()
    aliases = {PACKAGE.name}  # names of the package itself in this file
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            aliases |= {alias.asname for alias in node.names if alias.name == PACKAGE.name and alias.asname}
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(node, path)
            names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # tasks are imported by name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            names.add(f"{PACKAGE.name}.{node.attr}")
    return frozenset(names)


def _origin(node: ast.ImportFrom, path: Path) -> str:
    """Return the absolute name of the module that a file imports from."""
    if node.level == 0:
        return node.module or ""
    folder = path.resolve().parents[node.level - 1]
    parts = folder.relative_to(ROOT).parts if folder.is_relative_to(PACKAGE) else ()
    return ".".join([*parts, node.module] if node.module else parts)


def _files(module: str) -> list[Path]:
    package, *parts = module.split(".")
    if package != PACKAGE.name or not parts:
        return []
    stem = PACKAGE.joinpath(*parts)
    return [file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.exists()]


def sources(*paths: Path) -> list[Path]:
    """Return these files and all files of this package that they depend on, sorted."""
    done: set[Path] = set()
    waiting = [path.resolve() for path in paths]
    while waiting:
        path = waiting.pop()
        if path not in done:
            done.add(path)
            waiting += imported_modules(path)
    return sorted(done)


def hash_code(paths: Iterable[Path]) -> str:
    """Hash the code of Python files without docstrings, comments, markdown cells and line breaks.

    Results depend on code, not on words: a better sentence re-runs nothing.

    **Arguments**

    - `paths`: Python files, among them notebooks as jupytext writes them. Their names and order count.

    **Returns** 16 hex digits.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        digest.update(f"{path.name} {dump_code(path.read_text(encoding='utf8'))};".encode())
    return digest.hexdigest()


@cache
def dump_code(source: str) -> str:
    """Return code as text without docstrings, comments and line breaks.

    **Arguments**

    - `source`: Python code.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)
