"""Store notebooks with outputs beside their sources: the published run of the default set, or a run of the defaults.

Readers see these .ipynb files on the web, and nbval compares with them.
"""

from pathlib import Path
from typing import Any

from lowrank.io.dependencies import dump_code
from lowrank.io.files import writing
from lowrank.report.folders import outputs_folder, published_folder
from lowrank.report.parameters import NOTEBOOKS, read_defaults
from lowrank.report.run import execute, read_notebook

OWN = ("papermill", "execution")  # metadata of a run: times of day


def refresh(name: str) -> Path:
    """Replace the .ipynb of one notebook by its published run, or execute it if its source has changed since.

    **Arguments**

    - `name`: stem of the notebook.

    **Returns** the .ipynb file.

    **Raises**

    - `NotebookError`: the notebook failed; the old .ipynb stays.
    """
    import nbformat  # noqa: PLC0415

    growing = outputs_folder() / "logs" / "draft" / f"{name}.ipynb"
    notebook = _find_published(name)
    if notebook is None:
        growing.parent.mkdir(parents=True, exist_ok=True)
        notebook = execute(name, growing, outputs_folder(draft=True))
    for key in ("papermill", "language_info"):
        notebook.metadata.pop(key, None)
    for cell in notebook.cells:
        for key in OWN:
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags"):
            cell.metadata.pop("tags", None)
    path = NOTEBOOKS / f"{name}.ipynb"
    with writing(path) as partial:
        nbformat.write(notebook, partial)
    growing.unlink(missing_ok=True)
    return path


def _find_published(name: str) -> Any:
    """Return the source with the outputs of the published run of the set that has its defaults, None without one of this code."""
    import nbformat  # noqa: PLC0415

    path = published_folder() / read_defaults(name)["set_name"] / name / f"{name}.ipynb"
    if not path.is_file():
        return None
    run, notebook = nbformat.read(path, 4), read_notebook(name)
    done, wanted = ([cell for cell in one.cells if cell.cell_type == "code"] for one in (run, notebook))
    done = [cell for cell in done if "injected-parameters" not in cell.metadata.get("tags", [])]
    first = 0
    for ran in done:  # a cell of the run may be several of the source by now
        code, last = dump_code(ran.source), first + 1
        while last < len(wanted) and dump_code("\n".join(cell.source for cell in wanted[first:last])) != code:
            last += 1
        if dump_code("\n".join(cell.source for cell in wanted[first:last])) != code:
            return None
        wanted[last - 1].outputs = ran.outputs
        first = last
    if first < len(wanted):
        return None
    for count, cell in enumerate(wanted, start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    if "widgets" in run.metadata:
        notebook.metadata["widgets"] = run.metadata["widgets"]
    return notebook
