"""The Makefile's set-up and `make lab`, without installing or starting anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lowrank.io.dependencies import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not there")


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # as if not under make
    return subprocess.run(["make", *words], cwd=folder, env=outside, capture_output=True, text=True, check=False)


def test_the_environment_of_another_checkout_is_left_alone(tmp_path: Path) -> None:
    other, here = tmp_path / "other", tmp_path / "here"
    (other / "bin").mkdir(parents=True)
    here.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, here)
    (python := other / "bin" / "python").write_text(f"#!/bin/sh\ntouch {tmp_path}/used\n")
    python.chmod(0o755)
    (here / ".venv").symlink_to(other)
    done = make(here, "test")
    assert done.returncode == 2
    assert f"error: .venv must be a folder of this checkout, got a link to {other}: " in done.stderr
    assert not (tmp_path / "used").exists()
    assert {path.name for path in other.iterdir()} == {"bin"}
    assert make(here, "help").returncode == 0  # what needs no environment


def test_the_lab_starts_as_root_in_a_container() -> None:
    command = make(ROOT, "--dry-run", "-o", ".venv/.ok", "lab").stdout
    assert command.startswith(f"jupyter lab --notebook-dir {ROOT}")
    assert ("--allow-root" in command) == (os.getuid() == 0)
