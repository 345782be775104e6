"""Tests in processes of their own: two that speak gloo, some with file systems that others do not see, and whole reports."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.io.dependencies import ROOT


def run_in_two(script: Path) -> None:
    """Runs a script as `accelerate launch` would in two processes; on CPUs that would ask for mpirun itself."""
    leave = "import torch.distributed as d; d.is_initialized() and d.destroy_process_group()"  # a live one may abort at exit
    script.write_text(f"{script.read_text()}\n{leave}\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-20000:]  # what failed first stands above the launcher's own traceback


def run_mounted(commands: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs bash commands up to the first that fails, which may mount file systems; they are gone afterwards."""
    alone = ["unshare", "--mount", "--map-root-user"]
    if sys.platform != "linux" or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [*alone, "bash", "-ec", commands],
        env=os.environ | environment | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def copy_project(folder: Path) -> Path:
    """What a report needs of the project, copied, so that killed runs touch nothing of this one."""
    files = ("pyproject.toml", "requirements.lock", "Snakefile", "Makefile")
    for name in ("lowrank", "notebooks", "params", "profiles", *files):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


def start_report(house: Path, outputs: str, sets: str, cores: int = 1, profile: str = "") -> subprocess.Popen[bytes]:
    """What `make report` does after the set-up, with the code of a copy, in a process group of its own; its results, cache
    and log lie in the copy."""
    environment = os.environ | {
        "LOWRANK_OUTPUTS": str(house / outputs),
        "LOWRANK_CACHE": str(house / f"{outputs}-cache"),
        "PYTHONPATH": str(house),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    command = ["make", "-o", ".venv/.ok", "report", f"SETS={sets}", f"CORES={cores}", f"PROFILE={profile}"]
    with (house / f"{outputs}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=house,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
