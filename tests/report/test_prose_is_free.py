"""Results depend on code, not on words: what runs again after an edit, and what does not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import copy_project

from lowrank.io.dependencies import PACKAGE, hash_code, sources

NOTEBOOK = """# %% [markdown]
# # A question, and a sentence about it.

# %% tags=["parameters"]
set_name = "quick"
number = 3  # how many

# %%
import json
import os
from pathlib import Path

from lowrank.report.result_files import SIGNIFICANT_DIGITS

folder = Path(os.environ["LOWRANK_OUTPUTS"], set_name, "01_small")
folder.mkdir(parents=True)
(folder / "run.json").write_text(json.dumps(number))
"""
WORDS = {
    "a docstring of a module": ("lowrank/report/notebook.py", '"""', '"""More words. '),
    "a comment of the library": (
        "lowrank/report/result_files.py",
        "SIGNIFICANT_DIGITS = ",
        "# Why so many.\nSIGNIFICANT_DIGITS = ",
    ),
    "a sentence of a notebook": ("notebooks/01_small.py", "a sentence", "another sentence"),
    "a comment of a notebook": ("notebooks/01_small.py", "# how many", "# how few"),
}
CODE = {
    "a constant of the library": (
        "lowrank/report/result_files.py",
        "SIGNIFICANT_DIGITS = ",
        "SIGNIFICANT_DIGITS = 1 + ",
    ),
    "a value of a notebook": ("notebooks/01_small.py", "number = 3", "number = 4"),
    "a line of a notebook": ("notebooks/01_small.py", "dumps(number)", "dumps(number + 1)"),
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with one small notebook, whose result is there."""
    folder = copy_project(tmp_path_factory.mktemp("house"))
    for name in ("notebooks", "params"):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()
    (folder / "notebooks/01_small.py").write_text(NOTEBOOK, encoding="utf8")
    (folder / "params/quick.yaml").write_text("small: {}\n", encoding="utf8")
    snakemake(folder)
    assert (folder / "outputs/quick/01_small/run.json").exists()
    return folder


def snakemake(folder: Path, *words: str) -> str:
    """What the workflow says of the set `quick`."""
    command = [str(Path(sys.executable).with_name("snakemake")), "--cores", "1", "--config", "sets=quick", *words]
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LOWRANK_OUTPUTS": str(folder / "outputs"),
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def edit(folder: Path, change: tuple[str, str, str]) -> Path:
    path = folder / change[0]
    text = path.read_text(encoding="utf8")
    assert change[1] in text
    path.write_text(text.replace(change[1], change[2], 1), encoding="utf8")
    return path


@pytest.mark.parametrize("change", [*WORDS, *CODE])
def test_words_run_nothing_again_and_code_does(house: Path, change: str) -> None:
    name, *_ = what = (WORDS | CODE)[change]
    before = (house / name).read_text(encoding="utf8")
    try:
        path = edit(house, what)
        os.utime(path)
        plan = snakemake(house, "--dry-run")
    finally:
        (house / name).write_text(before, encoding="utf8")
    assert ("Nothing to be done" in plan) == (change in WORDS), plan


@pytest.mark.parametrize("change", [*WORDS, *CODE])
def test_the_hash_of_code_sees_code_alone(tmp_path: Path, change: str) -> None:
    name, *_ = what = (WORDS | CODE)[change]
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    if name.startswith("lowrank"):
        shutil.copy(PACKAGE.parent / name, path)
    else:
        path.write_text(NOTEBOOK, encoding="utf8")
    before = hash_code([path])
    edit(tmp_path, what)
    assert (hash_code([path]) == before) == (change in WORDS)


def test_the_hash_of_code_sees_names_and_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("x = 1\n")
    two.write_text("x = 1\n")
    assert len({hash_code(paths) for paths in ([one], [two], [one, two], [two, one])}) == 4
    assert hash_code(sources(PACKAGE / "report/notebook.py")) == hash_code(sources(PACKAGE / "report/notebook.py"))
