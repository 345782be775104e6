"""The one training loop: AdamW, warm-up and cosine, clipping, a progress bar, exact resume, early failure on NaN."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from math import ceil, cos, isfinite, pi
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.nn.batches import Batch, to_device

STATES = "step-" + "[0-9]" * 9  # names of saved states; a name appears when its state is whole


@dataclass(frozen=True)
class Recipe:
    """How to train. `steps` optimiser steps of `accumulation` batches of `batch_size` samples, whose losses are averaged;
    `learning_rate` is the peak, reached after the first `warmup` share of the steps; `decay`: 'cosine' lowers it to `floor`, a
    share of the peak, along the part `t` in [0, 1] of the remaining steps to the power `decay_power`; 'constant' keeps it.
    Gradients are clipped to norm `clip`; `precision`: 'fp32' or 'bf16' (autocast). `seed` orders the data and draws dropout and
    new weights.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    decay: str = "cosine"
    decay_power: float = 1.0
    floor: float = 0.0
    clip: float = 1.0
    precision: str = "fp32"
    seed: int = 0
    workers: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        rules = {
            "steps": (self.steps >= 0, ">= 0"),
            "batch_size": (self.batch_size >= 1, ">= 1"),
            "learning_rate": (self.learning_rate > 0, "> 0"),
            "weight_decay": (self.weight_decay >= 0, ">= 0"),
            "warmup": (0 <= self.warmup <= 1, "in [0, 1]"),
            "decay": (self.decay in ("cosine", "constant"), "'cosine' or 'constant'"),
            "decay_power": (self.decay_power > 0, "> 0"),
            "floor": (0 <= self.floor <= 1, "in [0, 1]"),
            "clip": (self.clip > 0, "> 0"),
            "precision": (self.precision in ("fp32", "bf16"), "'fp32' or 'bf16'"),
            "workers": (self.workers >= 0, ">= 0"),
            "accumulation": (self.accumulation >= 1, ">= 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}.")

    def rate(self, step: int) -> float:
        """The share of the peak learning rate at a step, 0-based."""
        warm = ceil(self.warmup * self.steps)
        if step < warm:
            return self.floor + (1 - self.floor) * (step + 1) / warm
        if self.decay == "constant":
            return 1.0
        power = self.decay_power
        angle = pi * (step - warm) ** power / max(1, self.steps - warm) ** power
        return self.floor + (1 - self.floor) * 0.5 * (1 + cos(angle))


@runtime_checkable
class Stateful(Protocol):
    """What is saved with a training and goes on with it."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on every device."""
    from accelerate.utils import set_seed  # noqa: PLC0415

    set_seed(seed)


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    recipe: Recipe,
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    log: Callable[[], dict[str, float]] = dict,
    after_step: Callable[[Any], bool] = lambda optimizer: False,
    states: Sequence[Stateful] = (),
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> list[dict[str, int | float]]:
    """Trains the parameters of a model that require gradients, in place.

    With `checkpoint`, a call that follows a killed one goes on where that one saved last, and ends with the same weights
    as an undisturbed run.

    **Arguments:** `batches`: `(steps done) -> the batches of the steps that follow`, `accumulation` for each.
    `loss`: `(model, batch) -> scalar`. `log`: called in every step while the gradients are there, not yet clipped; what it
    returns joins the row. `after_step`: called with the optimiser after each of its steps; it returns whether it put other
    parameters in the places of those that the model and the optimiser held. `states`: saved with the checkpoint, and loaded
    before the model's own tensors are, so that they may change its shape.
    `checkpoint`: a folder for saved states; it is left in place. `checkpoint_every`: steps between saves.

    **Returns:** one row per step: `step`, `loss`, `learning_rate`, and what `log` said.

    **Raises:** `FloatingPointError`: the loss is not finite, at the step where it happens. `ValueError`: the batches end
    before the steps do, or the checkpoint is of more steps.
    """
    accelerator = Accelerator()
    seed_everything(recipe.seed)
    saved = max(checkpoint.glob(STATES), default=None) if checkpoint else None
    if saved and states:
        for state, values in zip(states, torch.load(saved / "states.pt", weights_only=True), strict=True):
            state.load_state_dict(values)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.rate(step))  # noqa: PLW0108 (a method would be saved)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    history = _resume(accelerator, saved)
    if len(history) > recipe.steps:
        raise ValueError(
            f"`checkpoint` must be of at most the {recipe.steps} steps of the recipe, got one of {len(history)} in {checkpoint}."
        )

    bar = tqdm(total=recipe.steps, initial=len(history), desc="train", unit="step", mininterval=2, disable=not progress)
    wrapped.train()
    following = iter(batches(len(history)))
    while (
        len(history) < recipe.steps
        and len(parts := list(islice(following, recipe.accumulation))) == recipe.accumulation
    ):
        mean = 0.0
        for part, batch in enumerate(parts, start=1):
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                value = loss(wrapped, to_device(batch, accelerator.device)) / recipe.accumulation
            mean += value.item()
            if not isfinite(mean):
                raise FloatingPointError(
                    f"the loss is {value.item()} at step {len(history)}: lower `learning_rate` (now "
                    f"{recipe.learning_rate}), lengthen `warmup`, or train in fp32."
                )
            with nullcontext() if part == recipe.accumulation else accelerator.no_sync(wrapped):
                accelerator.backward(value)
        said = log()
        accelerator.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        if after_step(optimizer) and wrapped is not model:
            accelerator.free_memory()  # of the wrapper, which holds the parameters that were replaced
            wrapped, optimizer = accelerator.prepare(model, optimizer)
            wrapped.train()
        row = {"step": len(history), "loss": mean, "learning_rate": float(schedule.get_last_lr()[0])}
        history.append(row | said)
        schedule.step()
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        bar.update()
        if checkpoint and (len(history) % checkpoint_every == 0 or len(history) == recipe.steps):
            _save(accelerator, checkpoint, history, states)
    bar.close()
    if len(history) < recipe.steps:
        raise ValueError(
            f"`batches` must hold {recipe.accumulation} for each of {recipe.steps} steps, got enough for {len(history)}."
        )
    model.eval()
    return history


def _save(
    accelerator: Accelerator, checkpoint: Path, history: list[dict[str, int | float]], states: Sequence[Stateful]
) -> None:
    """A new state beside the old one, then the name moves: a kill leaves the old or the new, never a mixture."""
    partial = checkpoint / "partial"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()  # each process writes its own random state
    if accelerator.is_main_process:
        (partial / "history.json").write_text(json.dumps(history))
        torch.save([state.state_dict() for state in states], partial / "states.pt")
        older = list(checkpoint.glob(STATES))
        partial.rename(checkpoint / f"step-{len(history):09d}")
        for state in older:
            shutil.rmtree(state)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, saved: Path | None) -> list[dict[str, int | float]]:
    if saved is None:
        return []
    accelerator.load_state(str(saved))
    history = json.loads((saved / "history.json").read_text())
    accelerator.wait_for_everyone()  # with no step left, the first could return and its caller delete the state
    return history


def recipe_options(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON, for hashes and provenance; what does not change results is left out."""
    return {key: value for key, value in asdict(recipe).items() if key != "workers"}
