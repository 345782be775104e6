"""PREHAB: training that prepares a model for truncation, by a rank penalty on its whitened weights.

W = W0 + D S^-1 with D = 0 at the start. The training changes D and penalises W S = W0 S + D. The penalty is the mean over layers
of each layer's penalty divided by its value at the start. So one strength means the same in every layer and model: the rise of
the task loss that removing the penalty completely is worth. At the end D is folded into the weight. The statistics of the new
model have to be collected again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import cos, inf, isfinite, pi
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.factorization.moments import LayerStatistics, all_finite, read_moment
from lowrank.factorization.rank_allocation import allocate_ranks
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.hashing import check_in_memory
from lowrank.nn.batches import Batch
from lowrank.nn.targets import find_linears, find_shared_weights
from lowrank.training.loop import Hooks, Recipe, fit
from lowrank.training.penalties import PENALTIES, TARGET_KEEP
from lowrank.training.prehab_loss import PrehabLoss
from lowrank.training.refine import model_loss, repeat_batches
from lowrank.training.whitened_linear import whiten_layers

RAMP = 0.3  # share of the steps in which a schedule reaches its end

# The share of the strength at a share of the ramp, in [0, 1].
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: done,
    "cosine": lambda done: 0.5 * (1 - cos(pi * done)),
    "geometric": lambda done: 1e5 ** (done - 1),  # five orders of magnitude, as published
}


@check_arguments
@dataclass(frozen=True)
class PrehabConfig:
    """Hold the settings of PREHAB.

    **Arguments**

    - `penalty`: a key of `PENALTIES`.
    - `strength`: lambda, finite and >= 0, in units of the loss. 0 is the control: the same training without a penalty.
    - `steps`: steps of the optimiser, >= 0.
    - `target_keep`: share of parameters to keep, in (0, 1]. It sets the target rank of every layer for the penalty 'tail'.
    - `schedule`: of the strength over the first 30 % of the steps, a key of `SCHEDULES`.
    - `others`: train all other parameters that are not frozen too.
    - `shrinkage`: > 0, added to the eigenvalues of the second moments, relative to their mean. It bounds S^-1.
    - `refresh`: steps between two singular value decompositions, >= 1.

    **Raises**

    - `ValueError`: a value out of its range.
    """

    penalty: str = "tail"
    strength: float | int = 1.0
    steps: int = 200
    target_keep: float | int = TARGET_KEEP
    schedule: str = "cosine"
    others: bool = False
    shrinkage: float | int = 0.01
    refresh: int = 10

    def __post_init__(self) -> None:
        rules = {
            "penalty": (self.penalty in PENALTIES, f"one of {sorted(PENALTIES)}"),
            "schedule": (self.schedule in SCHEDULES, f"one of {sorted(SCHEDULES)}"),
            "strength": (isfinite(self.strength) and self.strength >= 0, "finite and >= 0"),
            "steps": (self.steps >= 0, ">= 0"),
            "target_keep": (0 < self.target_keep <= 1, "in (0, 1]"),
            "shrinkage": (0 < self.shrinkage < inf, "> 0 and finite"),
            "refresh": (self.refresh >= 1, ">= 1"),
        }
        for name, (holds, rule) in rules.items():
            require(holds, name, f"be {rule}", getattr(self, name))

    def strength_at(self, step: int) -> float | int:
        """Return the factor of the penalty at a step, 0-based."""
        return self.strength * SCHEDULES[self.schedule](min(1.0, step / max(1.0, RAMP * self.steps)))


class PrehabResult(NamedTuple):
    """Hold a prepared model and the history of its training.

    **Arguments**

    - `model`: the model passed to `prehab`, trained and with plain weights again.
    - `history`: one row per step, for a DataFrame: `step`, `loss` (task and penalty), `learning_rate`, `task_loss`,
      `penalty`, `strength`. Every `refresh` steps also `gradient_ratio`, the norm of the gradient of strength times penalty
      over the norm of the gradient of the task; and `stable_rank`, `effective_rank`, `tail_energy`, means over layers of the
      whitened weights before the step.
    """

    model: nn.Module
    history: list[dict[str, Any]]


@torch.inference_mode(False)  # the whitened weights are trained
@check_arguments
def prehab(
    model: nn.Module,
    statistics: Mapping[str, LayerStatistics],
    batches: Iterable[Batch],
    config: PrehabConfig = PrehabConfig(),
    *,
    recipe: Recipe | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = model_loss,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> PrehabResult:
    """Train a model, in place, towards whitened weights of low rank.

    **Arguments**

    - `model`: any PyTorch module with linear layers.
    - `statistics`: layer name -> statistics of this model. The training changes these layers, except frozen ones.
    - `batches`: with labels. They are repeated as often as the steps need, so a generator is refused. To resume exactly,
      their order must be the same each time.
    - `config`: penalty, strength, steps.
    - `recipe`: of the optimiser. Its steps are replaced by `config.steps`, and its `checkpoint_every` is a multiple of
      `config.refresh`. By default a peak learning rate of 1e-4 without weight decay.
    - `loss`: `(model, batch) -> scalar`; by default the model's, else the cross-entropy.
    - `checkpoint`: folder of saved states. A call after a killed one goes on from there. By default nothing is saved.
    - `progress`: show a progress bar.

    **Returns** `PrehabResult`. With 0 steps the model stays the same bit for bit.

    **Raises**

    - `ValueError`: before anything is changed: statistics of other layers or shapes; shared weights; weights that are not in
      memory; no layer to train. At the first step: no batches.
    - `FloatingPointError`: a loss that is not finite. The message names step and layer. The model has the last weights that
      were finite, as plain weights.

    **Reference** Qin et al., Low-Rank Prehab, arXiv:2512.01980, section 3.
    """
    recipe = recipe or Recipe(config.steps, learning_rate=1e-4, weight_decay=0.0)
    rule = f"have a `checkpoint_every` that is a multiple of `refresh`, {config.refresh}"
    require(recipe.checkpoint_every % config.refresh == 0, "recipe", rule, recipe.checkpoint_every)
    check_in_memory(model.state_dict())
    layers = _select_layers(model, statistics)
    ranks = allocate_ranks({name: tuple(layer.weight.shape) for name, layer in layers.items()}, config.target_keep)
    following = repeat_batches(batches)
    if config.steps == 0:
        return PrehabResult(model, [])
    with whiten_layers(model, layers, statistics, config.shrinkage, config.others) as whitened:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        both = PrehabLoss(whitened, ranks, config.penalty, config.strength_at, config.refresh, loss, trained)

        def resume_at(done: int) -> Iterator[Batch]:
            both.step = done
            return following(done)

        recipe, hooks = replace(recipe, steps=config.steps), Hooks(log=both.log)
        try:
            history = fit(model, resume_at, recipe, both, hooks=hooks, checkpoint=checkpoint, progress=progress)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} {both.recover(model)}") from error
    return PrehabResult(model, history)


def _select_layers(model: nn.Module, statistics: Mapping[str, LayerStatistics]) -> dict[str, nn.Linear]:
    """Return the layers to train: all that the statistics name, except frozen ones."""
    modules = dict(model.named_modules())
    if unknown := [name for name in statistics if not isinstance(modules.get(name), nn.Linear)]:
        raise ValueError(f"`statistics` must be of this model, got layer {unknown[0]!r}, which it does not have.")
    layers = find_linears(model, statistics) if len(statistics) else {}
    for name, layer in layers.items():
        _check_layer(name, layer, statistics[name])
    for name, names in find_shared_weights(model, layers).items():
        raise ValueError(f"`statistics` must leave out layer {name!r}: its weight is shared ({', '.join(names)}).")
    free = {name: layer for name, layer in layers.items() if layer.weight.requires_grad}
    if not free:
        raise ValueError("`statistics` must name at least one layer whose weight is not frozen, got none.")
    return free


def _check_layer(name: str, layer: nn.Linear, statistics: LayerStatistics) -> None:
    try:
        read_moment(statistics, "gram", layer.weight)
    except ValueError as error:
        raise ValueError(f"{error} (layer {name!r})") from error
    if not all_finite(layer.weight):
        raise ValueError(f"`model` must have finite weights, got NaN or infinity in layer {name!r}.")
