"""The one training loop: AdamW, warm-up and cosine, clipping, a progress bar, exact resume, early failure on NaN."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from math import ceil, cos, inf, isfinite, pi
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.hashing import check_in_memory
from lowrank.nn.autograd import check_differentiable
from lowrank.nn.batches import Batch, is_empty, move_batch
from lowrank.training.saved_states import Stateful, find_state, load_objects, load_training, save_training


@check_arguments
@dataclass(frozen=True)
class Recipe:
    """Hold the settings of a training.

    One step of the optimiser averages the losses of `accumulation` batches of `batch_size` samples.

    **Arguments**

    - `steps`: steps of the optimiser, >= 0.
    - `batch_size`: samples per batch, >= 1.
    - `learning_rate`: the peak, > 0.
    - `weight_decay`: of AdamW, >= 0.
    - `warmup`: share of the steps in which the learning rate rises to the peak, in [0, 1].
    - `decay`: 'cosine' lowers the learning rate after the warm-up, 'constant' keeps the peak.
    - `decay_power`: p > 0. The cosine is taken at t^p, with t in [0, 1] the share of the steps done after the warm-up.
    - `floor`: the last learning rate of the cosine as a share of the peak, in [0, 1]. The warm-up starts from it too.
    - `clip`: largest norm of the gradient, > 0; longer ones are scaled down.
    - `precision`: 'fp32', or 'bf16' for autocast to bfloat16.
    - `seed`: orders the data, and draws dropout and new weights.
    - `workers`: processes that load data, >= 0; 0 loads in the process of the training. It does not change results.
    - `accumulation`: batches per step, >= 1.
    - `checkpoint_every`: steps between saved states, >= 1. It does not change results.

    **Raises**

    - `ValueError`: a value out of its range.
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
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        rules = {
            "steps": (self.steps >= 0, ">= 0"),
            "batch_size": (self.batch_size >= 1, ">= 1"),
            "learning_rate": (0 < self.learning_rate < inf, "> 0 and finite"),
            "weight_decay": (0 <= self.weight_decay < inf, ">= 0 and finite"),
            "warmup": (0 <= self.warmup <= 1, "in [0, 1]"),
            "decay": (self.decay in ("cosine", "constant"), "'cosine' or 'constant'"),
            "decay_power": (0 < self.decay_power < inf, "> 0 and finite"),
            "floor": (0 <= self.floor <= 1, "in [0, 1]"),
            "clip": (self.clip > 0, "> 0"),
            "precision": (self.precision in ("fp32", "bf16"), "'fp32' or 'bf16'"),
            "workers": (self.workers >= 0, ">= 0"),
            "accumulation": (self.accumulation >= 1, ">= 1"),
            "checkpoint_every": (self.checkpoint_every >= 1, ">= 1"),
        }
        for name, (holds, rule) in rules.items():
            require(holds, name, f"be {rule}", getattr(self, name))

    def rate(self, step: int) -> float:
        """Return the learning rate at a step, 0-based, as a share of the peak."""
        warm = ceil(self.warmup * self.steps)
        if step < warm:
            return self.floor + (1 - self.floor) * (step + 1) / warm
        if self.decay == "constant":
            return 1.0
        power = self.decay_power
        angle = pi * (step - warm) ** power / max(1, self.steps - warm) ** power
        return self.floor + (1 - self.floor) * 0.5 * (1 + cos(angle))


