"""Guards of the paired notebooks: same source on both sides, executed in order, and the conventions of a notebook."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

from lowrank.report.parameters import NOTEBOOKS, notebook_names, read_defaults
from lowrank.report.run import read_notebook

LONGEST_CELL, LARGEST = 40, 400_000


@pytest.mark.parametrize("name", notebook_names())
class TestPair:
    def test_both_sides_have_the_same_cells(self, name: str) -> None:
        source, stored = read_notebook(name), nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
        assert [(c.cell_type, c.source) for c in stored.cells] == [(c.cell_type, c.source) for c in source.cells]
        assert [c.id for c in stored.cells] == [c.id for c in source.cells]
        tags = [[set(c.metadata.get("tags", [])) for c in side.cells] for side in (stored, source)]
        assert tags[0] == tags[1]

    def test_it_was_executed_from_a_clean_kernel(self, name: str) -> None:
        cells = [c for c in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if c.cell_type == "code"]
        assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
        assert not [o for c in cells for o in c.outputs if o.output_type == "error"]

    def test_checked_cells_have_text_to_check(self, name: str) -> None:
        checked = [
            c
            for c in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
            if "nbval-check-output" in c.metadata.get("tags", [])
        ]
        assert len(checked) >= 3
        assert all(any(o.output_type == "stream" for o in c.outputs) for c in checked)

    def test_conventions(self, name: str) -> None:
        notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
        opening, ending = notebook.cells[0].source, notebook.cells[-2].source
        assert opening.startswith(f"# {name[:2]} ")
        assert len(opening.split()) <= 150
        assert ending.startswith("## What this shows")
        assert "report.finish()" in notebook.cells[-1].source
        assert "set_name" in read_defaults(name)
        for cell in notebook.cells:
            assert cell.source.count("\n") < LONGEST_CELL
            assert not re.search(r"sys\.path|%pip|autoreload", cell.source)

    def test_it_is_light(self, name: str) -> None:
        assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < LARGEST

    def test_jupyter_sees_one_notebook_with_two_sides(self, name: str) -> None:
        command = [str(Path(sys.executable).with_name("jupytext")), "--paired-paths", str(NOTEBOOKS / f"{name}.py")]
        paths = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        assert str(NOTEBOOKS / f"{name}.ipynb") in paths


@pytest.mark.parametrize(
    ("printed", "stored", "passes"),
    [
        ("supported: a beats b", "supported: a beats b", True),
        ("inconclusive: a beats b", "supported: a beats b", True),
        ("refuted: a beats b", "inconclusive: a beats b", True),
        ("refuted: a beats b", "supported: a beats b", False),
        ("inconclusive: a beats b", "supported: a beats c", False),
        ("4 rows", "3 rows", False),
        ("loss 0.1234", "loss 0.1235", True),
        ("accuracy 0.513", "accuracy 0.973", False),
    ],
)
def test_nbval_compares_verdicts_as_the_report_does(tmp_path: Path, printed: str, stored: str, passes: bool) -> None:
    output = nbformat.v4.new_output("stream", name="stdout", text=f"{stored}\n")
    cell = nbformat.v4.new_code_cell(f"print({printed!r})", outputs=[output], execution_count=1)
    cell.metadata.tags = ["nbval-check-output"]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "one.ipynb")
    shutil.copy(NOTEBOOKS / "conftest.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if passes else 1), done.stdout
    assert ("1 passed" if passes else "1 failed") in done.stdout
