"""A module that is imported after another one, whichever comes first."""

import importlib
import sys
from pathlib import Path

import pytest

from lowrank.io.after_import import follow_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a module to wait for, one that follows it and reads it, and a log of what ran."""
    package = tmp_path / "followed"
    package.mkdir()
    (package / "__init__.py").write_text("log = []\n")
    (package / "first.py").write_text("from followed import log\nlog.append('first')\nvalue = 1\n")
    (package / "second.py").write_text(
        "from followed import log\nfrom followed.first import value\nlog.append('second')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)
    yield "followed"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def log() -> list[str]:
    return sys.modules["followed"].log


@pytest.mark.parametrize("name", ["first", "second"])
def test_it_waits_for_the_module(name: str, package: str) -> None:
    follow_import(f"{package}.first", f"{package}.second")
    assert package not in sys.modules
    importlib.import_module(f"{package}.{name}")
    assert log() == ["first", "second"]


def test_it_is_imported_now_if_the_module_is_there(package: str) -> None:
    importlib.import_module(f"{package}.first")
    follow_import(f"{package}.first", f"{package}.second")
    assert log() == ["first", "second"]


def test_a_module_that_is_not_installed_is_missing_as_before(package: str) -> None:
    follow_import(f"{package}.third", f"{package}.second")
    with pytest.raises(ModuleNotFoundError, match="followed.third"):
        importlib.import_module(f"{package}.third")


def test_one_that_cannot_be_imported_stops_no_other(package: str) -> None:
    follow_import(f"{package}.first", f"{package}.nothing")
    with pytest.warns(RuntimeWarning, match="followed.nothing could not be imported, what it adds is not there"):
        importlib.import_module(f"{package}.first")
    assert log() == ["first"]
