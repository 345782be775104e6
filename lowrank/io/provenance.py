"""io.provenance"""

import platform
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import torch

from lowrank.io.dependencies import ROOT

VERSIONED = ("numpy", "torch", "transformers", "timm", "datasets", "peft", "accelerate", "safetensors", "tokenizers")
RESULT_SOURCES = ("lowrank", "notebooks/*.py", "params", "requirements.lock", "pyproject.toml", "Snakefile")


def environment() -> dict[str, Any]:
    """Commit, versions and machine that a result came from."""
    cuda = torch.cuda.is_available()
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--", *RESULT_SOURCES)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONED},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
    }


def peak_memory_mb() -> dict[str, int]:
    """The most memory this process has held, in MB, on the host and on the GPU where there is one."""
    import resource  # noqa: PLC0415 (not on Windows)

    unit = 1024**2 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit}
    return peak | ({"gpu": torch.cuda.max_memory_allocated() // 1024**2} if torch.cuda.is_available() else {})


def _git(*words: str) -> str | None:
    """What git prints; None outside a repository or without git."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
