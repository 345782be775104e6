"""Execute notebooks with their defaults, and store them with outputs beside their sources.

Readers see these .ipynb files on the web, and nbval compares with them.
"""

from pathlib import Path

from lowrank.io.files import writing
from lowrank.report.folders import outputs_folder
from lowrank.report.parameters import NOTEBOOKS
from lowrank.report.run import execute


def refresh(name: str) -> Path:
    """Execute one notebook with its defaults and replace its .ipynb.

    **Arguments**

    - `name`: stem of the notebook.

    **Returns** the .ipynb file.

    **Raises**

    - `NotebookError`: the notebook failed; the old .ipynb stays.
    """
    import nbformat  # noqa: PLC0415

    growing = outputs_folder() / "logs" / "draft" / f"{name}.ipynb"
    growing.parent.mkdir(parents=True, exist_ok=True)
    notebook = execute(name, growing, outputs_folder(draft=True))
    for key in ("papermill", "language_info"):
        notebook.metadata.pop(key, None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):  # times of day
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags"):
            cell.metadata.pop("tags", None)
    path = NOTEBOOKS / f"{name}.ipynb"
    with writing(path) as partial:
        nbformat.write(notebook, partial)
    growing.unlink()
    return path
