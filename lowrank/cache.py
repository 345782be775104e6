"""Expensive results on disk, each under a hash of all that determines it."""

import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from lowrank.fingerprint import hash_files, hash_options
from lowrank.imports import ROOT, sources

PACKAGES = ("torch", "transformers", "timm", "tokenizers")  # whose versions change numbers


def cache_folder() -> Path:
    """`LOWRANK_CACHE`, else `.cache` in the project, else `~/.cache/lowrank` where the package is installed alone."""
    if named := os.environ.get("LOWRANK_CACHE"):
        return Path(named)
    return ROOT / ".cache" if (ROOT / "pyproject.toml").exists() else Path.home() / ".cache" / "lowrank"


def cached(kind: str, key: Mapping[str, Any], code: Path, build: Callable[[Path], None]) -> Path:
    """The folder of a result, built where it is missing.

    The folder appears under its name only when `build` has returned. What a killed build leaves is handed to the next
    one, so it can resume; two processes never build the same result at once.

    **Arguments:** `kind`: subfolder. `key`: JSON, what determines the result. `code`: the module that builds it; its
    source and that of all it imports, and the versions of torch and the model libraries, join the key. `build`:
    writes the result into the folder that it is given.
    """
    determined = {"key": dict(key), "code": hash_files(sources(code)), "versions": {p: version(p) for p in PACKAGES}}
    folder = cache_folder() / kind / hash_options(determined)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            partial.mkdir(exist_ok=True)
            build(partial)
            partial.rename(folder)
    return folder
