"""Describe where a result comes from: commit, versions, machine and peak memory."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import threadpoolctl
import torch

from lowrank.io.dependencies import ROOT
from lowrank.io.hashing import hash_files

VERSIONED = ("numpy", "torch", "transformers", "timm", "datasets", "peft", "accelerate", "safetensors", "tokenizers")
LOCK = ROOT / "requirements.lock"
# Results depend on these files; a change in any other leaves the tree clean for `git_dirty`.
RESULT_SOURCES = ("lowrank", "notebooks/*.py", "params", "requirements.lock", "pyproject.toml", "Snakefile")


def environment() -> dict[str, Any]:
    """Return the commit, the versions of Python and packages, and the machine of this run.

    **Returns** JSON values by name. `git_commit` is None outside a repository, `lock` the hash of the lock file, None without
    one. `git_dirty` says whether files that results depend on have uncommitted changes. `versions` leaves out packages that are
    not installed. `blas` lists the libraries of linear algebra, each with the instruction set that it chose.
    """
    cuda = torch.cuda.is_available()
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--", *RESULT_SOURCES)),
        "python": platform.python_version(),
        "versions": {name: found for name in VERSIONED if (found := _version(name))},
        "lock": hash_files([LOCK]) if LOCK.exists() else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "blas": _linear_algebra(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
    }


def _version(package: str) -> str | None:
    """Return the version of a package, None if it is not installed: a GPU's machine has no `datasets`, perhaps."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _linear_algebra() -> list[str]:
    """Return the libraries of linear algebra that are loaded, with version and instruction set: last digits depend on them."""
    libraries = {
        " ".join(str(library[key]) for key in ("internal_api", "version", "architecture") if library.get(key))
        for library in threadpoolctl.threadpool_info()
        if library["user_api"] == "blas"
    }
    return sorted({*libraries, f"torch {torch.backends.cpu.get_cpu_capability()}"})


def _cpu_model() -> str:
    """Return the name of the processor as Linux knows it, elsewhere as Python does."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def peak_memory_mb() -> dict[str, int]:
    """Return the peak memory of this process in MB: `host`, and `gpu` if there is a GPU."""
    import resource  # noqa: PLC0415 (not on Windows)

    unit = 1024**2 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit}
    return peak | ({"gpu": torch.cuda.max_memory_allocated() // 1024**2} if torch.cuda.is_available() else {})


def _git(*words: str) -> str | None:
    """Return what git prints, or None outside a repository or without git."""
    try:
        process = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()
