"""The benchmarks: all can be collected, and each table says where it was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import shared

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
