"""The runner: whole results or none, clear errors, exit statuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from processes import run_mounted

from lowrank.io.checks import SPLITS
from lowrank.io.dependencies import ROOT
from lowrank.report import parameters as module
from lowrank.report.__main__ import main
from lowrank.report.folders import published_folder
from lowrank.report.notebook import hash_choices
from lowrank.report.parameters import read_parameters, set_names

NOTEBOOK = """# %% tags=["parameters"]
set_name = "quick"
number = 3

# %%
import os
from pathlib import Path

folder = Path(os.environ["LOWRANK_OUTPUTS"]) / set_name / "01_small"
folder.mkdir(parents=True)
(folder / "run.json").write_text(str(number))
print(Path(os.environ["LOWRANK_OUTPUTS"]))

# %%
assert number != 13, "unlucky"
print("done with", number)
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: Path) -> Path:
    monkeypatch.setattr(module, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(module, "SETS", tmp_path)
    (tmp_path / "01_small.py").write_text(NOTEBOOK)
    (tmp_path / "quick.yaml").write_text("small: {}\n")
    return tmp_path


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    }


def test_results_take_their_place_whole_and_failures_leave_them(house, outputs, capsys) -> None:
    assert main(["run", "quick", "01_small"]) == 0
    results = {"quick/01_small/run.json", "quick/01_small/01_small.ipynb", "logs/quick/01_small.log"}
    assert files(outputs) == results
    notebook = nbformat.read(outputs / "quick/01_small/01_small.ipynb", 4)
    assert [cell.id for cell in notebook.cells if "injected-parameters" not in cell.metadata.tags] == [
        f"01_small-{i:03d}" for i in range(3)
    ]

    assert notebook.metadata.papermill.input_path == "notebooks/01_small.py"
    assert notebook.metadata.papermill.output_path == "quick/01_small/01_small.ipynb"
    assert str(house) not in (outputs / "quick/01_small/01_small.ipynb").read_text()

    (house / "quick.yaml").write_text("small: {number: 13}\n")
    assert main(["run", "quick", "01_small"]) == 1
    error = capsys.readouterr().err
    assert "error: quick/01_small failed: AssertionError: unlucky (see " in error
    failed = outputs / "logs/quick/01_small.ipynb"
    assert str(failed) in error
    assert "unlucky" in failed.read_text()  # the traceback
    assert (outputs / "quick/01_small/run.json").read_text() == "3"  # the former result, whole

    (house / "quick.yaml").write_text("small: {number: 4}\n")
    assert main(["run", "quick", "01_small"]) == 0
    assert (outputs / "quick/01_small/run.json").read_text() == "4"
    assert files(outputs) == results


