"""Of about two thousand bad inputs, none gives a result or a traceback, and nearly each error names the argument and the rule."""

import json
import os
import subprocess
import sys

import pytest

from lowrank.io.dependencies import ROOT


@pytest.mark.slow
def test_bad_inputs_are_refused_by_name() -> None:
    code = "import bad_inputs; bad_inputs.main()"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *bad, last = done.stdout.splitlines()
    counts = json.loads(last)
    refused = sum(counts.get(end, 0) for end in ("clear", "unclear", "wrong", "traceback"))
    assert refused >= 2000
    assert counts.get("wrong", 0) == counts.get("traceback", 0) == 0, "\n".join(bad)
    assert counts["clear"] >= 0.95 * refused, "\n".join(bad)
