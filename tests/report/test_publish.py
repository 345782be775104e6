"""Publishing: whole folders or nothing, and only what came from a commit."""

import json
import shutil
from pathlib import Path

import pytest

from lowrank.report.__main__ import main


def write(folder: Path, text: str, **about: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"git_commit": "abc", "git_dirty": False} | about))
    (folder / "table.csv").write_text(text)
    return folder


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of two sets and a variant; one result of an older run is published, with a table that is no longer written."""
    monkeypatch.delenv("LOWRANK_OUTPUTS", raising=False)
    monkeypatch.setattr("lowrank.report.folders.ROOT", tmp_path)
    published = tmp_path / "outputs"
    (write(published / "docs-bert" / "01_whitening", "old") / "gone.csv").write_text("old")
    for name in (
        "docs-bert/01_whitening",
        "docs-bert/02_prehab",
        "docs-llama/01_whitening",
        "docs-bert@seed=1/01_whitening",
    ):
        write(published / "run" / name, "new")
    (published / "run" / "logs" / "docs-bert").mkdir(parents=True)
    return published


def contents(published: Path) -> dict[str, str]:
    """Every published file with its text."""
    files = [path for path in published.rglob("*") if path.is_file() and "run" not in path.relative_to(published).parts]
    return {path.relative_to(published).as_posix(): path.read_text() for path in files if path.name != "run.json"}


def test_whole_folders_take_the_place_of_published_ones(house, capsys) -> None:
    for stale in (house / ".partial" / "docs-bert", house / "docs-bert" / ".01_whitening.partial"):
        stale.mkdir(parents=True)
    assert main(["publish"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    names = ("docs-bert/01_whitening", "docs-bert/02_prehab", "docs-llama/01_whitening")  # no variant, no logs
    assert contents(house) == {f"{name}/table.csv": "new" for name in names}
    assert {path.name for path in house.iterdir()} == {"docs-bert", "docs-llama", "run"}
    assert {path.name for path in (house / "docs-bert").iterdir()} == {"01_whitening", "02_prehab"}


def test_only_what_is_named_is_published(house) -> None:
    assert main(["publish", "docs-bert@seed=1"]) == 0
    assert contents(house)["docs-bert@seed=1/01_whitening/table.csv"] == "new"
    assert contents(house)["docs-bert/01_whitening/table.csv"] == "old"


@pytest.mark.parametrize("about", [{"git_dirty": True}, {"git_commit": None}])
def test_results_that_no_commit_can_repeat_are_refused_and_nothing_is_written(house, capsys, about) -> None:
    before, result = contents(house), house / "run" / "docs-llama" / "01_whitening"
    shutil.rmtree(result)
    write(result, "new", **about)
    assert main(["publish"]) == 2
    message = "error: results must come from a commit without changes, got docs-llama/01_whitening.\n"
    assert capsys.readouterr().err == message
    assert contents(house) == before


def test_a_copy_that_fails_leaves_the_published_result(house, monkeypatch, capsys) -> None:
    def fail(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "table.csv").write_text("ne")
        raise OSError("No space left on device")

    before = contents(house)
    monkeypatch.setattr("lowrank.report.publish.shutil.copytree", fail)
    assert main(["publish"]) == 2
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert contents(house) == before


def test_sets_without_results_are_named(house, capsys) -> None:
    assert main(["publish", "docs-bert", "digits-vit"]) == 2
    assert "run must have results of digits-vit: run `make report` first." in capsys.readouterr().err
    assert main(["publish", "no-such-set"]) == 2
    assert "error: `set` must be one of" in capsys.readouterr().err
    shutil.rmtree(house / "run")
    assert main(["publish"]) == 2
    assert "run must have results of any set: run `make report` first." in capsys.readouterr().err
