"""nbval sees numbers: a stored figure that was changed, another seed, and a library that computes something else."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from lowrank.io.dependencies import ROOT
from lowrank.report.parameters import NOTEBOOKS, read_defaults
from lowrank.report.run import read_notebook

NAME = "01_whitening"
QUICK = dict(calibration_samples=256, theorem_samples=32, held_out_tokens=512, tokens_per_dimension=[0.5, 5], repeats=1)
SCALED = """
import lowrank.factorization.spectra as spectra

exact = spectra.effective_rank
spectra.effective_rank = lambda values: 0.9 * exact(values)
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick form of notebook 01, executed, beside the rules of comparison."""
    folder = tmp_path_factory.mktemp("nbval")
    (folder / "conftest.py").write_text((NOTEBOOKS / "conftest.py").read_text(encoding="utf8"), encoding="utf8")
    source = read_notebook(NAME)
    for cell in source.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\n" + "\n".join(f"{key} = {value}" for key, value in QUICK.items())
    nbformat.write(source, folder / "source.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_OUTPUTS", str(folder / "outputs"))
        patch.setenv("LOWRANK_CACHE", str(folder / "cache"))
        out = folder / f"{NAME}.ipynb"
        papermill.execute_notebook(folder / "source.ipynb", out, kernel_name="python3", progress_bar=False)
    (folder / "source.ipynb").unlink()
    return folder


def check(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
    cache = {"LOWRANK_OUTPUTS": str(folder / "outputs"), "LOWRANK_CACHE": str(folder / "cache")}
    own = os.environ | cache | environment
    return subprocess.run([*command, folder], cwd=folder, env=own, capture_output=True, text=True, check=False)


def planted(stored: Path, change) -> Path:
    """A copy of the executed notebook with something changed."""
    folder = stored / "planted"
    folder.mkdir(exist_ok=True)
    (folder / "conftest.py").write_text((stored / "conftest.py").read_text(encoding="utf8"), encoding="utf8")
    notebook = nbformat.read(stored / f"{NAME}.ipynb", 4)
    change(notebook)
    nbformat.write(notebook, folder / f"{NAME}.ipynb")
    return folder


def test_nothing_changed_is_green(stored: Path) -> None:
    assert (done := check(stored)).returncode == 0, done.stdout


def test_a_stored_number_that_was_changed_is_red(stored: Path) -> None:
    def change(notebook) -> None:
        cells = [cell for cell in notebook.cells if 'report.reading("output_error_by_rank")' in cell.source]
        (output,) = [output for output in cells[0].outputs if output.output_type == "stream"]
        before = output.text
        output.text = output.text.replace("error is ", "error is 9")
        assert output.text != before

    assert (done := check(planted(stored, change))).returncode == 1, done.stdout


def test_another_seed_is_red(stored: Path) -> None:
    def change(notebook) -> None:
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source += "\nseed = 1"

    assert read_defaults(NAME)["seed"] == 0
    assert (done := check(planted(stored, change))).returncode == 1, done.stdout


def test_a_library_that_computes_a_tenth_less_is_red(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SCALED, encoding="utf8")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert (done := check(stored, PYTHONPATH=path)).returncode == 1, done.stdout
