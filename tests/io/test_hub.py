"""The real sets on the local Hub cache, where there is one: set LOWRANK_TEST_HF to a Hugging Face home that holds it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME = Path(os.environ.get("LOWRANK_TEST_HF", ROOT.parent / "shared" / "hf"))
pytestmark = pytest.mark.skipif(not HOME.exists(), reason=f"no Hugging Face cache at {HOME}")

SCRIPT = """
import torch
from lowrank.tasks.registry import load_task
from lowrank.calibration.collect import collect_statistics
options = {
    "glue": {"task": "sst2", "model": "sentence-transformers/all-MiniLM-L6-v2", "data": "SetFit/sst2"},
    "cifar10": {"width": 32, "depth": 2, "heads": 2, "train_samples": 64},
}
expected = {"glue": (6920, 872, 1821, 36), "cifar10": (64, 5000, 10000, 8)}
for name, (train, validation, test, layers) in expected.items():
    task = load_task(name, **options[name])
    assert task.rows == {"train": train, "validation": validation, "test": test}
    torch.manual_seed(0)
    model = task.make_model()
    assert len(task.linears(model)) == layers
    found = collect_statistics(model, task.batches("train", 8, samples=16, seed=0), task.layers)
    assert min(layer.tokens for layer in found.values()) > 16
    print(name, task.identity)
import datasets
from lowrank.io.hub import load_splits
assert len(load_splits("Salesforce/wikitext", "wikitext-2-v1")["test"]) == 4358
"""


def test_the_hub_tasks_load_real_data(tmp_path: Path) -> None:
    shutil.copytree(HOME, tmp_path / "hf", copy_function=os.symlink)  # libraries write locks beside what they read
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "d46f7701826b96cba8ae31f4b54fd066f8059af4" in done.stdout  # the commit of the weights is in the identity
