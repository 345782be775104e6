"""PREHAB: training that prepares a model for truncation, by a rank penalty on its whitened weights.

W = W0 + D S^-1 with D = 0 at the start; what is trained is D, what is penalised is W S = W0 S + D. The penalty is the mean
over layers of each layer's own over its value at the start, so one strength means the same in every layer and model: the
rise of the task loss that wiping the penalty out is worth. At the end D is folded into the weight; the statistics of the new
model have to be collected anew.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import cos, isfinite, nan, pi
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.factorization.moments import LayerStatistics, all_finite
from lowrank.factorization.rank_allocation import allocate_ranks
from lowrank.factorization.spectra import effective_rank, stable_rank, tail_energy
from lowrank.nn.batches import Batch, device_of, evaluating, logits, to_device
from lowrank.nn.targets import find_linears, shared_weights
from lowrank.training.loop import Recipe, fit
from lowrank.training.penalties import COLUMNS, PENALTIES, TARGET_KEEP, basis_of, power_step
from lowrank.training.refine import endless, model_loss
from lowrank.training.whitened_linear import WhitenedLinear, whitened_weights

SMALLEST = 1e-4  # unit of a penalty: a layer whose own is below this at the start has next to nothing to give
RAMP = 0.3  # share of the steps in which a schedule reaches its end

# The share of the strength at a share of the ramp, in [0, 1].
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: done,
    "cosine": lambda done: 0.5 * (1 - cos(pi * done)),
    "geometric": lambda done: 1e5 ** (done - 1),  # five orders of magnitude, as published
}


class PrehabResult(NamedTuple):
    """`model`: the one that was given, trained and with plain weights again. `history`: one row per step, for a DataFrame:
    `step`, `loss` (of both), `learning_rate`, `task_loss`, `penalty`, `strength`; every `refresh` steps also `gradient_ratio`,
    the norm of the penalty's gradient, times the strength, over that of the task; and `stable_rank`, `effective_rank`,
    `tail_energy`, means over layers of the whitened weights before the step."""

    model: nn.Module
    history: list[dict[str, Any]]


def prehab(
    model: nn.Module,
    statistics: Mapping[str, LayerStatistics],
    batches: Iterable[Batch],
    *,
    penalty: str = "tail",
    strength: float | int = 1.0,
    steps: int = 200,
    target_keep: float | int = TARGET_KEEP,
    schedule: str = "cosine",
    others: bool = False,
    shrinkage: float | int = 0.01,
    refresh: int = 10,
    recipe: Recipe | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = model_loss,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> PrehabResult:
    """Trains a model, in place, towards whitened weights of low rank.

    **Arguments:** `statistics`: of this model; the layers that they name are trained, except those whose weight is frozen.
    `batches`: with labels; gone through again and again, so no generator; to resume exactly, in the same order each time.
    `penalty`: a key of `PENALTIES`. `strength`: lambda >= 0, in units of the loss; 0 is the control, the same training without
    a penalty. `steps`: >= 0. `target_keep`: in (0, 1], the uniform kept share whose ranks `tail` looks beyond. `schedule`: of
    the strength over the first 30 % of the steps, a key of `SCHEDULES`. `others`: train all other parameters that are not
    frozen too. `shrinkage`: > 0, of the second moments, relative to their mean eigenvalue: bounds S^-1. `refresh`: steps
    between singular value decompositions. `recipe`: of the optimiser; its steps are replaced by `steps`; by default a peak
    learning rate of 1e-4 without weight decay. `loss`: `(model, batch) -> scalar`. `checkpoint`: a folder; a call that follows a
    killed one goes on from there. `checkpoint_every`: steps between saves, a multiple of `refresh`.

    **Returns:** `PrehabResult`. With 0 steps the model is returned bit for bit.

    **Raises:** `ValueError`, before anything is changed: an unknown penalty or schedule, a number out of its range, statistics
    of other layers or shapes, shared weights, no layer to train; at the first step: no batches. `FloatingPointError`: a loss
    that is not finite; the message names step and layer, and the model holds the last state that was looked at and found
    good, with plain weights.

    **Reference:** Qin et al., Low-Rank Prehab, arXiv:2512.01980, section 3.
    """
    layers = _checked(model, statistics, penalty, strength, steps, schedule, shrinkage, refresh, checkpoint_every)
    ranks = allocate_ranks({name: tuple(layer.weight.shape) for name, layer in layers.items()}, target_keep)
    following = endless(batches)
    if steps == 0:
        return PrehabResult(model, [])
    recipe = replace(recipe or Recipe(steps, learning_rate=1e-4, weight_decay=0.0), steps=steps)
    with whitened_weights(model, layers, statistics, shrinkage, others) as wrapped:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        phase = _Phase(wrapped, ranks, penalty, strength, SCHEDULES[schedule], steps, refresh, loss, trained)

        def from_step(done: int) -> Iterator[Batch]:
            phase.step = done
            return following(done)

        options: dict[str, Any] = dict(checkpoint=checkpoint, checkpoint_every=checkpoint_every, progress=progress)
        try:
            history = fit(model, from_step, recipe, phase, log=phase.log, **options)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} {phase.rescued(model)}") from error
    return PrehabResult(model, history)


@dataclass(eq=False)
class _Phase:
    """Task loss and penalty of the step at hand, what is to be said of it, and the last good state."""

    layers: dict[str, WhitenedLinear]
    ranks: dict[str, int]
    penalty: str
    strength: float | int
    schedule: Callable[[float], float]
    steps: int
    refresh: int
    loss: Callable[[nn.Module, Batch], Tensor]
    trained: list[nn.Parameter]
    step: int = 0
    bases: dict[str, Tensor] = field(default_factory=dict)
    row: dict[str, float] = field(default_factory=dict)
    gradients: list[Tensor] | None = None
    good: tuple[int, list[Tensor]] | None = None
    batch: Batch | None = None

    def __post_init__(self) -> None:
        """What each layer's penalty is counted in: its value at the start."""
        with torch.no_grad():
            self.units = {
                name: max(PENALTIES[self.penalty](layer.start, self.ranks[name]).item(), SMALLEST)
                for name, layer in self.layers.items()
            }

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        self.batch, task = batch, self.loss(model, batch)
        if not isfinite(task.item()):
            return task
        due = self.step % self.refresh == 0
        strength = self.strength * self.schedule(min(1.0, self.step / max(1.0, RAMP * self.steps)))
        self.row = {"task_loss": task.item(), "penalty": nan, "strength": strength}
        if due:
            self.good = self.step, [parameter.detach().clone() for parameter in self.trained]
            self._decompose()
        self.gradients = None
        if strength > 0:
            value = self._value()
            self.row["penalty"] = value.item()
            if due:
                deltas = [layer.delta for layer in self.layers.values()]
                self.gradients = [strength * g for g in torch.autograd.grad(value, deltas, retain_graph=True)]
            task = task + strength * value
        elif due:
            with torch.no_grad():
                self.row["penalty"] = self._value().item()
        self.step += 1
        return task

    def log(self) -> dict[str, float]:
        """The row of the step; where the penalty's gradients are known, also their size beside those of the task."""
        if self.gradients is not None:
            deltas: list[Any] = [layer.delta for layer in self.layers.values()]
            own = sum(g.square().sum() for g in self.gradients)
            rest: Any = sum((delta.grad - g).square().sum() for delta, g in zip(deltas, self.gradients, strict=True))
            self.row["gradient_ratio"] = float(own / rest) ** 0.5 if rest else nan
            self.gradients = None
        return self.row

    def _value(self) -> Tensor:
        """The mean of the layers' penalties, seen through the bases at hand."""
        values = []
        for name, layer in self.layers.items():
            weight = layer.whitened()
            if self.bases[name].shape[1] == 1 and self.step % self.refresh:
                self.bases[name] = power_step(weight, self.bases[name])
            values.append(PENALTIES[self.penalty](weight, self.ranks[name], self.bases[name]) / self.units[name])
        return torch.stack(values).mean()

    @torch.no_grad()
    def _decompose(self) -> None:
        """New bases; on the way the ranks of the whitened weights, which go into the row."""
        found = []
        for name, layer in self.layers.items():
            weight, rank = layer.whitened(), self.ranks[name]
            basis = basis_of(weight)
            sigma = (basis.T @ (weight if len(weight) <= weight.shape[1] else weight.T)).norm(dim=1)
            found.append([stable_rank(sigma), effective_rank(sigma), tail_energy(sigma, rank)])
            self.bases[name] = basis[:, : COLUMNS[self.penalty](len(basis), rank)]
        means = torch.tensor(found).mean(0).tolist()
        self.row |= dict(zip(("stable_rank", "effective_rank", "tail_energy"), means, strict=True))

    @torch.no_grad()
    def rescued(self, model: nn.Module) -> str:
        """Puts the last good state back; says which layer is the first whose weight or output is not finite."""
        bad = next((name for name, layer in self.layers.items() if not all_finite(layer.weight)), None)
        seen: list[str] = []

        def look(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            return lambda module, args, output: None if all_finite(output) else seen.append(name)

        handles = [layer.register_forward_hook(look(name)) for name, layer in self.layers.items()]
        if bad is None and self.batch is not None:
            with evaluating(model):
                logits(model, to_device(self.batch, device_of(model)))
        for handle in handles:
            handle.remove()
        if self.good is None:
            kept = "`model` is as it was given."
        else:
            step, values = self.good
            for parameter, value in zip(self.trained, values, strict=True):
                parameter.copy_(value)
            kept = f"`model` holds the weights before step {step}."
        where = bad or next(iter(seen), None)
        return f"{f'The first layer that is not finite is {where!r}' if where else 'All layers are finite'}; {kept}"


def _checked(
    model: nn.Module,
    statistics: Mapping[str, LayerStatistics],
    penalty: str,
    strength: float | int,
    steps: int,
    schedule: str,
    shrinkage: float | int,
    refresh: int,
    checkpoint_every: int,
) -> dict[str, nn.Linear]:
    """The layers to train, once everything that can be wrong has been looked for."""
    for name, value, known in (("penalty", penalty, PENALTIES), ("schedule", schedule, SCHEDULES)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {sorted(known)}, got {value!r}.")
    rules = {
        "strength": (strength, isfinite(strength) and strength >= 0, "finite and >= 0"),
        "steps": (steps, steps >= 0, ">= 0"),
        "shrinkage": (shrinkage, shrinkage > 0, "> 0"),
        "refresh": (refresh, refresh >= 1, ">= 1"),
        "checkpoint_every": (
            checkpoint_every,
            refresh >= 1 and checkpoint_every >= 1 and checkpoint_every % refresh == 0,
            f"a multiple of `refresh`, {refresh}",
        ),
    }
    for name, (value, holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"`{name}` must be {rule}, got {value}.")
    modules = dict(model.named_modules())
    if unknown := [name for name in statistics if not isinstance(modules.get(name), nn.Linear)]:
        raise ValueError(f"`statistics` must be of this model, got layer {unknown[0]!r}, which it does not have.")
    layers = find_linears(model, statistics) if len(statistics) else {}
    for name, layer in layers.items():
        found = statistics[name]
        if len(found.gram) != layer.in_features or not all_finite(found.gram):
            raise ValueError(
                f"`statistics` must be of this model and finite: layer {name!r} has {layer.in_features} inputs, got moments for "
                f"{len(found.gram)}{'' if all_finite(found.gram) else ' with NaN or infinity'}."
            )
        if not all_finite(layer.weight):
            raise ValueError(f"`model` must have finite weights, got NaN or infinity in layer {name!r}.")
    for name, names in shared_weights(model, layers).items():
        raise ValueError(f"`statistics` must leave out layer {name!r}: its weight is shared ({', '.join(names)}).")
    free = {name: layer for name, layer in layers.items() if layer.weight.requires_grad}
    if not free:
        raise ValueError("`statistics` must name at least one layer whose weight is not frozen, got none.")
    return free