@pytest.mark.parametrize(
    ("arguments", "set_file", "words"),
    [
        (["none", "01_small"], None, r"error: `set` must be one of ['quick'], got 'none'."),
        (["quick", "02_none"], None, r"error: `notebook` must be one of ['01_small'], got '02_none'."),
        (["quick", "01_small"], "small: {nubmer: 1}", "must be among ['number', 'set_name'], got ['nubmer']"),
        (
            ["quick", "01_small"],
            "small: {number: '1'}",
            "`number` of '01_small' must be of type int (as 3), got '1'",
        ),
        (["quick", "01_small"], "small: [", "must be YAML"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(house, outputs, capsys, arguments, set_file, words) -> None:
    if set_file:
        (house / "quick.yaml").write_text(set_file)
    assert main(["run", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not outputs.exists()


@pytest.mark.parametrize("where", ["/proc/lowrank", "a file"])
def test_outputs_that_cannot_be_written_are_named(house, monkeypatch, capsys, where) -> None:
    if where == "a file":
        where = str(house / "quick.yaml")
    elif not Path("/proc").is_dir():
        pytest.skip("no /proc, which no one can write to, on this system")
    monkeypatch.setenv("LOWRANK_OUTPUTS", where)
    assert main(["run", "quick", "01_small"]) == 2
    assert "error: `LOWRANK_OUTPUTS` must be a writable folder: " in capsys.readouterr().err


def test_the_command_line_itself(tmp_path: Path) -> None:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lowrank.report", "run", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert call().returncode == 2
    bad = call("digits-vit", "99_none")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: `notebook` must be one of ['01_whitening'")
    assert bad.stderr.count("\n") == 1  # no traceback


def snakemake(*words: str, outputs: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("snakemake")), "--cores", "1", "--nolock", *words]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "LOWRANK_OUTPUTS": str(outputs),
        "HOME": str(outputs),
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_workflow_names_bad_sets(tmp_path: Path) -> None:
    done = snakemake("--config", "sets=no-such-set", outputs=tmp_path)
    assert done.returncode != 0
    assert f"error: `set` must be one of {set_names()}, got 'no-such-set'" in done.stderr + done.stdout


def test_the_workflow_plans_one_job_per_notebook_and_set(tmp_path: Path) -> None:
    done = snakemake("--dry-run", "--config", "sets=digits-vit docs-bert", outputs=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "digits-vit-01_whitening" in done.stdout + done.stderr
    assert "docs-bert-01_whitening" in done.stdout + done.stderr
    assert "docs-llama" not in done.stdout + done.stderr


@pytest.mark.parametrize("where", [[], ["--profile", "profiles/slurm"]], ids=["here", "on Slurm"])
def test_the_workflow_asks_for_the_resources_of_the_set(where: list[str], tmp_path: Path) -> None:
    done = snakemake("--dry-run", *where, "--config", "sets=imagenet-vit", outputs=tmp_path)
    assert done.returncode == 0, done.stderr
    planned = re.findall(r"notebook=(\d\d)_.*\n(?:.*\n)*?\s+resources: (.*)", done.stdout + done.stderr)
    assert planned
    for number, resources in planned:
        assert {"gpu=1", "mem_mb=64000", f"runtime={4320 if number == '04' else 480}"} <= set(resources.split(", "))


def test_an_unknown_profile_is_named() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not there")
    done = subprocess.run(["make", "report", "PROFILE=sulrm"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "`PROFILE` must be empty or one of [slurm], got 'sulrm'" in done.stderr


def test_a_variant_has_a_folder_of_its_own(house, outputs) -> None:
    assert main(["run", "quick", "01_small"]) == 0
    assert main(["run", "quick@number=4", "01_small"]) == 0
    assert (outputs / "quick/01_small/run.json").read_text() == "3"
    assert (outputs / "quick@number=4/01_small/run.json").read_text() == "4"


def test_a_run_leaves_the_working_tree_clean(house, outputs, monkeypatch) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *identity, *words], cwd=house, capture_output=True, text=True, check=True).stdout

    monkeypatch.delenv("LOWRANK_OUTPUTS")
    monkeypatch.setattr("lowrank.report.folders.ROOT", house)
    shutil.copy(ROOT / ".gitignore", house)
    published = house / "outputs" / "quick" / "01_small" / "run.json"
    published.parent.mkdir(parents=True)
    published.write_text("published")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    assert main(["run", "quick", "01_small"]) == 0
    (house / "quick.yaml").write_text("small: {number: 13}\n")
    assert main(["run", "quick", "01_small"]) == 1  # its log and notebook stay behind
    (house / "quick.yaml").write_text("small: {}\n")
    assert (house / "outputs/run/quick/01_small/run.json").read_text() == "3"
    assert published.read_text() == "published"
    assert git("status", "--porcelain") == ""


def test_committed_results_came_from_a_clean_tree() -> None:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so nothing is committed")
    committed = set(git("ls-files", "outputs").split())
    runs = [path for path in committed if path.count("/") == 3 and path.endswith("/run.json")]
    assert runs
    if (bench := "outputs/bench/run.json") in committed:  # one entry per table
        entries = json.loads(git("show", f"HEAD:{bench}"))
        assert [name for name, entry in entries.items() if entry["git_dirty"] or not entry["git_commit"]] == []
    for path in runs:
        about, folder = json.loads(git("show", f"HEAD:{path}")), path.removesuffix("/run.json")
        assert about["git_commit"], path
        assert about["git_dirty"] is False, path
        assert {f"{folder}/claims.csv", f"{folder}/{about['notebook']}.ipynb"} <= committed


def test_published_tables_belong_to_the_present_choices_and_say_their_split() -> None:
    runs = [path for path in published_folder().glob("*/*/run.json") if "frozen" in json.loads(path.read_text())]
    for path in runs:
        about = json.loads(path.read_text())
        parameters = read_parameters(about["set"], about["notebook"])
        # parameters or code of the notebook that changed after test was read would be chosen on test
        assert about["frozen"] in (None, hash_choices(about["notebook"], parameters)), path
        for name, declared in about["tables"].items():
            table = pd.read_csv(path.with_name(f"{name}.csv"))
            named = set(table["split"]) if "split" in table else set()
            assert named <= ({declared["split"]} if declared["split"] else set(SPLITS)), (path, name)
            assert declared["split"] is None or "split" in table, (path, name)
            assert about["frozen"] or "test" not in named, (path, name)


COMMAND = """
import sys
from pathlib import Path
from lowrank.report import parameters
from lowrank.report.__main__ import main

parameters.NOTEBOOKS = parameters.SETS = Path(sys.argv[1])
sys.exit(main(["run", "quick", "01_small"]))
"""
LARGE = 'number == 3 or (folder / "large.csv").write_text("0" * 400_000)'


@pytest.mark.parametrize("left", [350, 0])  # kB: not enough for what a cell writes, or for anything
def test_a_full_disk_is_named_and_leaves_the_former_result(tmp_path: Path, left: int) -> None:
    (tmp_path / "01_small.py").write_text(NOTEBOOK + LARGE)
    (tmp_path / "quick.yaml").write_text("small: {}\n")
    (script := tmp_path / "command.py").write_text(COMMAND)
    (folder := tmp_path / "disk").mkdir()
    result = f"{folder}/outputs/quick/01_small"
    commands = f"""
        mount -t tmpfs -o size=400k tmpfs {folder}
        python {script} {tmp_path}
        md5sum {result}/* > {tmp_path}/before
        echo 'small: {{number: 4}}' > {tmp_path}/quick.yaml
        dd if=/dev/zero of={folder}/other bs=1k count=$(($(df --output=avail {folder} | tail -1) - {left})) status=none
        python {script} {tmp_path} || echo "status $?"
        md5sum --check --quiet {tmp_path}/before
        rm {folder}/other
        test ! -e {folder}/outputs/.partial/quick-01_small
        sed -i s/400_000/4/ {tmp_path}/01_small.py
        python {script} {tmp_path}
        cat {result}/run.json
    """
    done = run_mounted(commands, LOWRANK_OUTPUTS=f"{folder}/outputs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [result, "status", "1", result, "4"]
    assert "error: quick/01_small failed: [Errno 28] No space left on device (see " in done.stderr
    assert "Traceback" not in done.stderr
