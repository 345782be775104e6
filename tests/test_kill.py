"""`make report` killed at random moments and called again leaves the tables of an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

SET = """common: {task: digits, task_options: {width: 16, depth: 2}, steps: 240, batch_size: 32, learning_rate: 0.004}
01_whitening: {calibration_samples: 256, theorem_samples: 64, held_out_tokens: 512}
"""
TIMES = ("time_ms",)  # columns that no two runs share


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with one small set, so that killed runs touch nothing of this one."""
    house = tmp_path_factory.mktemp("house")
    for name in ("lowrank", "notebooks", "pyproject.toml", "requirements.lock", "Snakefile", "Makefile"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, house / name)
    (house / "params").mkdir()
    (house / "params" / "small.yaml").write_text(SET)
    return house


def report(house: Path, outputs: str) -> subprocess.Popen[bytes]:
    """What `make report` does after the set-up, with the code of the copy."""
    environment = os.environ | {
        "LOWRANK_OUTPUTS": str(house / outputs),
        "LOWRANK_CACHE": str(house / f"{outputs}-cache"),
        "PYTHONPATH": str(house),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    command = ["make", "-o", ".venv/.ok", "report", "SETS=small", "CORES=1"]
    with (house / f"{outputs}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=house,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    found = {path.name: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    return {name: table.drop(columns=[c for c in TIMES if c in table]) for name, table in found.items()}


def test_killing_at_any_moment_gives_the_same_tables(house: Path) -> None:
    start = time.monotonic()
    undisturbed = report(house, "whole")
    assert undisturbed.wait(timeout=400) == 0, (house / "whole.log").read_text()[-3000:]
    took = time.monotonic() - start
    result = house / "killed" / "small" / "01_whitening"
    chance = random.Random(0)
    kills = 0
    for sent, share in ((signal.SIGKILL, 0.4), (signal.SIGTERM, 0.6), (signal.SIGKILL, 0.85)):
        run = report(house, "killed")
        try:
            run.wait(timeout=took * share * chance.uniform(0.7, 1.0))
        except subprocess.TimeoutExpired:
            kills += 1
            os.killpg(run.pid, sent)
            run.wait(timeout=60)
        left = {path.name for path in result.iterdir()} if result.exists() else set()
        assert not left or {"run.json", "claims.csv", "01_whitening.ipynb"} <= left  # never half a result
    assert kills >= 2
    assert report(house, "killed").wait(timeout=400) == 0, (house / "killed.log").read_text()[-3000:]
    expected, found = tables(house / "whole" / "small" / "01_whitening"), tables(result)
    assert expected.keys() == found.keys()
    assert len(expected) >= 8
    for name, table in expected.items():
        pd.testing.assert_frame_equal(found[name], table, check_exact=True, obj=name)

    stamp = (result / "run.json").stat().st_mtime_ns
    again = time.monotonic()
    assert report(house, "killed").wait(timeout=100) == 0
    assert (result / "run.json").stat().st_mtime_ns == stamp  # nothing to be done
    assert time.monotonic() - again < took / 2

    (house / "params" / "small.yaml").write_text(SET.replace("theorem_samples: 64", "theorem_samples: 65"))
    assert report(house, "killed").wait(timeout=400) == 0
    assert (result / "run.json").stat().st_mtime_ns != stamp  # one number changed: it was run again
