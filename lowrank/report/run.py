"""One notebook with one parameter set, through papermill, strictly: `python -m lowrank.report.run SET NOTEBOOK`.

The notebook runs in a folder of its own beside the results and takes the place of the old result only when it has run
whole. A failed one leaves its notebook, traceback included, and its log in `outputs/logs/`, and the old result as it was.
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from lowrank.io.dependencies import ROOT
from lowrank.report.parameters import ParameterError, notebook_path, parameters


class NotebookError(RuntimeError):
    """A notebook did not run to its end."""


def results_folder() -> Path:
    """`LOWRANK_OUTPUTS`, else `outputs` in the project."""
    return Path(os.environ.get("LOWRANK_OUTPUTS") or ROOT / "outputs").resolve()


def read_notebook(name: str) -> Any:
    """A notebook's source as a notebook object with the same cell ids every time."""
    import jupytext  # noqa: PLC0415

    notebook = jupytext.read(notebook_path(name))
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{name[:40]}-{number:03d}"
        cell.metadata.setdefault("tags", [])  # papermill asks every cell for them
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (lowrank)", "language": "python"}
    return notebook


@contextmanager
def _outputs_at(folder: Path) -> Iterator[None]:
    """`LOWRANK_OUTPUTS` for the kernel, which inherits the environment."""
    before = os.environ.get("LOWRANK_OUTPUTS")
    os.environ["LOWRANK_OUTPUTS"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("LOWRANK_OUTPUTS")
        if before is not None:
            os.environ["LOWRANK_OUTPUTS"] = before


def execute(notebook: Any, growing: Path, outputs: Path, title: str, values: dict[str, Any] | None = None) -> Any:
    """Runs a notebook object, which grows cell by cell at `growing` while its results go to `outputs`.

    **Raises:** `NotebookError`: a cell failed or the kernel died; the notebook so far is at `growing`.
    """
    import papermill  # noqa: PLC0415

    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's kernel, not one in the home folder
    bar: Any = {"desc": title, "disable": None, "position": int(os.environ.get("LOWRANK_BAR", "0"))}
    try:
        with _outputs_at(outputs):
            return papermill.execute_notebook(
                notebook, str(growing), values, kernel_name="python3", progress_bar=bar, log_output=True
            )
    except Exception as error:  # whatever the kernel, its client or a cell raises
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise NotebookError(f"{title} failed: {reason} (see {growing})") from error


def run(set_name: str, name: str) -> Path:
    """Executes one notebook with one set.

    **Returns:** the folder of results.

    **Raises:** `ParameterError`: the set, the notebook or a parameter is not as it must be. `OSError`: outputs cannot be
    written. `NotebookError`: the notebook failed. In every case the former result stays as it was.
    """
    values = parameters(set_name, name)
    results = results_folder()
    logs, partial = results / "logs" / set_name, results / ".partial" / f"{set_name}-{name}"
    staging = partial / str(os.getpid())  # its own, since the kernel of a killed run may still be writing
    logs.mkdir(parents=True, exist_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{partial}.lock"):  # a runner that outlived its killed parent may still be at work
        shutil.rmtree(partial, ignore_errors=True)
        handler = logging.FileHandler(logs / f"{name}.log", mode="w", encoding="utf8")
        logging.basicConfig(level=logging.INFO, handlers=[handler], format="%(asctime)s %(message)s", force=True)
        growing = logs / f"{name}.ipynb"
        made, final = staging / set_name / name, results / set_name / name
        try:
            execute(read_notebook(name), growing, staging, f"{set_name}/{name}", values)
        except NotebookError:
            shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
            raise
        growing.replace(made / f"{name}.ipynb")
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            final.rename(staging / "replaced")
        made.rename(final)
        shutil.rmtree(partial)
    return final


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 1 the notebook failed, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m lowrank.report.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("set", help="a file of params/, without .yaml")
    parser.add_argument("notebook", help="a file of notebooks/, without .py")
    given = parser.parse_args(arguments)
    try:
        print(run(given.set, given.notebook))
    except NotebookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ParameterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: `LOWRANK_OUTPUTS` must be a folder that can be written: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
