"""`make report` killed at random moments, twice at once, or on a damaged cache leaves the tables of an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import copy_project, start_report

from lowrank.report.compare import Comparison, compare_folders

SET = """common: {task: digits, task_options: {width: 16, depth: 2}, steps: 240, batch_size: 32, learning_rate: 0.004}
whitening: {calibration_samples: 256, theorem_samples: 64, held_out_tokens: 512}
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with one small set."""
    house = copy_project(tmp_path_factory.mktemp("house"))
    (house / "params" / "small.yaml").write_text(SET)
    return house


def compared(house: Path, name: str) -> Comparison:
    """A folder of results with that of the undisturbed run; all that counts must be equal."""
    return compare_folders(house / name, house / "whole", tolerance=0)


def report(house: Path, outputs: str) -> subprocess.Popen[bytes]:
    return start_report(house, outputs, "small")


@pytest.fixture(scope="module")
def undisturbed(house: Path) -> float:
    """The folder `whole` is there; the seconds it took."""
    start = time.monotonic()
    assert report(house, "whole").wait(timeout=400) == 0, (house / "whole.log").read_text()[-3000:]
    return time.monotonic() - start


def test_killing_at_any_moment_gives_the_same_tables(house: Path, undisturbed: float) -> None:
    result = house / "killed" / "small" / "01_whitening"
    chance = random.Random(0)
    kills = 0
    for sent, share in ((signal.SIGKILL, 0.3), (signal.SIGTERM, 0.5), (signal.SIGKILL, 0.7)):
        run = report(house, "killed")
        try:
            run.wait(timeout=undisturbed * share * chance.uniform(0.7, 1.0))
        except subprocess.TimeoutExpired:
            kills += 1
            os.killpg(run.pid, sent)
            run.wait(timeout=60)
        left = {path.name for path in result.iterdir()} if result.exists() else set()
        assert not left or {"run.json", "claims.csv", "01_whitening.ipynb"} <= left  # never half a result
    assert kills >= 2
    assert report(house, "killed").wait(timeout=400) == 0, (house / "killed.log").read_text()[-3000:]
    found = compared(house, "killed")
    assert len(found.tables) >= 7
    assert not found.unpublished
    assert found.lines() == []

    stamp = (result / "run.json").stat().st_mtime_ns
    again = time.monotonic()
    assert report(house, "killed").wait(timeout=100) == 0
    assert (result / "run.json").stat().st_mtime_ns == stamp  # nothing to be done
    assert time.monotonic() - again < undisturbed / 2

    (house / "params" / "small.yaml").write_text(SET.replace("theorem_samples: 64", "theorem_samples: 65"))
    before = {path.name: path.read_bytes() for path in result.iterdir()}
    run = report(house, "killed")
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=undisturbed * 0.3)
    for _ in range(100):  # make sends a second one itself, and each may interrupt the handler of the one before
        os.killpg(run.pid, signal.SIGTERM)  # which lets Snakemake delete what an unfinished job was to write
        time.sleep(0.002)
    run.wait(timeout=60)
    assert {path.name: path.read_bytes() for path in result.iterdir()} == before
    assert report(house, "killed").wait(timeout=400) == 0
    assert (result / "run.json").stat().st_mtime_ns != stamp  # one number changed: it was run again

    shutil.rmtree(result)
    assert report(house, "killed").wait(timeout=400) == 0
    assert (result / "run.json").exists()  # what was lost is made again


def test_two_reports_at_once_give_the_same_tables(house: Path, undisturbed: float) -> None:
    (house / "params" / "small.yaml").write_text(SET)
    runs = [report(house, "twice") for _ in range(2)]
    assert [run.wait(timeout=400) for run in runs] == [0, 0], (house / "twice.log").read_text()[-3000:]
    assert compared(house, "twice").lines() == []


def test_a_damaged_cache_is_named_and_gives_the_same_tables(house: Path, undisturbed: float) -> None:
    (house / "params" / "small.yaml").write_text(SET)
    entries = list(house.glob("whole-cache/*/*/*.safetensors"))
    assert len(entries) >= 2  # the baseline, and statistics of its layers
    for path in entries:
        with path.open("r+b") as content:
            content.seek(-1, os.SEEK_END)
            last = content.read(1)[0]
            content.seek(-1, os.SEEK_END)
            content.write(bytes([last ^ 1]))
    shutil.copytree(house / "whole", house / "again")
    shutil.rmtree(house / "again" / ".done")
    (house / "whole-cache").rename(house / "again-cache")
    assert report(house, "again").wait(timeout=400) == 0, (house / "again.log").read_text()[-3000:]
    log = (house / "again" / "logs" / "small" / "01_whitening.log").read_text()
    assert all(
        f"{path.parent.name} is damaged ({path.name} differs from the file that was built)" in log for path in entries
    )
    assert compared(house, "again").lines() == []
