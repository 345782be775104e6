"""Expensive results on disk, each under a hash of all that determines it."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from lowrank.io.dependencies import ROOT, hash_code, sources
from lowrank.io.distributed import agreed, processes
from lowrank.io.hashing import hash_files, hash_options

HASHES = "hashes.json"  # of the other files of an entry
PACKAGES = ("torch", "transformers", "timm", "tokenizers")  # whose versions change numbers


def cache_folder() -> Path:
    """`LOWRANK_CACHE`, else `.cache` in the project, else `~/.cache/lowrank` where the package is installed alone."""
    if named := os.environ.get("LOWRANK_CACHE"):
        return Path(named)
    return ROOT / ".cache" if (ROOT / "pyproject.toml").exists() else Path.home() / ".cache" / "lowrank"


def _hashes(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hash_files([path]) for name, path in files.items() if name != HASHES}


def damage(folder: Path) -> str | None:
    """The first file of an entry that is not as it was built; None where all are."""
    try:
        built = json.loads((folder / HASHES).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return HASHES
    found = _hashes(folder)
    return next((name for name in sorted({*built, *found}) if built.get(name) != found.get(name)), None)


def _locked(folder: Path) -> AbstractContextManager[Any]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{folder}.lock").acquire()
    except OSError as error:
        raise OSError(f"`LOWRANK_CACHE` must be a folder that can be written, or hold {folder}: {error}") from error


def _missing(folder: Path) -> bool:
    """Whether a result is not there, which a damaged one is not from here on."""
    if folder.exists() and (changed := damage(folder)):
        warnings.warn(f"{folder} is damaged ({changed} is not as it was built): it is built again.", stacklevel=3)
        shutil.rmtree(folder)
    return not folder.exists()


def cached(
    kind: str, key: Mapping[str, Any], code: Path, build: Callable[[Path], None], *, together: bool = False
) -> Path:
    """The folder of a result, built where it is missing or damaged.

    The folder appears under its name only when `build` has returned. What a killed build leaves is handed to the next
    one, so it can resume; two processes never build the same result at once. Whole results are read where nothing can
    be written.

    **Arguments:** `kind`: subfolder. `key`: JSON, what determines the result. `code`: the module that builds it; its
    code and that of all it imports, without words, and the versions of torch and the model libraries, join the key. `build`:
    writes the result into the folder that it is given. `together`: all processes of an `accelerate launch` call this and
    build one result between them; the first one decides, and writes it.

    **Raises:** `OSError`: the result is missing and the cache cannot be written.

    **Warns:** a damaged result: a file is not as it was built. It is built again.
    """
    determined = {"key": dict(key), "code": hash_code(sources(code)), "versions": {p: version(p) for p in PACKAGES}}
    folder = cache_folder() / kind / hash_options(determined)
    first = processes()[1] == 0 or not together
    decided: Callable[[Any], Any] = partial(agreed, owner=0) if together else lambda value: value
    if decided(first and folder.exists() and not damage(folder)):
        return folder
    with _locked(folder) if first else nullcontext():
        if decided(first and _missing(folder)):
            growing = folder.with_suffix(".partial")
            growing.mkdir(exist_ok=True)
            build(growing)
            if first:
                (growing / HASHES).write_text(json.dumps(_hashes(growing)), encoding="utf8")
                growing.rename(folder)
        decided(None)  # the others wait for the name
    return folder
