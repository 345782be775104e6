"""The command line: help at once and without torch, errors in one line, and nothing written by `--help`."""

import subprocess
import sys
import time

import pytest

from lowrank.io.dependencies import ROOT
from lowrank.report import pair, readme
from lowrank.report.__main__ import main

COMMANDS = ("run", "pair", "compare", "publish", "readme", "site")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_and_writes_nothing(command: str) -> None:
    pages = {page: page.stat().st_mtime_ns for page in readme.PAGES}
    code = f"""
import sys
from lowrank.report.__main__ import main
try:
    main([{command!r}, "--help"])
except SystemExit as end:
    heavy = {{"torch", "pandas", "matplotlib", "yaml"}} & set(sys.modules)
    sys.exit(f"loaded {{heavy}}" if heavy else end.code)
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert time.monotonic() - start < 5  # about 0.1 s on an idle machine
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m lowrank.report {command} ")
    assert {page: page.stat().st_mtime_ns for page in readme.PAGES} == pages


def test_a_run_needs_no_torch_before_the_kernel_starts() -> None:
    code = "import sys, lowrank.report.run, lowrank.report.compare, lowrank.report.publish; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("words", [[], ["--help"], ["nothing"]])
def test_all_commands_are_listed(words: list[str]) -> None:
    command = [sys.executable, "-m", "lowrank.report", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if words == ["--help"] else 2)
    if words:
        assert all(name in done.stdout + done.stderr for name in COMMANDS)


def test_a_wrong_notebook_is_named_before_any_runs(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(pair, "refresh", pytest.fail)
    assert main(["pair", "01_whitening", "99_none"]) == 2
    assert capsys.readouterr().err.startswith("error: `notebook` must be one of ['01_whitening'")


def test_a_page_without_a_block_is_named_and_no_page_is_written(tmp_path, monkeypatch, capsys) -> None:
    whole, lacking = tmp_path / "whole.md", tmp_path / "lacking.md"
    whole.write_text("<!-- a -->\nold\n<!-- /a -->\n")
    lacking.write_text("nothing\n")
    monkeypatch.setattr(readme, "PAGES", {whole: {"a": lambda: "new"}, lacking: {"b": lambda: "new"}})
    assert main(["readme"]) == 2
    assert capsys.readouterr().err == "error: lacking.md must have a block <!-- b --> ... <!-- /b -->.\n"
    assert "old" in whole.read_text()
    lacking.write_text("<!-- b -->\n<!-- /b -->\n")
    assert main(["readme"]) == 0
    assert whole.read_text() == "<!-- a -->\nnew\n<!-- /a -->\n"
    assert {path.name for path in tmp_path.iterdir()} == {"whole.md", "lacking.md"}


@pytest.mark.parametrize(
    "words",
    [
        ["run", "digits-vit@steps", "01_whitening"],
        ["run", "digits-vit@steps=a", "01_whitening"],
        ["run", "nowhere", "01_whitening"],
        ["run", "../params/digits-vit", "01_whitening"],
        ["pair", "../notebooks/01_whitening"],
        ["compare", "README.md"],
        ["compare", "outputs", "README.md"],
        ["publish", "nowhere"],
        ["publish", "digits-vit"],
        ["site"],
        ["site", "nowhere"],
        ["site", "digits-vit@width=1"],
        ["site", ""],
    ],
    ids=" ".join,
)
def test_bad_words_end_in_one_line_that_names_them(words: list[str], tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("LOWRANK_OUTPUTS", str(tmp_path / "runs"))
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert any(word in said.err for word in words[1:] or ["`sets`"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys) -> None:
    (file := tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LOWRANK_OUTPUTS", str(file))
    for words in (["run", "digits-vit", "01_whitening"], ["pair", "01_whitening"]):
        assert main(words) == 2
        assert str(file) in capsys.readouterr().err
    assert file.read_text() == "no folder"


def test_results_that_lack_what_a_block_shows_are_named(tmp_path, monkeypatch, capsys) -> None:
    (page := tmp_path / "page.md").write_text("<!-- a -->\nold\n<!-- /a -->\n")
    monkeypatch.setattr(readme, "PAGES", {page: {"a": lambda: {}["loss"]}})
    assert main(["readme"]) == 2
    assert "outputs must have what 'a' of page.md shows, and lacks KeyError: 'loss'" in capsys.readouterr().err
    assert "old" in page.read_text()
