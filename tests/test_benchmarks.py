"""The benchmarks: all can be collected, each table says where it was measured, and those of a GPU need no Jupyter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_sizes
import pytest
import shared
import torch

from lowrank.io.dependencies import ROOT

BENCHES = sorted((ROOT / "benchmarks").glob("bench_*.py"))


def test_runs_are_recorded_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "BENCH", tmp_path)
    for name, commit in (("one", "a"), ("two", "b"), ("one", "c")):
        shared.record_run(name, {"git_commit": commit})
    recorded = json.loads((tmp_path / "run.json").read_text(encoding="utf8"))
    assert recorded == {"one": {"git_commit": "c"}, "two": {"git_commit": "b"}}


def test_every_benchmark_can_be_collected() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--collect-only", *map(str, BENCHES)]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }  # of xdist's worker
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(path.name in done.stdout for path in BENCHES)


ABSENT = [
    "pytest",
    "pandas",
    "papermill",
    "jupytext",
    "seaborn",
    "datasets",
    "nbval",
    "matplotlib",
    "IPython",
    "notebook",
]
ABSENT += ["jupyterlab", "jupyter_core", "nbformat", "nbclient", "ipykernel", "ipywidgets", "snakemake", "sklearn"]
HIDE = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); "
EVERY_MODULE = """
import importlib, pkgutil, lowrank
for module in pkgutil.walk_packages(lowrank.__path__, "lowrank."):
    if not module.name.startswith("lowrank.report"):
        importlib.import_module(module.name)
assert all(getattr(lowrank, name) is not None for name in lowrank.__all__)
"""
GPU = """
import runpy
sys.argv[0] = "benchmarks/gpu.py"
sys.path.insert(0, "benchmarks")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without_jupyter(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script from the root of the project, where packages of the report seem not to be installed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HIDE + script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_library_needs_no_jupyter() -> None:
    done = run_without_jupyter(EVERY_MODULE)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    done = run_without_jupyter(GPU)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{gpu.NO_GPU}\n")


def test_the_parts_of_a_gpu_run_anywhere_at_small_sizes(tmp_path: Path) -> None:
    done = run_without_jupyter(GPU, *gpu_sizes.TINY, "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    gpu_sizes.check(tmp_path)


def test_what_would_start_too_late_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LIMIT", -1)
    arguments = [*gpu_sizes.TINY, "--device", "cpu", "--out", str(tmp_path), "--parts", "layers"]
    assert gpu.main(arguments) == 1
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf8"))["left_out"] == ["layers"]


def test_make_gpu_sets_nothing_up() -> None:
    done = subprocess.run(["make", "-n", "gpu"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "benchmarks/gpu.py" in done.stdout
    assert ".venv/.ok" not in done.stdout
