"""The loss that PREHAB trains with: the loss of the task plus a rank penalty on whitened weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.factorization.moments import all_finite
from lowrank.factorization.spectra import effective_rank, stable_rank, tail_energy
from lowrank.nn.batches import Batch, compute_logits, device_of, eval_mode, move_batch
from lowrank.training.penalties import COLUMNS, PENALTIES, power_step, singular_basis
from lowrank.training.whitened_linear import WhitenedLinear

SMALLEST = 1e-4  # a penalty at the start below this is no unit: it is next to nothing


@dataclass(eq=False)
class PrehabLoss:
    """Add a rank penalty to the loss of a task, log both, and keep the last good weights.

    The penalty of a layer counts in units of its value at the start, or of the value of singular values of 1 if that is next to
    nothing, as of a weight of zeros, which grows. The loss adds the mean over layers, times the strength.

    **Arguments**

    - `layers`: name -> layer to penalise.
    - `ranks`: name -> target rank of the layer.
    - `penalty`: a key of `PENALTIES`.
    - `strength`: `(step) -> factor of the penalty`, >= 0.
    - `refresh`: steps between two decompositions, >= 1.
    - `loss`: `(model, batch) -> scalar`, the loss of the task.
    - `trained`: the parameters that the training changes.

    Set `step`, 0-based, before the first call of a training that resumes.
    """

    layers: Mapping[str, WhitenedLinear]
    ranks: Mapping[str, int]
    penalty: str
    strength: Callable[[int], float | int]
    refresh: int
    loss: Callable[[nn.Module, Batch], Tensor]
    trained: list[nn.Parameter]
    step: int = field(default=0, init=False)
    _units: dict[str, float] = field(default_factory=dict, init=False)
    _bases: dict[str, Tensor] = field(default_factory=dict, init=False)
    _row: dict[str, float | int] = field(default_factory=dict, init=False)
    _gradients: list[Tensor] | None = field(default=None, init=False)
    _good: tuple[int, list[Tensor]] | None = field(default=None, init=False)
    _batch: Batch | None = field(default=None, init=False)

    @torch.no_grad()
    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            compute, flat = PENALTIES[self.penalty], torch.eye(*layer.start.shape).to(layer.start)
            value = compute(layer.start, self.ranks[name]).item()
            if value < SMALLEST:
                value = max(compute(flat, self.ranks[name]).item(), SMALLEST)
            self._units[name] = value

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the loss of a batch and go on to the next step; a task loss that is not finite is returned as it is."""
        self._batch, task = batch, self.loss(model, batch)
        if not isfinite(task.item()):
            return task
        due = self.step % self.refresh == 0
        strength = self.strength(self.step)
        self._row = {"task_loss": task.item(), "penalty": nan, "strength": strength}
        if due:
            self._good = self.step, [parameter.detach().clone() for parameter in self.trained]
            self._decompose()
        self._gradients = None
        if strength > 0:
            value = self._mean_penalty()
            self._row["penalty"] = value.item()
            if due:
                deltas = [layer.delta for layer in self.layers.values()]
                self._gradients = [strength * g for g in torch.autograd.grad(value, deltas, retain_graph=True)]
            task = task + strength * value
        elif due:
            with torch.no_grad():
                self._row["penalty"] = self._mean_penalty().item()
        self.step += 1
        return task

    def log(self) -> dict[str, float | int]:
        """Return the row of the step, with the norm ratio of both gradients if the bases are new."""
        if self._gradients is not None:
            deltas: list[Any] = [layer.delta for layer in self.layers.values()]
            penalty = sum(g.square().sum() for g in self._gradients)
            task: Any = sum((delta.grad - g).square().sum() for delta, g in zip(deltas, self._gradients, strict=True))
            self._row["gradient_ratio"] = float(penalty / task) ** 0.5 if task else nan
            self._gradients = None
        return self._row

    def recover(self, model: nn.Module) -> str:
        """Restore the last good weights, and describe in a sentence which layer failed first."""
        failed = self._find_failed(model)
        if self._good is None:
            kept = "`model` is as it was before."
        else:
            step, values = self._good
            with torch.no_grad():
                for parameter, value in zip(self.trained, values, strict=True):
                    parameter.copy_(value)
            kept = f"`model` has the weights before step {step}."
        return f"{f'The first layer that is not finite is {failed!r}' if failed else 'All layers are finite'}; {kept}"

    @torch.no_grad()
    def _find_failed(self, model: nn.Module) -> str | None:
        """Return the first layer whose weight, else whose output for the last batch, is not finite."""
        for name, layer in self.layers.items():
            if not all_finite(layer.weight):
                return name
        failed: list[str] = []

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            return lambda module, inputs, output: None if all_finite(output) else failed.append(name)

        handles = [layer.register_forward_hook(watch(name)) for name, layer in self.layers.items()]
        if self._batch is not None:
            with eval_mode(model):
                compute_logits(model, move_batch(self._batch, device_of(model)))
        for handle in handles:
            handle.remove()
        return next(iter(failed), None)

    def _mean_penalty(self) -> Tensor:
        """Compute the mean of the layers' penalties from the bases of the last decomposition."""
        values = []
        for name, layer in self.layers.items():
            weight = layer.whitened_weight()
            if self._bases[name].shape[1] == 1 and self.step % self.refresh:
                self._bases[name] = power_step(weight, self._bases[name])
            values.append(PENALTIES[self.penalty](weight, self.ranks[name], self._bases[name]) / self._units[name])
        return torch.stack(values).mean()

    @torch.no_grad()
    def _decompose(self) -> None:
        """Compute new bases, and add the ranks of the whitened weights to the row."""
        measures = []
        for name, layer in self.layers.items():
            weight, rank = layer.whitened_weight(), self.ranks[name]
            basis = singular_basis(weight)
            sigma = (basis.T @ (weight if len(weight) <= weight.shape[1] else weight.T)).norm(dim=1)
            measures.append(torch.stack([stable_rank(sigma), effective_rank(sigma), tail_energy(sigma, rank)]))
            self._bases[name] = basis[:, : COLUMNS[self.penalty](len(basis), rank)]
        means = torch.stack(measures).mean(0).tolist()
        self._row |= dict(zip(("stable_rank", "effective_rank", "tail_energy"), means, strict=True))
