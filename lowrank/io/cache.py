"""Keep expensive results on disk, each under a hash of everything that determines it."""

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
from lowrank.io.distributed import broadcast, process_index
from lowrank.io.files import partial_path, writing
from lowrank.io.hashing import hash_files, hash_options

HASHES = "hashes.json"  # of the other files of an entry
PACKAGES = ("torch", "transformers", "timm", "tokenizers")  # whose versions change numbers


def cache_folder() -> Path:
    """Return the cache folder, which need not exist.

    It is `LOWRANK_CACHE` if set, else `.cache` in a clone of the project, else `~/.cache/lowrank`.
    """
    if folder := os.environ.get("LOWRANK_CACHE"):
        return Path(folder)
    return ROOT / ".cache" if (ROOT / "pyproject.toml").exists() else Path.home() / ".cache" / "lowrank"


def _hash_entry(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hash_files([path]) for name, path in files.items() if name != HASHES}


def find_damage(folder: Path) -> str | None:
    """Return the first file of an entry that differs from the one that was built, None if all files are equal."""
    try:
        built = json.loads((folder / HASHES).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return HASHES
    present = _hash_entry(folder)
    return next((name for name in sorted({*built, *present}) if built.get(name) != present.get(name)), None)


def _lock(folder: Path) -> AbstractContextManager[Any]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{folder}.lock").acquire()
    except OSError as error:
        raise OSError(f"`LOWRANK_CACHE` must be a writable folder, or have {folder} already: {error}") from error


def _is_missing(folder: Path) -> bool:
    """Return True if the entry is missing. A damaged entry is deleted first and counts as missing."""
    if folder.exists() and (file := find_damage(folder)):
        warnings.warn(
            f"{folder} is damaged ({file} differs from the file that was built): rebuilding it.", stacklevel=3
        )
        shutil.rmtree(folder)
    return not folder.exists()


def load_or_build(
    kind: str, key: Mapping[str, Any], code: Path, build: Callable[[Path], None], *, together: bool = False
) -> Path:
    """Return the folder of a result, and build it first if it is missing or damaged.

    The folder gets its name only when `build` has returned. A killed build leaves its files to the next one, which can
    resume. Two runs never build one result at the same time. A read-only cache is still used for the entries it has.

    **Arguments**

    - `kind`: subfolder of the cache.
    - `key`: JSON values that determine the result.
    - `code`: the module that builds it. Its code and the code of everything it imports, without docstrings and comments,
      join the key; so do the versions of torch and the model libraries.
    - `build`: function that writes the result into a folder, its only argument.
    - `together`: all processes of an `accelerate launch` call this function and build one result between them. The first
      process decides whether to build, and gives the folder its name. Default False.

    **Raises**

    - `OSError`: the result is missing and the cache is not writable.

    **Warns** if the result is damaged: a file differs from the one that was built.
    """
    identity = {"key": dict(key), "code": hash_code(sources(code)), "versions": {p: version(p) for p in PACKAGES}}
    folder = cache_folder() / kind / hash_options(identity)
    is_first = process_index() == 0 or not together
    agree: Callable[[Any], Any] = partial(broadcast, owner=0) if together else lambda value: value
    if agree(is_first and folder.exists() and not find_damage(folder)):
        return folder
    with _lock(folder) if is_first else nullcontext():
        if agree(is_first and _is_missing(folder)):
            with writing(folder, resume=True) if is_first else nullcontext(partial_path(folder)) as growing:
                growing.mkdir(parents=True, exist_ok=True)
                build(growing)
                if is_first:
                    (growing / HASHES).write_text(json.dumps(_hash_entry(growing)), encoding="utf8")
        agree(None)  # the other processes wait until the folder has its name
    return folder
