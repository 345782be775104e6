"""The checks of tests/devices, on an accelerator made of CPU memory and, if there is one, on a GPU.

Each file runs in a process of its own: torch takes the accelerator for that of the machine from then on, which would change what
other tests see. `python -m pytest tests/devices/check_*.py` runs them in sight.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.io.dependencies import ROOT

CHECKS = sorted((Path(__file__).parent / "devices").glob("check_*.py"))


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_on_an_accelerator(path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        str(path),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert "passed" in done.stdout
