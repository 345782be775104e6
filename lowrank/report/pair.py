"""Executes notebooks with their defaults and stores them, outputs included, beside their sources.

`python -m lowrank.report.pair [NOTEBOOK ...]`, by default all: what readers see on the web and nbval compares with.
"""

import sys
from pathlib import Path

from lowrank.report.notebook import outputs_folder
from lowrank.report.parameters import NOTEBOOKS, notebook_names
from lowrank.report.run import execute, read_notebook


def refresh(name: str) -> Path:
    """Runs one notebook and replaces its .ipynb; the old one stays where the run fails."""
    import nbformat  # noqa: PLC0415

    growing = NOTEBOOKS / f".{name}.partial.ipynb"
    notebook = execute(read_notebook(name), growing, outputs_folder(), name)
    for key in ("papermill", "language_info"):
        notebook.metadata.pop(key, None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):  # times of day
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags"):
            cell.metadata.pop("tags", None)
    nbformat.write(notebook, growing)
    return growing.replace(NOTEBOOKS / f"{name}.ipynb")


if __name__ == "__main__":
    for notebook_name in sys.argv[1:] or notebook_names():
        print(refresh(notebook_name))
