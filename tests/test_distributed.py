"""Two gloo processes on the CPU against one: moments are summed, whatever the share of each."""

from pathlib import Path

import pytest
import torch
from processes import run_in_two
from torch import nn

from lowrank.statistics import collect_statistics
from lowrank.statistics_file import load_statistics

WORKER = """
import sys, torch
from accelerate import PartialState
sys.path.insert(0, {tests!r})
from test_distributed import make_model, make_batches, loss
from lowrank.statistics import collect_statistics
from lowrank.statistics_file import save_statistics
state = PartialState(cpu=True)
assert state.num_processes == 2, state
mine = make_batches()[state.process_index::2] if {share!r} == "even" else make_batches() * (state.process_index == 0)
model = make_model()
found = collect_statistics(model, mine, ["blocks.0", "blocks.1", "blocks.2"], loss=loss)
save_statistics({folder!r} + f"/{{state.process_index}}.safetensors", found, model, "")
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
def test_two_processes_give_the_moments_of_one(share: str, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent), folder=str(tmp_path), share=share))
    run_in_two(script)
    model = make_model()
    alone = collect_statistics(model, make_batches(), ["blocks.0", "blocks.1", "blocks.2"], loss=loss)
    for rank in (0, 1):
        found = load_statistics(tmp_path / f"{rank}.safetensors", model)
        assert found["blocks.0"].gram.data_ptr() == found["blocks.1"].gram.data_ptr()
        for name, layer in alone.items():
            assert found[name].tokens == layer.tokens == 24
            for field in ("gram", "mean", "abs_mean", "gradient_gram"):
                assert torch.allclose(getattr(found[name], field), getattr(layer, field), rtol=1e-12, atol=1e-14)
