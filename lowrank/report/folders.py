"""The two folders of results: those that are published, and those of your own runs."""

import os
from pathlib import Path

from lowrank.io.dependencies import ROOT


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
