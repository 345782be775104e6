"""A corpus of docstring paragraphs from five installed packages: real English text that needs no download.

The lock pins the packages, so the corpus is the same everywhere. Files are read with `ast` and never imported. A hash of its
path puts each file into one split: one in five chooses, one in five of the others is the test, the rest trains.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lowrank.io.cache import load_or_build
from lowrank.io.checks import SPLITS
from lowrank.io.hashing import hash_options
from lowrank.tasks.splits import part_of

CORPUS_PACKAGES = ("matplotlib", "numpy", "pandas", "scipy", "sklearn")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
MIN_CHARACTERS = 40
SKIPPED = frozenset({"tests", "testing", "_vendor", "externals", "extern", "array_api_compat", "array_api_extra"})
PARTS = 5  # one file in five is held out


class Paragraph(NamedTuple):
    """Hold one paragraph.

    **Arguments**

    - `text`: one line.
    - `package`: index into `CORPUS_PACKAGES`.
    - `split`: 'train', 'validation' or 'test', that of its file.
    """

    text: str
    package: int
    split: str


def _read_docstrings(source: str) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    docstrings = (ast.get_docstring(node, clean=False) for node in nodes)
    return [inspect.cleandoc(text) for text in docstrings if text]


def _split_paragraphs(docstring: str) -> list[str]:
    """Join each run of lines between blank lines to one line; leave out examples and rules of `----`."""
    paragraphs = []
    for block in docstring.split("\n\n"):
        lines = [line.strip() for line in block.splitlines()]
        text = " ".join(line for line in lines if line.strip("-=~ ") and not line.startswith((">>>", "...")))
        if len(text) >= MIN_CHARACTERS and not block.lstrip().startswith(">>>"):
            paragraphs.append(text)
    return paragraphs


def _split_of(relative: str) -> str:
    if part_of(relative, PARTS) == 0:
        return "validation"
    return "test" if part_of(relative, PARTS, salt="test") == 0 else "train"


def _find_files(package: str) -> list[tuple[str, Path]]:
    """Return the Python files of a package without its tests, each with its path relative to site-packages."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"package {package!r} is not installed: install requirements.lock, which pins it.")
    root = Path(spec.origin).parent
    files = [(path.relative_to(root.parent).as_posix(), path) for path in sorted(root.rglob("*.py"))]
    return [(relative, path) for relative, path in files if SKIPPED.isdisjoint(relative.split("/"))]


def _read_packages() -> list[Paragraph]:
    """Return all distinct paragraphs by package and file.

    A text in several splits counts for the first of them in `SPLITS`, so that no text of the test is seen before.
    """
    paragraphs: dict[str, Paragraph] = {}
    for label, package in enumerate(CORPUS_PACKAGES):
        for relative, path in _find_files(package):
            split = _split_of(relative)
            for docstring in _read_docstrings(path.read_text(encoding="utf8")):
                for text in _split_paragraphs(docstring):
                    earlier = paragraphs.get(text)
                    known = [split] if earlier is None else [split, earlier.split]
                    paragraphs[text] = Paragraph(text, label, min(known, key=SPLITS.index))
    return list(paragraphs.values())


@cache
def read_corpus() -> tuple[Paragraph, ...]:
    """Read the corpus. It is parsed once for each set of package versions and cached on disk."""

    def build(folder: Path) -> None:
        (folder / "paragraphs.json").write_text(json.dumps(_read_packages()), encoding="utf8")

    folder = load_or_build("corpus", package_versions(), Path(__file__), build)
    return tuple(Paragraph(*row) for row in json.loads((folder / "paragraphs.json").read_text(encoding="utf8")))


@cache
def corpus_hash() -> str:
    """Return 16 hex digits of all paragraphs with their packages and splits."""
    return hash_options(read_corpus())


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that the corpus is read from."""
    return {package: importlib.metadata.version(DISTRIBUTIONS.get(package, package)) for package in CORPUS_PACKAGES}
