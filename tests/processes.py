"""Tests in two gloo processes on the CPU."""

import subprocess
import sys
from pathlib import Path


def run_in_two(script: Path) -> None:
    """Runs a script as `accelerate launch` would in two processes; on CPUs that would ask for mpirun itself."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
