"""The one folder of results: `LOWRANK_OUTPUTS`, or `outputs` in the project."""

import os
from pathlib import Path

from lowrank.io.dependencies import ROOT


def outputs_folder(*, draft: bool = False) -> Path:
    """Return the folder of results, `LOWRANK_OUTPUTS` if it is set.

    **Arguments**

    - `draft`: without `LOWRANK_OUTPUTS`, return `outputs/draft` instead of `outputs`. A notebook run by hand writes there:
      only the runner replaces results in `outputs`, after a notebook has run whole. Default False.
    """
    default = ROOT / "outputs" / "draft" if draft else ROOT / "outputs"
    return Path(os.environ.get("LOWRANK_OUTPUTS") or default).resolve()
