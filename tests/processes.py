"""Tests in processes of their own: two that speak gloo, or with file systems that others do not see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_in_two(script: Path) -> None:
    """Runs a script as `accelerate launch` would in two processes; on CPUs that would ask for mpirun itself."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


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
