"""The report on a real Slurm, which `tests/cluster/run` starts: what is sent, what it gets, what a kill leaves, the tables."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from processes import copy_project, start_report

from lowrank.report.compare import compare_folders

SETS = "small small@seed=1"
RESOURCES = {"01_whitening": ("cpu=1,gres/gpu=0,mem=1500M", 5), "06_layer_selection": ("cpu=1,gres/gpu=1,mem=2000M", 7)}
SET = """resources: {memory_mb: 1500, minutes: 5, layer_selection: {memory_mb: 2000, gpus: 1, minutes: 7}}
common: {task: digits, task_options: {width: 16, depth: 2}, steps: 120, batch_size: 32, learning_rate: 0.004}
whitening: {calibration_samples: 256, theorem_samples: 64, held_out_tokens: 512}
layer_selection: {more_seeds: [], calibration_samples: 128, cases: 10, judged_cases: 3, evaluation_samples: 100}
"""


class House:
    """A copy of the project with one small set, and the reports that were begun in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = copy_project(folder)
        self.set_file = folder / "params" / "small.yaml"
        self.set_file.write_text(SET)
        self.runs: list[subprocess.Popen[bytes]] = []

    def report(self, outputs: str, sets: str = SETS, profile: str = "slurm") -> subprocess.Popen[bytes]:
        (self.folder / f"{outputs}.log").unlink(missing_ok=True)
        self.runs.append(start_report(self.folder, outputs, sets, profile=profile))
        return self.runs[-1]

    def ended(self, run: subprocess.Popen[bytes], outputs: str = "cluster") -> tuple[int, str]:
        """Exit status of a report, and what it printed."""
        status = run.wait(timeout=900)
        printed = (self.folder / f"{outputs}.log").read_text(encoding="utf8")
        print(printed)
        return status, printed


def jobs() -> pd.DataFrame:
    """What Slurm's accounting knows, a row per job: `comment` names the rule, the set and the notebook."""
    columns = ["jobid", "comment", "state", "alloctres", "timelimitraw", "elapsed"]
    command = ["sacct", "-X", "--noheader", "--parsable2", f"--format={','.join(columns)}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return pd.DataFrame([line.split("|") for line in printed.splitlines()], columns=columns)


def running(words: str) -> str:
    """The id of the job whose comment holds some words, once it has run for some seconds."""
    for _ in range(200):
        time.sleep(1)
        command = ["squeue", "--noheader", "--states=RUNNING", "--format=%i|%k|%M"]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            number, comment, took = line.split("|")
            if words in comment and took >= "0:08":
                return number
    raise AssertionError(f"no job with {words!r} has run")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("house"))
    yield house
    for run in house.runs:
        if run.poll() is None:  # a check has failed while it ran
            os.killpg(run.pid, signal.SIGKILL)


def test_a_killed_job_fails_the_report_and_the_others_finish(house: House) -> None:
    run = house.report("cluster")
    killed = running("06_layer_selection")
    subprocess.run(["scancel", killed], check=True)
    status, printed = house.ended(run)
    assert status != 0
    assert f"SLURM-job '{killed}' failed, SLURM status is: 'CANCELLED" in printed
    found = jobs()
    assert len(found) == 4
    assert sorted(found.state.str.split().str[0]) == ["CANCELLED", "COMPLETED", "COMPLETED", "COMPLETED"]
    assert len(list((house.folder / "cluster").glob("small*/*/run.json"))) == 3


def test_the_next_report_sends_only_what_is_missing(house: House) -> None:
    before = jobs()
    assert house.ended(house.report("cluster"))[0] == 0
    after = jobs()
    (sent,) = set(after.jobid) - set(before.jobid)
    (killed,) = before.comment[before.state.str.startswith("CANCELLED")]
    assert after.set_index("jobid").comment[sent] == killed
    assert house.ended(house.report("cluster"))[0] == 0
    assert len(jobs()) == len(after)  # nothing is left to do


def test_every_job_got_the_resources_of_its_set(house: House) -> None:
    print(jobs().to_string())
    for notebook, (resources, minutes) in RESOURCES.items():
        own = jobs()[lambda table, notebook=notebook: table.comment.str.contains(notebook)]
        assert len(own) >= 2
        for resource in resources.split(","):
            asked = [set(allocated.split(",")) for allocated in own.alloctres]
            assert all((resource in got) != resource.endswith("=0") for got in asked), own
        assert set(own.timelimitraw) == {str(minutes)}


def test_a_change_of_resources_runs_nothing_again(house: House) -> None:
    before = jobs()
    house.set_file.write_text(SET.replace("memory_mb: 1500, minutes: 5", "memory_mb: 1600, minutes: 6, cpus: 2"))
    assert house.ended(house.report("cluster"))[0] == 0
    assert len(jobs()) == len(before)
    house.set_file.write_text(SET)


def test_an_interrupt_cancels_what_was_sent(house: House) -> None:
    run = house.report("cluster", "small@seed=2")
    running("small@seed=2")
    os.killpg(run.pid, signal.SIGINT)
    assert house.ended(run)[0] != 0
    sent = jobs()[lambda table: table.comment.str.contains("small@seed=2")]
    assert len(sent) == 2
    assert sent.state.str.startswith("CANCELLED").all()


def test_the_tables_are_those_of_a_local_report(house: House) -> None:
    status, printed = house.ended(house.report("local", profile=""), "local")
    assert status == 0, printed
    found = compare_folders(house.folder / "local", house.folder / "cluster", tolerance=0)
    assert len(found.tables) > 16
    assert not found.unpublished
    assert found.lines() == []
