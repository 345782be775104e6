"""The two folders of results: those that are published, and those of your own runs; and the folder that a run fills first."""

import os
import platform
import shutil
from pathlib import Path

from lowrank.io.dependencies import ROOT
from lowrank.io.files import writing


def published_folder() -> Path:
    """Return the folder of published results, which git keeps; README and docs are filled from it."""
    return ROOT / "outputs"


def outputs_folder(*, draft: bool = False) -> Path:
    """Return the folder that runs write to: `LOWRANK_OUTPUTS` if it is set, else `outputs/run`.

    **Arguments**

    - `draft`: without `LOWRANK_OUTPUTS`, return `outputs/draft` instead. A notebook run by hand writes there: only the runner
      replaces results in `outputs/run`, after a notebook has run whole. Default False.
    """
    # Git ignores both: a run on another machine differs in last digits, so it would change files of a fresh clone, and there
    # would be nothing left to compare it with. `publish` is the one step that replaces what git keeps.
    default = published_folder() / ("draft" if draft else "run")
    return Path(os.environ.get("LOWRANK_OUTPUTS") or default).resolve()


def open_results(folder: Path) -> Path:
    """Make the empty folder beside `folder` that a run fills. An older result stays until `close_results`.

    Its name has the machine and the process, so that two runs at once fill two folders. What a process of this machine left
    behind that runs no more, is deleted.

    **Arguments**

    - `folder`: where the results are to be.

    **Returns** the folder to fill.
    """
    import psutil  # noqa: PLC0415

    prefix, suffix = f".{folder.name}.{platform.node()}-", ".partial"
    for stale in folder.parent.glob(f"{prefix}*{suffix}"):
        process = stale.name.removeprefix(prefix).removesuffix(suffix)
        if process.isdecimal() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            shutil.rmtree(stale, ignore_errors=True)
    filled = folder.with_name(f"{prefix}{os.getpid()}{suffix}")
    filled.mkdir(parents=True, exist_ok=True)
    return filled


def close_results(filled: Path, folder: Path) -> None:
    """Put a folder that is whole in its place; an older result is replaced.

    **Arguments**

    - `filled`: what `open_results` returned.
    - `folder`: where the results are to be.
    """
    with writing(folder) as partial:
        filled.rename(partial)
