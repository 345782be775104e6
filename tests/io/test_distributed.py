"""Two gloo processes on the CPU against one: moments are summed, whatever the share of each, and a baseline is one baseline."""

import re
from pathlib import Path

import pytest
import torch
from processes import run_in_two
from torch import nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.storage import load_statistics
from lowrank.io.dependencies import ROOT
from lowrank.tasks.baseline import load_baseline, load_calibration
from lowrank.tasks.registry import load_task
from lowrank.training.loop import Recipe

WORKER = """
import sys, torch
from accelerate import PartialState
sys.path.insert(0, {tests!r})
from test_distributed import make_model, make_batches, loss
from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.storage import save_statistics
state = PartialState(cpu=True)
assert state.num_processes == 2, state
mine = make_batches()[state.process_index::2] if {share!r} == "even" else make_batches() * (state.process_index == 0)
model = make_model()
found = collect_statistics(model, mine, ["blocks.0", "blocks.1", "blocks.2"], loss=loss, side={side!r})
save_statistics({folder!r} + f"/{{state.process_index}}.safetensors", found, model, "")
"""


TRAINER = """
import shutil, sys, time, torch
from accelerate import PartialState
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_distributed import make_batches, make_model, loss
from lowrank.training.loop import Recipe, fit
state = PartialState(cpu=True)
def late(function):
    def wrapped(*arguments, **options):
        time.sleep(state.process_index)
        return function(*arguments, **options)
    return wrapped
torch.save, torch.load = late(torch.save), late(torch.load)
killed_at = 7
def train(folder, kill=False):
    model, seen = torch.nn.Sequential(torch.nn.Dropout(), *make_model().blocks[::2]), 0
    def step_loss(model, batch):
        nonlocal seen
        seen += 1
        if kill and seen > killed_at:
            raise InterruptedError
        return loss(model, batch)
    batches = [make_batches()[state.process_index] for _ in range(10)]
    checkpoint = Path({folder!r}, folder)
    fit(model, lambda done: batches[done:], Recipe(steps=10, checkpoint_every=5), step_loss, checkpoint=checkpoint)
    return torch.cat([p.detach().flatten() for p in model.parameters()])
whole = train("whole")
try:
    train("killed", kill=True)
except InterruptedError:
    pass
(saved,) = Path({folder!r}, "killed").iterdir()
state.wait_for_everyone()
assert {{"random_states_0.pkl", "random_states_1.pkl"}} < {{path.name for path in saved.iterdir()}}, list(saved.iterdir())
assert torch.equal(train("killed"), whole)
again = train("whole")
if state.process_index == 0:
    shutil.rmtree(Path({folder!r}, "whole"))
assert torch.equal(again, whole)
"""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[2](self.blocks[0](x) * self.blocks[1](x))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return Model().double()


def make_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (7, 3, 9, 1, 4)]


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().sum()


@pytest.mark.parametrize("share", ["even", "one process has none"])
@pytest.mark.parametrize("side", ["inputs", "smaller", "outputs"])
def test_two_processes_give_the_moments_of_one(share: str, side: str, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent), folder=str(tmp_path), share=share, side=side))
    run_in_two(script)
    model = make_model()
    alone = collect_statistics(model, make_batches(), ["blocks.0", "blocks.1", "blocks.2"], loss=loss, side=side)
    for rank in (0, 1):
        found = load_statistics(tmp_path / f"{rank}.safetensors", model)
        assert found["blocks.0"].mean.data_ptr() == found["blocks.1"].mean.data_ptr()
        for name, layer in alone.items():
            assert found[name].tokens == layer.tokens == 24
            assert found[name].moments().keys() == layer.moments().keys()
            for field in layer.moments().keys() - {"input_sketch", "gradient_sketch"}:  # signs are the process's own
                assert torch.allclose(getattr(found[name], field), getattr(layer, field), rtol=1e-12, atol=1e-14)


def test_a_training_killed_in_two_processes_goes_on_exactly(tmp_path: Path) -> None:
    """Also where one process writes or reads its part of a saved state later than the other."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    run_in_two(script)


RECIPE = Recipe(steps=20, batch_size=64, learning_rate=4e-3, weight_decay=0.05)


@pytest.fixture
def calibrated_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache after docs/cluster.md's script, with fewer steps, ran in two processes."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(encoding="utf8"), re.DOTALL)
    (script,) = [block for block in blocks if "load_calibration" in block]
    short, changed = re.subn("steps=600", f"steps={RECIPE.steps}", script)
    assert changed == 1
    (tmp_path / "calibrate.py").write_text(f"{short}\nassert PartialState().num_processes == 2\n")
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "two"))
    run_in_two(tmp_path / "calibrate.py")
    return tmp_path / "two"


def test_one_process_finds_what_two_have_made(calibrated_in_two: Path) -> None:
    task, made = load_task("digits"), set(calibrated_in_two.rglob("*"))
    model = load_baseline(task, RECIPE).model
    found = load_calibration(task, model, samples=768, batch_size=64, seed=0)
    assert set(calibrated_in_two.rglob("*")) == made  # nothing was built again
    # the moments are those that one process collects from all batches
    alone = collect_statistics(
        model, task.batches("train", 64, samples=768, seed=0), task.layers, products=torch.float64
    )
    assert alone.keys() == found.keys()
    for name, layer in alone.items():
        assert found[name].tokens == layer.tokens
        for field in ("gram", "mean", "abs_mean"):
            ours, theirs = getattr(found[name], field), getattr(layer, field)
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12 * float(theirs.abs().max()))
