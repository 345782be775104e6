"""Executed notebooks name no folder of the machine they ran on."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from lowrank.io.dependencies import ROOT
from lowrank.report.portable import make_portable, shorten_paths


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("HF_HOME", "/data/hf")
    monkeypatch.delenv("LOWRANK_CACHE", raising=False)
    monkeypatch.setenv("LOWRANK_OUTPUTS", "/scratch/me")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"{ROOT}/lowrank/io/hub.py:3: Warning", "lowrank/io/hub.py:3: Warning"),
        (f"in {ROOT}, or {ROOT}-old", f"in ., or {ROOT}-old"),
        ("data in /data/hf/datasets/a", "data in $HF_HOME/datasets/a"),
        ("/home/me/.cache and /home/menu and /mnt/home/me", "~/.cache and /home/menu and /mnt/home/me"),
        ("wrote /scratch/me/a.csv", "wrote $LOWRANK_OUTPUTS/a.csv"),
        ("/tmp/ipykernel_48/22.py:4: FewTokensWarning", "<cell>:4: FewTokensWarning"),
        ("a / b", "a / b"),
    ],
)
def test_folders_are_shortened(machine: None, text: str, shown: str) -> None:
    assert shorten_paths(text) == shown


def test_the_root_as_home_folder_changes_nothing(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert shorten_paths("a / b and /etc") == "a / b and /etc"


def test_metadata_and_printed_text_are_portable(machine: None) -> None:
    path = f"{ROOT}/lowrank/a.py"
    outputs = [
        new_output("stream", name="stderr", text=path),
        new_output("execute_result", data={"text/plain": path, "text/html": "<b>1</b>"}),
        new_output("display_data", data={"image/png": "abcd"}),
    ]
    notebook = new_notebook(cells=[new_code_cell("1", outputs=outputs)])
    notebook.metadata["papermill"] = {"input_path": {"cells": []}, "output_path": "/scratch/a.ipynb", "version": "2"}
    make_portable(notebook, "notebooks/01_small.py", "quick/01_small/01_small.ipynb")
    assert notebook.metadata["papermill"] == {
        "input_path": "notebooks/01_small.py",
        "output_path": "quick/01_small/01_small.ipynb",
        "version": "2",
    }
    assert str(Path(ROOT)) not in nbformat.writes(notebook)
    assert notebook.cells[0].outputs[0].text == "lowrank/a.py"