def recipe_options(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON for hashes and provenance, without the settings that do not change results."""
    return {key: value for key, value in asdict(recipe).items() if key not in ("workers", "checkpoint_every")}


def _keep_parameters(optimizer: Any) -> bool:
    return False


@dataclass(frozen=True)
class Hooks:
    """Hold what `fit` calls during a training, and what it saves besides the model.

    **Arguments**

    - `log`: `() -> {name: number}`, called in every step when the gradients exist and are not yet clipped. The row of the
      step gets its result.
    - `after_step`: `(optimizer) -> bool`, called after each step of the optimiser. It returns True if it put other
      parameters in the places of those that model and optimiser had.
    - `states`: objects with `state_dict` and `load_state_dict`. They are saved in every checkpoint, and loaded before the
      tensors of the model, so that they may change its shape.
    """

    log: Callable[[], dict[str, float]] = dict
    after_step: Callable[[Any], bool] = _keep_parameters
    states: Sequence[Stateful] = ()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    from accelerate.utils import set_seed  # noqa: PLC0415

    set_seed(seed)


@torch.inference_mode(False)
def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    recipe: Recipe,
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    hooks: Hooks = Hooks(),
    checkpoint: Path | None = None,
    progress: bool = True,
) -> list[dict[str, int | float]]:
    """Train the parameters of a model that require gradients, in place.

    With `checkpoint`, a call after a killed one goes on from the last saved state and ends with the same weights as an
    undisturbed run.

    **Arguments**

    - `model`: any PyTorch module; it is left in evaluation mode.
    - `batches`: `(steps done) -> batches of the remaining steps`, `recipe.accumulation` for each step.
    - `recipe`: steps, optimiser, schedule, precision, seed.
    - `loss`: `(model, batch) -> scalar`.
    - `hooks`: functions to call in every step, and objects to save with the model.
    - `checkpoint`: folder of saved states; the last one stays there. By default nothing is saved.
    - `progress`: show a progress bar.

    **Returns** one row per step: `step`, `loss`, `learning_rate`, and what `hooks.log` returned.

    **Raises**

    - `FloatingPointError`: the loss is not finite, at the step where it happens.
    - `ValueError`: the batches end before the steps do, or one is empty; the checkpoint has more steps than the recipe; a model
      that was built in inference mode, or whose weights are not in memory.
    """
    check_in_memory(model.state_dict())
    check_differentiable(model)
    training = _Training(model, recipe, loss, hooks, checkpoint)
    history = training.history
    if len(history) > recipe.steps:
        raise ValueError(
            f"`checkpoint` must have at most the {recipe.steps} steps of the recipe, got {len(history)} in {checkpoint}."
        )
    bar = tqdm(total=recipe.steps, initial=len(history), desc="train", unit="step", mininterval=2, disable=not progress)
    training.wrapped.train()
    remaining = iter(batches(len(history)))
    while (
        len(history) < recipe.steps
        and len(parts := list(islice(remaining, recipe.accumulation))) == recipe.accumulation
    ):
        mean = training.step(parts)
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        bar.update()
        if checkpoint and (len(history) % recipe.checkpoint_every == 0 or len(history) == recipe.steps):
            save_training(checkpoint, training.accelerator, history, hooks.states)
    bar.close()
    if len(history) < recipe.steps:
        raise ValueError(
            f"`batches` must have {recipe.accumulation} for each of {recipe.steps} steps, got enough for {len(history)}."
        )
    model.eval()
    return history


class _Training:
    """Hold model, optimiser and history between two steps of `fit`."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        loss: Callable[[nn.Module, Batch], Tensor],
        hooks: Hooks,
        checkpoint: Path | None,
    ) -> None:
        self.model, self.recipe, self.loss, self.hooks = model, recipe, loss, hooks
        self.accelerator = Accelerator()
        seed_everything(recipe.seed)
        saved = find_state(checkpoint)
        load_objects(saved, hooks.states)  # first: they may change which parameters there are
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer: Any = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.history = load_training(saved, self.accelerator)

    def step(self, batches: Sequence[Batch]) -> float:
        """Do one step of the optimiser, append its row to the history, and return the mean loss."""
        mean = self._accumulate(batches)
        logged = self.hooks.log()
        groups = self.optimizer.param_groups
        rate = self.recipe.learning_rate * self.recipe.rate(len(self.history))  # of the step alone: nothing to save
        for group in groups:
            group["lr"] = rate
        self.accelerator.clip_grad_norm_([p for group in groups for p in group["params"]], self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.hooks.after_step(self.optimizer) and self.wrapped is not self.model:
            self.accelerator.free_memory()  # of the wrapper, which keeps the replaced parameters alive
            self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.wrapped.train()
        row = {"step": len(self.history), "loss": mean, "learning_rate": rate}
        self.history.append(row | logged)
        return mean

    def _accumulate(self, batches: Sequence[Batch]) -> float:
        """Add up the gradients of the batches of one step, and return their mean loss."""
        accelerator, recipe, mean = self.accelerator, self.recipe, 0.0
        for part, batch in enumerate(batches, start=1):
            require(not is_empty(batch), "batches", f"hold samples, at step {len(self.history)}", "an empty batch")
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                value = self.loss(self.wrapped, move_batch(batch, accelerator.device)) / recipe.accumulation
            mean += value.item()
            if not isfinite(mean):
                raise FloatingPointError(
                    f"the loss is {value.item()} at step {len(self.history)}: lower `learning_rate` (now "
                    f"{recipe.learning_rate}), lengthen `warmup`, or train in fp32."
                )
            with nullcontext() if part == recipe.accumulation else accelerator.no_sync(self.wrapped):
                accelerator.backward(value)
        return mean
