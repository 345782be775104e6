"""Execute one notebook with one parameter set, through papermill.

The notebook runs in a staging folder beside the results, and replaces the old result only after it has run whole. A notebook
that fails leaves itself with its traceback, and its log, in `logs/` of that folder, and the old result as it was.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from lowrank.report.errors import NotebookError
from lowrank.report.folders import outputs_folder
from lowrank.report.parameters import notebook_path, read_parameters
from lowrank.report.portable import make_portable
from lowrank.report.progress import showing_sections


def read_notebook(name: str) -> Any:
    """Read the source of a notebook as a notebook object, with the same cell ids every time."""
    import jupytext  # noqa: PLC0415

    notebook = jupytext.read(notebook_path(name))
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{name[:40]}-{number:03d}"
        cell.metadata.setdefault("tags", [])  # papermill asks every cell for them
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (lowrank)", "language": "python"}
    return notebook


@contextmanager
def _outputs_at(folder: Path) -> Iterator[None]:
    """Set `LOWRANK_OUTPUTS` for the kernel, which inherits the environment."""
    before = os.environ.get("LOWRANK_OUTPUTS")
    os.environ["LOWRANK_OUTPUTS"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("LOWRANK_OUTPUTS")
        if before is not None:
            os.environ["LOWRANK_OUTPUTS"] = before


def execute(name: str, growing: Path, outputs: Path, values: dict[str, Any] | None = None) -> Any:
    """Execute a notebook and write it, cell by cell, while it runs.

    **Arguments**

    - `name`: stem of the notebook.
    - `growing`: the .ipynb file that is written; it ends without absolute paths.
    - `outputs`: the folder that receives the results of the notebook.
    - `values`: parameters by name. Default None: the defaults of the notebook.

    **Returns** the executed notebook object.

    **Raises**

    - `NotebookError`: a cell failed or the kernel died; `growing` has the notebook so far.
    """
    import nbformat  # noqa: PLC0415
    import papermill  # noqa: PLC0415

    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's kernel, not one in the home folder
    title = f"{values['set_name']}/{name}" if values else name
    bar: Any = {"desc": title, "disable": None, "position": int(os.environ.get("LOWRANK_BAR", "0"))}
    try:
        source = read_notebook(name)
        with _outputs_at(outputs), showing_sections(title, source, values is not None):
            notebook = papermill.execute_notebook(
                source, str(growing), values, kernel_name="python3", progress_bar=bar, log_output=True
            )
        make_portable(notebook, f"notebooks/{name}.py", f"{title}/{name}.ipynb")
        nbformat.write(notebook, growing)
    except Exception as error:  # whatever the kernel, its client or a cell raises
        raise NotebookError(f"{title} failed: {_explain(error)} (see {growing})") from error
    return notebook


def _explain(error: Exception) -> str:
    """Return what a cell raised, whole, or the last line of any other error."""
    if (kind := getattr(error, "ename", None)) is not None:
        return f"{kind}: {getattr(error, 'evalue', '')}".strip(": ")
    return (str(error).strip() or repr(error)).splitlines()[-1]


def _find_result(staging: Path, notebook: str) -> Path:
    """Return the folder that a notebook has written: it is named for another set if the set was edited meanwhile."""
    written = sorted(staging.glob(f"*/{notebook}"))
    if len(written) != 1:
        raise NotebookError(f"{notebook} must write one folder of results, got {len(written)}.")
    return written[0]


def run_notebook(set_name: str, notebook: str) -> Path:
    """Execute one notebook with one set, and replace its results.

    **Arguments**

    - `set_name`: a set or a variant.
    - `notebook`: stem of the notebook.

    **Returns** the folder of results.

    **Raises** the errors below; each leaves the old result as it was.

    - `ParameterError`: a rule for sets, notebooks or parameters is broken.
    - `NotebookError`: the notebook failed.
    - `OSError`: the folder of results is not writable.
    """
    values = read_parameters(set_name, notebook)
    results = outputs_folder()
    logs, partial = results / "logs" / set_name, results / ".partial" / f"{set_name}-{notebook}"
    staging = partial / str(os.getpid())  # per process, since the kernel of a killed run may still be writing
    logs.mkdir(parents=True, exist_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{partial}.lock"):  # a runner that outlived its killed parent may still be at work
        shutil.rmtree(partial, ignore_errors=True)
        handler = logging.FileHandler(logs / f"{notebook}.log", mode="w", encoding="utf8")
        logging.basicConfig(level=logging.INFO, handlers=[handler], format="%(asctime)s %(message)s", force=True)
        growing = logs / f"{notebook}.ipynb"
        final = results / set_name / notebook
        try:
            execute(notebook, growing, staging, values)
            result = _find_result(staging, notebook)
        except NotebookError:
            shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
            raise
        growing.replace(result / f"{notebook}.ipynb")
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            final.rename(staging / "replaced")
        result.rename(final)
        shutil.rmtree(partial)
    return final
