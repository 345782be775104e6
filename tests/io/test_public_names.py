"""A public name counts as the module that defines it, whatever the form of the import."""

from pathlib import Path

import pytest

from lowrank.io import dependencies
from lowrank.io.dependencies import imported_modules, public_names, sources

FILES = {
    "__init__.pyi": "from .compression.compress import compress as compress\nfrom .nn.batches import iterate as batches\n",
    "__init__.py": 'TABLE = {"compress": "lowrank.compression.compress", "batches": "lowrank.nn.batches"}\n',
    "compression/__init__.py": "",
    "compression/compress.py": "from lowrank.nn.surgery import replace\n",
    "nn/__init__.py": "",
    "nn/batches.py": "",
    "nn/surgery.py": "",
}
COMPRESS = {"compression/compress.py", "nn/surgery.py"}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package `lowrank` with a table of public names."""
    package = tmp_path / "lowrank"
    for name, text in FILES.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    for name, path in {"ROOT": tmp_path, "PACKAGE": package, "PUBLIC_TABLE": package / "__init__.pyi"}.items():
        monkeypatch.setattr(dependencies, name, path)
    return package


def dependencies_of(package: Path, code: str) -> set[str]:
    notebook = package.parent / "notebook.py"
    notebook.write_text(code)
    return {path.relative_to(package).as_posix() for path in sources(notebook) if path != notebook}


@pytest.mark.parametrize(
    ("code", "files"),
    [
        ("from lowrank import compress", COMPRESS),
        ("from lowrank import compress as squeeze", COMPRESS),
        ("import lowrank\nlowrank.compress(1)", COMPRESS),
        ("import lowrank as lr\nlr.compress(1)", COMPRESS),
        ("from lowrank import batches", {"nn/batches.py"}),
        ("from lowrank.nn import batches", {"nn/__init__.py", "nn/batches.py"}),
        ("from lowrank import *", COMPRESS | {"nn/batches.py"}),
        ("import lowrank", set()),
        ("import lowrank\nlowrank.__version__", set()),
        ("task = 'lowrank.nn.batches'", {"nn/batches.py"}),
    ],
)
def test_a_public_name_counts_as_its_module_and_no_other(package: Path, code: str, files: set[str]) -> None:
    assert dependencies_of(package, code) == files


def test_the_loader_of_public_names_depends_on_nothing(package: Path) -> None:
    assert imported_modules(package / "__init__.py") == set()
    (package / "__init__.pyi").unlink()
    assert public_names() == {}
    assert dependencies_of(package, "from lowrank import compress") == set()


def test_relative_imports_are_followed(package: Path) -> None:
    (package / "nn" / "batches.py").write_text("from .surgery import replace\nfrom ..compression import compress\n")
    files = {"nn/batches.py", "nn/surgery.py", "compression/__init__.py", "compression/compress.py"}
    assert dependencies_of(package, "from lowrank import batches") == files
