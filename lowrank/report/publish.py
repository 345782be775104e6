"""Put the results of a run in the place of published ones."""

import shutil
from pathlib import Path

from lowrank.io.files import writing
from lowrank.report.errors import ReportError
from lowrank.report.parameters import set_names, split_variant
from lowrank.report.result_files import read_run


class PublishError(ReportError):
    """Report that results cannot be published."""


def publish_results(sets: list[str], results: Path, published: Path) -> list[Path]:
    """Put the results of some sets in the place of published ones, one whole folder after another; logs stay behind.

    **Arguments**

    - `sets`: names of sets or variants with results. None named: all sets with results, without variants.
    - `results`: the folder of runs.
    - `published`: the folder that git keeps.

    **Returns** the folders that were replaced or added.

    **Raises** the errors below, before anything is written.

    - `ParameterError`: no such set.
    - `PublishError`: no results; results of a tree with uncommitted changes, or of no known commit.
    """
    for name in sets:
        split_variant(name)
    chosen = sets or [name for name in set_names() if any(results.glob(f"{name}/*/run.json"))]
    folders = [path.parent for name in chosen for path in sorted(results.glob(f"{name}/*/run.json"))]
    found = {folder.parent.name for folder in folders}
    if missing := [name for name in chosen if name not in found] or (["any set"] if not folders else []):
        raise PublishError(f"{results} must have results of {', '.join(missing)}: run `make report` first.")
    unclean = [f.relative_to(results).as_posix() for f in folders if not _is_from_commit(f)]
    if unclean:
        raise PublishError(f"results must come from a commit without changes, got {', '.join(unclean)}.")
    for stale in (published / ".partial", *published.glob("*/.*.partial")):  # what a killed process left
        shutil.rmtree(stale, ignore_errors=True)
    targets = [published / folder.relative_to(results) for folder in folders]
    for folder, target in zip(folders, targets, strict=True):
        with writing(target) as partial:
            shutil.copytree(folder, partial)
    return targets


def _is_from_commit(folder: Path) -> bool:
    run = read_run(folder)
    return bool(run.get("git_commit")) and not run.get("git_dirty")
