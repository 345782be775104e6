"""Saved states of a training: what a stranger put into one is refused, and none of it runs."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.training.loop import Hooks, Recipe, fit
from lowrank.training.saved_states import find_state

RECIPE = Recipe(3, learning_rate=0.1)


class Count:
    """Something that is saved with a training."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def train(folder: Path, recipe: Recipe = RECIPE, outputs: int = 2) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model, x = nn.Linear(3, outputs), torch.ones(5, 3)
    loss = lambda model, batch: model(batch).square().sum()  # noqa: E731
    hooks = Hooks(states=[Count()])
    return model, fit(model, lambda _: [x] * 9, recipe, loss, hooks=hooks, checkpoint=folder, progress=False)


@pytest.mark.parametrize("name", ["optimizer.bin", "model.safetensors", "states.pt", "custom_checkpoint_0.pkl"])
def test_code_in_the_files_of_a_state_does_not_run(name, tmp_path) -> None:
    train(tmp_path / "run")
    state = find_state(tmp_path / "run")
    assert state is not None
    assert not [file.name for file in state.iterdir() if file.name.startswith("custom_checkpoint")]
    torch.save(Payload(tmp_path / "ran"), state / name)
    with pytest.raises(ValueError, match="`checkpoint` must hold"):
        train(tmp_path / "run", replace(RECIPE, steps=5))
    assert not (tmp_path / "ran").exists()


def test_a_state_of_another_model_is_named(tmp_path) -> None:
    train(tmp_path / "run")
    with pytest.raises(ValueError, match="`checkpoint` must hold a whole state of this training, got .*step-000000003"):
        train(tmp_path / "run", replace(RECIPE, steps=5), outputs=4)


@pytest.mark.parametrize("decay", ["cosine", "constant"])
def test_the_learning_rate_follows_from_the_step_alone(decay, tmp_path) -> None:
    recipe = replace(RECIPE, steps=6, decay=decay, warmup=0.3, checkpoint_every=2)
    whole, history = train(tmp_path / "whole", recipe)
    assert [row["learning_rate"] for row in history] == [0.1 * recipe.rate(step) for step in range(6)]
    optimizer = torch.load(tmp_path / "whole" / "step-000000006" / "optimizer.bin", weights_only=True)
    assert optimizer["param_groups"][0]["lr"] == history[-1]["learning_rate"]
    assert whole.state_dict().keys() == {"weight", "bias"}
