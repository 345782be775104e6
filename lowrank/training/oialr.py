"""OIALR: training at full rank first, then with the orthogonal bases of every weight fixed and ranks that fall.

After the conversion W = U S V^T only S is trained (and all that was never converted). A refresh turns the bases into the singular
vectors of W and cuts the rank where singular values are small beside the largest.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.factorization.moments import all_finite
from lowrank.io.distributed import agreed, processes
from lowrank.nn.surgery import replace_module
from lowrank.nn.targets import ENDS
from lowrank.nn.usv import USV, convertible, usv_kind
from lowrank.training.oialr_file import read_training, write_training
from lowrank.training.optimizer_state import replace_parameter
from lowrank.training.stability import BasisMonitor

TRIGGERS = ("schedule", "mean", "layer")


def cut_rank(singular_values: Tensor | Sequence[float], rank: int, sigma_cutoff: float | int, minimum: int) -> int:
    """The rank to go on with: the number of values >= `sigma_cutoff` times the largest, at most halved, at least `minimum`.

    **Arguments:** `singular_values`: `(rank,)`, any order, compared in their own dtype. `rank`: the rank now.
    `sigma_cutoff`: beta in [0, 1); 0 cuts nothing. `minimum`: >= 0, below which no cut goes.

    **Returns:** an int in [1, rank].

    **Raises:** `ValueError`: a number out of its range, another number of values, values that are negative or not finite.

    **Reference:** Coquelin et al., arXiv:2401.08505, section 4; the halving is that of the published code.
    """
    values = torch.as_tensor(singular_values)
    values = values if values.is_floating_point() else values.double()
    rules = {
        "rank": (rank, rank >= 1, ">= 1"),
        "sigma_cutoff": (sigma_cutoff, 0 <= sigma_cutoff < 1, "in [0, 1)"),
        "minimum": (minimum, minimum >= 0, ">= 0"),
        "singular_values": (tuple(values.shape), values.shape == (rank,), f"of shape ({rank},)"),
    }
    _hold(rules)
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("`singular_values` must be finite and >= 0, got NaN, infinity or a negative value.")
    suggested = int((values >= sigma_cutoff * values.max()).sum())
    if suggested < rank / 2 and rank / 2 > minimum:
        return rank // 2
    return min(rank, max(suggested, minimum))


class OIALR:
    """Converts the layers of a model while it is trained; call `step(optimizer)` after every `optimizer.step()`.

    **Arguments:** `model`: any module, trained in place. `include`, `exclude`: names or patterns of `nn.Linear` and `nn.Conv2d`
    modules, by default all but output layers and embeddings; `skipped` names the layers left out for another reason.
    `delay`: optimiser steps at full rank, >= 1. `frequency`: steps between refreshes, >= 1; the first is at `delay`.
    `sigma_cutoff`: beta of `cut_rank`, in [0, 1). `minimum`: the share of the full rank below which no cut goes, in [0, 1].
    `coverage`: check c refreshes the last c int(coverage (L - 1)) of the L layers, all where that is 0; in [0, 1]. `trigger`:
    'schedule' converts at `delay`, as the published code; our own: 'mean' and 'layer' measure the stability of the bases every
    `frequency` steps and convert, at `delay` at the earliest, all layers once the mean, or each layer once its own, was at
    least `threshold` `checks` times running.

    `history`: a row per refresh and layer: `step`; `layer`; `stability`, of the check that led here, else NaN; `rank`;
    `full_rank`; `discarded`, the Frobenius norm that the cut took from the weight. `ranks`: layer -> rank.

    Under `torch.distributed` each process decomposes a share of the layers and all go on with the same tensors.

    **Raises:** `ValueError`: a number out of its range, an unknown trigger, a pattern that matches nothing, no eligible layer.

    **Reference:** Coquelin et al., Harnessing Orthogonality to Train Low-Rank Neural Networks, arXiv:2401.08505, section 4.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        include: Iterable[str] = (".*",),
        exclude: Iterable[str] = ENDS,
        delay: int = 1000,
        frequency: int = 100,
        sigma_cutoff: float | int = 0.1,
        minimum: float | int = 0.01,
        coverage: float | int = 0.1,
        trigger: str = "schedule",
        threshold: float | int = 0.99,
        checks: int = 3,
    ) -> None:
        rules = {
            "delay": (delay, delay >= 1, ">= 1"),
            "frequency": (frequency, frequency >= 1, ">= 1"),
            "sigma_cutoff": (sigma_cutoff, 0 <= sigma_cutoff < 1, "in [0, 1)"),
            "minimum": (minimum, 0 <= minimum <= 1, "in [0, 1]"),
            "coverage": (coverage, 0 <= coverage <= 1, "in [0, 1]"),
            "trigger": (trigger, trigger in TRIGGERS, f"one of {TRIGGERS}"),
            "threshold": (threshold, -1 <= threshold <= 1, "in [-1, 1]"),
            "checks": (checks, checks >= 1, ">= 1"),
        }
        _hold(rules)
        self.settings = {name: value for name, (value, _, _) in rules.items()}
        self.model = model
        self.layers, self.skipped = convertible(model, include, exclude)
        self.dense_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.steps = self.checks = 0
        self.ranks: dict[str, int] = {}
        self.history: list[dict[str, Any]] = []
        self.streaks = dict.fromkeys(self.layers, 0)
        self.monitor = BasisMonitor(1, self.layers, progress=False)

    def step(self, optimizer: Any) -> bool:
        """Counts a step of the optimiser, and converts and refreshes what is due.

        **Returns:** whether parameters were replaced, in the model and in the optimiser: a `DistributedDataParallel` around
        the model has to be made anew.

        **Raises:** `ValueError`: weights that are not finite, by name; an optimiser that does not hold them.
        """
        own = self.settings
        self.steps += 1
        if (self.steps - own["delay"]) % own["frequency"] or (
            self.steps < own["delay"] and own["trigger"] == "schedule"
        ):
            return False
        for name in self.layers:
            module = self._at(name)
            if not all_finite(module.s.detach() if name in self.ranks else module.weight.detach()):
                raise ValueError(
                    f"`model` must have finite weights, got NaN or infinity in layer {name!r} at step {self.steps}."
                )
        stability = self._stability() if own["trigger"] != "schedule" else {}
        due = self._due() if self.steps >= own["delay"] else []
        changed = self._decomposed(due, self._convert, optimizer, stability)
        if self.ranks:
            self.checks += 1
            changed |= self._decomposed(self._covered(), self._refresh, optimizer, stability)
        self._keep_from_ddp()
        return changed

    def _keep_from_ddp(self) -> None:
        """DDP would send the fixed bases again in every pass."""
        bases = [f"{name}.{part}" for name in self.ranks for part in ("u", "vh")]
        vars(self.model)["_ddp_params_and_buffers_to_ignore"] = bases

    def merge(self) -> nn.Module:
        """Multiplies all converted layers out to plain ones, in place; the training is over. Returns the model."""
        for name in self.ranks:
            replace_module(self.model, name, self._at(name).merged())
        self.ranks = {}
        return self.model

    def parameter_counts(self) -> dict[str, int]:
        """`trainable`: parameters that the optimiser moves; `stored`: all parameters and the fixed bases; `dense`: those of the
        model before any conversion. Training few parameters is no compression: at full rank more is stored than before."""
        own = list(self.model.parameters())
        bases = sum(m.u.numel() + m.vh.numel() for m in map(self._at, self.ranks))
        trainable = sum(p.numel() for p in own if p.requires_grad)
        return {"trainable": trainable, "stored": sum(p.numel() for p in own) + bases, "dense": self.dense_parameters}

    def _at(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def _stability(self) -> dict[str, float]:
        """Of the layers that are not converted yet, against the check before; counts how often running they were stable."""
        left = [name for name in self.layers if name not in self.ranks]
        self.monitor.include = tuple(left)
        found = {row["layer"]: row["stability"] for row in self.monitor.check(self.model)} if left else {}
        mean = float(torch.tensor(list(found.values())).nanmean()) if found else float("nan")
        for name, value in found.items():
            judged = mean if self.settings["trigger"] == "mean" else value
            self.streaks[name] = self.streaks[name] + 1 if judged >= self.settings["threshold"] else 0
        return found

    def _due(self) -> list[str]:
        left = [name for name in self.layers if name not in self.ranks]
        if self.settings["trigger"] == "schedule":
            return left
        return agreed([name for name in left if self.streaks[name] >= self.settings["checks"]], owner=0)

    def _covered(self) -> list[str]:
        count = self.checks * int((len(self.layers) - 1) * self.settings["coverage"]) or len(self.layers)
        return [name for name in list(self.layers)[-count:] if name in self.ranks]

    def _decomposed(
        self, names: list[str], act: Callable[..., bool], optimizer: Any, stability: dict[str, float]
    ) -> bool:
        """Decomposes the layers named, each in one process, and acts on all of them in every process."""
        world, rank = processes()
        found = {name: self._decompose(name) for place, name in enumerate(names) if place % world == rank}
        changed = False
        for place, name in enumerate(names):
            usv, turns, row = agreed(found.pop(name, None), owner=place % world)
            if row:
                about = {"step": self.steps, "layer": name, "stability": stability.get(name, float("nan"))}
                self.history.append(about | row)
            changed |= act(name, usv, turns, optimizer)
        return changed

    @torch.no_grad()
    def _decompose(self, name: str) -> tuple[USV, tuple[Tensor, Tensor], dict[str, Any]]:
        """New matrices of a layer, how gradients turn into theirs, and a row of the history. On the CPU, float64."""
        module = self._at(name)
        if name not in self.ranks:
            u, sigma, vh = torch.linalg.svd(module.weight.detach().double().flatten(1), full_matrices=False)
            return _on_cpu(USV(u, sigma.diag(), vh)), _on_cpu((u.T, vh)), {}
        # bases that rounding has bent are made orthonormal first: W = Q1 (R1 S R2^T) Q2^T
        old = module.usv
        (q1, r1), (q2, r2) = torch.linalg.qr(old.u), torch.linalg.qr(old.vh.T)
        a, sigma, bh = torch.linalg.svd(r1 @ old.s @ r2.T)
        full = min(self.layers[name][0], self.layers[name][1:].numel())
        rank = cut_rank(sigma, len(sigma), self.settings["sigma_cutoff"], int(self.settings["minimum"] * full))
        usv = USV(q1 @ a[:, :rank], sigma[:rank].diag(), bh[:rank] @ q2.T)
        row = {"rank": rank, "full_rank": full, "discarded": float(sigma[rank:].norm())}
        return _on_cpu(usv), _on_cpu((a[:, :rank].T @ r1, bh[:rank] @ r2)), row

    def _convert(self, name: str, usv: USV, turns: tuple[Tensor, Tensor], optimizer: Any) -> bool:
        dense = self._at(name)
        made = usv_kind(dense).from_dense(dense, usv)
        replace_parameter(optimizer, dense.weight, made.s, *turns)
        replace_module(self.model, name, made)
        self.ranks[name] = made.rank
        return True

    def _refresh(self, name: str, usv: USV, turns: tuple[Tensor, Tensor], optimizer: Any) -> bool:
        module = self._at(name)
        old = module.s
        new = module.set_usv(usv)
        replace_parameter(optimizer, old, new, *turns)
        self.ranks[name] = module.rank
        return new is not old

    def state_dict(self) -> dict[str, Any]:
        """Where the training stands, without the model's tensors: plain values, and tensors for the stability triggers."""
        return {
            "settings": self.settings,
            "layers": {name: list(shape) for name, shape in self.layers.items()},
            "dense": self.dense_parameters,
            "steps": self.steps,
            "checks": self.checks,
            "ranks": self.ranks,
            "streaks": self.streaks,
            "history": self.history,
            "monitor": self.monitor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. The model gets layers of the recorded ranks, whose tensors are still to be
        loaded; build the optimiser, or load its state, after this.

        **Raises:** `ValueError`, before anything is changed: the state is of another model or of other settings.
        """
        given = {name: torch.Size(shape) for name, shape in state["layers"].items()}
        for name in dict.fromkeys([*given, *self.layers]):
            if given.get(name) != self.layers.get(name):
                theirs, ours = (tuple(side[name]) if name in side else "no such layer" for side in (given, self.layers))
                raise ValueError(
                    f"`state` must be of this model: for layer {name!r} it has {theirs}, the model {ours}."
                )
        if state["dense"] != self.dense_parameters:
            raise ValueError(
                f"`state` must be of this model with {self.dense_parameters} parameters, got {state['dense']}."
            )
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(f"`{name}` must be as before, {state['settings'].get(name)!r}, got {value!r}.")
        for name, rank in state["ranks"].items():
            layer = self._at(name)
            if name in self.ranks:
                layer.set_usv(_blank(self.layers[name], rank))
            else:
                replace_module(self.model, name, usv_kind(layer).from_dense(layer, _blank(self.layers[name], rank)))
        self.steps, self.checks, self.ranks = state["steps"], state["checks"], dict(state["ranks"])
        self.streaks, self.history = dict(state["streaks"]), list(state["history"])
        self.monitor.load_state_dict(state["monitor"])
        self._keep_from_ddp()

    def save(self, path: Path | str) -> None:
        """Writes model and state to one safetensors file, whole or not at all; the ranks stand in its metadata."""
        write_training(Path(path), self.model, self.state_dict())

    def load(self, path: Path | str) -> None:
        """Reads what `save` wrote: layers of the saved ranks, their tensors, and where the training stood.

        **Raises:** `FileNotFoundError`. `ValueError`, before anything is changed: not such a file; of another model or settings.
        """
        tensors, state = read_training(Path(path))
        self.load_state_dict(state)
        self.model.load_state_dict(tensors)


def _blank(shape: torch.Size, rank: int) -> USV:
    out, flat = shape[0], shape[1:].numel()
    return USV(torch.zeros(out, rank), torch.zeros(rank, rank), torch.zeros(rank, flat))


def _on_cpu(parts: Any) -> Any:
    moved = [part.cpu() for part in parts]
    return type(parts)(*moved) if isinstance(parts, USV) else tuple(moved)


def _hold(rules: dict[str, tuple[Any, bool, str]]) -> None:
    for name, (value, holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"`{name}` must be {rule}, got {value!r}.")
