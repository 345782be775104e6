"""Paragraphs of the docstrings of five installed packages: real English text that needs no download.

The packages are pinned by the lock, so the corpus is the same everywhere. Files are read with `ast`, never imported.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lowrank.io.cache import cached
from lowrank.io.hashing import hash_options

PACKAGES = ("matplotlib", "numpy", "pandas", "scipy", "sklearn")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
MIN_CHARACTERS = 40
SKIPPED = frozenset({"tests", "testing", "_vendor", "externals", "extern", "array_api_compat", "array_api_extra"})
HELD_OUT_FILES = 5  # one file in five


class Paragraph(NamedTuple):
    """`package`: index into `PACKAGES`. `held_out`: decided by file, so that no paragraph of a file is on both sides."""

    text: str
    package: int
    held_out: bool


_HELD_OUT = Paragraph("", 0, True)


def _docstrings(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return [inspect.cleandoc(text) for text in found if text]


def _paragraphs(docstring: str) -> list[str]:
    """Runs of lines between blank lines, joined to one line; examples and rules of `----` are left out."""
    found = []
    for block in docstring.split("\n\n"):
        lines = [line.strip() for line in block.splitlines()]
        text = " ".join(line for line in lines if line.strip("-=~ ") and not line.startswith((">>>", "...")))
        if len(text) >= MIN_CHARACTERS and not block.lstrip().startswith(">>>"):
            found.append(text)
    return found


def _is_held_out(relative: str) -> bool:
    return int.from_bytes(hashlib.blake2b(relative.encode(), digest_size=4).digest()) % HELD_OUT_FILES == 0


def _read_packages() -> list[Paragraph]:
    """All distinct paragraphs, by package and file. A text found on both sides stays in the training part."""
    paragraphs: dict[str, Paragraph] = {}
    for label, package in enumerate(PACKAGES):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"package {package!r} is not installed: install requirements.lock, which pins it.")
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root.parent).as_posix()
            if SKIPPED.isdisjoint(relative.split("/")):
                for docstring in _docstrings(path.read_text(encoding="utf8")):
                    for text in _paragraphs(docstring):
                        held_out = _is_held_out(relative) and paragraphs.get(text, _HELD_OUT).held_out
                        paragraphs[text] = Paragraph(text, label, held_out)
    return list(paragraphs.values())


@cache
def read_corpus() -> tuple[Paragraph, ...]:
    """The corpus, parsed once per set of package versions and cached on disk."""

    def build(folder: Path) -> None:
        (folder / "paragraphs.json").write_text(json.dumps(_read_packages()), encoding="utf8")

    folder = cached("corpus", package_versions(), Path(__file__), build)
    return tuple(Paragraph(*row) for row in json.loads((folder / "paragraphs.json").read_text(encoding="utf8")))


@cache
def corpus_hash() -> str:
    """16 hex digits of every paragraph, its label and its side of the split."""
    return hash_options(read_corpus())


def package_versions() -> dict[str, str]:
    """The versions that the corpus was read from."""
    return {package: importlib.metadata.version(DISTRIBUTIONS.get(package, package)) for package in PACKAGES}
