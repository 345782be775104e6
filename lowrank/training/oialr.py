"""OIALR: train at full rank first, then fix the orthogonal bases of every weight and let the ranks fall.

After the conversion W = U S V^T, only S is trained, and everything that is never converted. A refresh turns the bases into the
singular vectors of W, and cuts the rank if singular values are small beside the largest.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.factorization.moments import all_finite
from lowrank.factorization.precision import with_float64
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.distributed import broadcast, process_count, process_index
from lowrank.io.hashing import check_in_memory
from lowrank.nn.convertible import find_convertible
from lowrank.nn.surgery import replace_module
from lowrank.nn.targets import HEADS_AND_EMBEDDINGS
from lowrank.nn.usv import USV, find_usv_class
from lowrank.training.optimizer_state import replace_parameter
from lowrank.training.rank_cut import cut_rank


@check_arguments
@dataclass(frozen=True)
class OIALRConfig:
    """Hold when `OIALR` converts and refreshes layers, and how far it cuts their ranks.

    **Arguments**

    - `delay`: steps of the optimiser at full rank, >= 1. Then all layers are converted and refreshed for the first time.
    - `frequency`: steps between two refreshes, >= 1.
    - `sigma_cutoff`: beta of `cut_rank`, in [0, 1).
    - `minimum`: no cut goes below this share of the full rank, in [0, 1].
    - `coverage`: in [0, 1]. Refresh c covers the last c int(coverage (L - 1)) of the L layers, or all layers if this is 0.

    **Raises**

    - `ValueError`: a value out of its range.
    """

    delay: int = 1000
    frequency: int = 100
    sigma_cutoff: float | int = 0.1
    minimum: float | int = 0.01
    coverage: float | int = 0.1

    def __post_init__(self) -> None:
        rules = {
            "delay": (self.delay >= 1, ">= 1"),
            "frequency": (self.frequency >= 1, ">= 1"),
            "sigma_cutoff": (0 <= self.sigma_cutoff < 1, "in [0, 1)"),
            "minimum": (0 <= self.minimum <= 1, "in [0, 1]"),
            "coverage": (0 <= self.coverage <= 1, "in [0, 1]"),
        }
        for name, (holds, rule) in rules.items():
            require(holds, name, f"be {rule}", getattr(self, name))


@check_arguments
class OIALR:
    """Convert the layers of a model while it is trained; call `step(optimizer)` after every `optimizer.step()`.

    To resume a training, pass the method to `fit` as `Hooks(after_step=method.step, states=[method])`. Under
    `torch.distributed` each process decomposes a share of the layers, and all go on with the same tensors.

    `layers` maps the layers to convert to the shapes of their weights, `skipped` maps the included layers that cannot be
    converted to a reason, `ranks` maps the converted layers to their ranks. `history` has one row per refresh and layer: `step`,
    `layer`, `rank`, `full_rank`, and `discarded`, the Frobenius norm that the cut took from the weight.

    **Arguments**

    - `model`: any PyTorch module, trained in place.
    - `config`: when to convert and refresh, and how far to cut.
    - `include`: names or patterns of `nn.Linear` and `nn.Conv2d` modules.
    - `exclude`: names or patterns to leave out; by default output layers and embeddings.

    **Raises**

    - `ValueError`: a pattern that matches nothing; no layer that can be converted.

    **Reference** Coquelin et al., Harnessing Orthogonality to Train Low-Rank Neural Networks, arXiv:2401.08505, section 4.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OIALRConfig = OIALRConfig(),
        *,
        include: Iterable[str] = (".*",),
        exclude: Iterable[str] = HEADS_AND_EMBEDDINGS,
    ) -> None:
        self.model, self.config = model, config
        self.layers, self.skipped = find_convertible(model, include, exclude)
        self.dense_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.steps = self.checks = 0
        self.ranks: dict[str, int] = {}
        self.history: list[dict[str, Any]] = []

    def step(self, optimizer: Any) -> bool:
        """Count a step of the optimiser; convert and refresh layers if it is time.

        **Arguments**

        - `optimizer`: has just made a step. Its parameters and its state are replaced together with the model's.

        **Returns** True if parameters were replaced, in the model and in the optimiser. A `DistributedDataParallel` around the
        model must then be made again.

        **Raises**

        - `ValueError`: weights that are not finite or not in memory, by name; an optimiser that does not have them.
        """
        self.steps += 1
        if self.steps < self.config.delay or (self.steps - self.config.delay) % self.config.frequency:
            return False
        self._check_step(optimizer)
        dense = [name for name in self.layers if name not in self.ranks]
        changed = self._decompose_all(dense, self._convert, optimizer)
        self.checks += 1
        changed |= self._decompose_all(self._select_covered(), self._refresh, optimizer)
        self._hide_from_ddp()
        return changed

    def _check_step(self, optimizer: Any) -> None:
        """Check every layer and the optimiser before the first layer is replaced."""
        check_in_memory(self.model.state_dict())
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name in self.layers:
            module = self._layer(name)
            weight = module.s if name in self.ranks else module.weight
            if not all_finite(weight.detach()):
                raise ValueError(
                    f"`model` must have finite weights, got NaN or infinity in layer {name!r} at step {self.steps}."
                )
            if id(weight) not in trained:
                raise ValueError(
                    f"`optimizer` must hold every trained weight of the model, got none for layer {name!r} of shape "
                    f"{tuple(weight.shape)}."
                )

    @torch.inference_mode(False)  # the parameters may be trained
    def merge(self) -> nn.Module:
        """End the training: replace all converted layers by plain ones, in place, and return the model."""
        for name in self.ranks:
            replace_module(self.model, name, self._layer(name).merge())
        self.ranks = {}
        return self.model

    def parameter_counts(self) -> dict[str, int]:
        """Count the parameters of the model.

        Training few parameters is no compression: at full rank more numbers are stored than before.

        **Returns** `trainable`: parameters that the optimiser changes; `stored`: all parameters and the fixed bases; `dense`:
        all parameters before any conversion.
        """
        parameters = list(self.model.parameters())
        bases = sum(layer.u.numel() + layer.vh.numel() for layer in map(self._layer, self.ranks))
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        stored = sum(p.numel() for p in parameters) + bases
        return {"trainable": trainable, "stored": stored, "dense": self.dense_parameters}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the training as plain values, without the tensors of the model."""
        return {
            "settings": asdict(self.config),
            "layers": {name: list(shape) for name, shape in self.layers.items()},
            "dense": self.dense_parameters,
            "steps": self.steps,
            "checks": self.checks,
            "ranks": self.ranks,
            "history": self.history,
        }

    @check_arguments
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned.

        The model gets layers of the saved ranks. Load their tensors after this call, and build the optimiser, or load its
        state, after it too.

        **Arguments**

        - `state`: of the same model and the same settings.

        **Raises**

        - `ValueError`: a state of another model or of other settings; nothing is changed then.
        """
        self._check_state(state)
        for name, rank in state["ranks"].items():
            layer, zeros = self._layer(name), _zeros(self.layers[name], rank)
            if name in self.ranks:
                layer.set_usv(zeros)
            else:
                replace_module(self.model, name, find_usv_class(layer).from_dense(layer, zeros))
        self.steps, self.checks = state["steps"], state["checks"]
        self.ranks, self.history = dict(state["ranks"]), list(state["history"])
        self._hide_from_ddp()

    def _check_state(self, state: dict[str, Any]) -> None:
        shapes = {name: torch.Size(shape) for name, shape in state["layers"].items()}
        for name in dict.fromkeys([*shapes, *self.layers]):
            if shapes.get(name) != self.layers.get(name):
                theirs, ours = (
                    tuple(side[name]) if name in side else "no such layer" for side in (shapes, self.layers)
                )
                raise ValueError(
                    f"`state` must be of this model: for layer {name!r} it has {theirs}, the model {ours}."
                )
        if state["dense"] != self.dense_parameters:
            raise ValueError(
                f"`state` must be of this model with {self.dense_parameters} parameters, got {state['dense']}."
            )
        for name, rank in state["ranks"].items():
            sides = (*shapes[name][:1], shapes[name][1:].numel()) if name in shapes else (0,)
            rule = f"hold ranks in [1, {min(sides)}] for layer {name!r}"
            require(type(rank) is int and 1 <= rank <= min(sides), "state", rule, rank)
        for name, value in asdict(self.config).items():
            before = state["settings"].get(name)
            require(value == before, name, f"be as before, {before!r}", value)

    def _hide_from_ddp(self) -> None:
        """Tell DDP to ignore the buffers of converted layers, which it would otherwise send in every pass."""
        buffers = [f"{name}.{part}" for name in self.ranks for part in ("u", "vh", "like")]
        vars(self.model)["_ddp_params_and_buffers_to_ignore"] = buffers

    def _layer(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def _select_covered(self) -> list[str]:
        count = self.checks * int((len(self.layers) - 1) * self.config.coverage) or len(self.layers)
        return [name for name in list(self.layers)[-count:] if name in self.ranks]

    def _decompose_all(self, names: list[str], replace: Callable[..., bool], optimizer: Any) -> bool:
        """Decompose each of these layers in one process, and replace all of them in every process."""
        world, rank = process_count(), process_index()
        parts = {name: self._decompose(name) for place, name in enumerate(names) if place % world == rank}
        changed = False
        for place, name in enumerate(names):
            usv, rotations, row = broadcast(parts.pop(name, None), owner=place % world)
            if row:
                self.history.append({"step": self.steps, "layer": name} | row)
            changed |= replace(name, usv, rotations, optimizer)
        return changed

    @torch.no_grad()
    def _decompose(self, name: str) -> tuple[USV, tuple[Tensor, Tensor], dict[str, Any]]:
        """Compute new matrices of a layer, the rotations of its gradients, and a row of the history, on the CPU in float64."""
        module = self._layer(name)
        if name not in self.ranks:
            weight = with_float64(module.weight.detach())
            u, sigma, vh = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
            return _on_cpu(USV(u, sigma.diag(), vh)), _on_cpu((u.T, vh)), {}
        # bases that rounding has bent are made orthonormal first: W = Q1 (R1 S R2^T) Q2^T
        old = module.usv
        (q1, r1), (q2, r2) = torch.linalg.qr(old.u), torch.linalg.qr(old.vh.T)
        a, sigma, bh = torch.linalg.svd(r1 @ old.s @ r2.T)
        full = min(self.layers[name][0], self.layers[name][1:].numel())
        rank = cut_rank(sigma, len(sigma), self.config.sigma_cutoff, int(self.config.minimum * full))
        usv = USV(q1 @ a[:, :rank], sigma[:rank].diag(), bh[:rank] @ q2.T)
        row = {"rank": rank, "full_rank": full, "discarded": float(sigma[rank:].norm())}
        return _on_cpu(usv), _on_cpu((a[:, :rank].T @ r1, bh[:rank] @ r2)), row

    def _convert(self, name: str, usv: USV, rotations: tuple[Tensor, Tensor], optimizer: Any) -> bool:
        dense = self._layer(name)
        layer = find_usv_class(dense).from_dense(dense, usv)
        replace_parameter(optimizer, dense.weight, layer.s, *rotations)
        replace_module(self.model, name, layer)
        self.ranks[name] = layer.rank
        return True

    def _refresh(self, name: str, usv: USV, rotations: tuple[Tensor, Tensor], optimizer: Any) -> bool:
        layer = self._layer(name)
        old = layer.s
        new = layer.set_usv(usv)
        replace_parameter(optimizer, old, new, *rotations)
        self.ranks[name] = layer.rank
        return new is not old


def _zeros(shape: torch.Size, rank: int) -> USV:
    out, flat = shape[0], shape[1:].numel()
    return USV(torch.zeros(out, rank), torch.zeros(rank, rank), torch.zeros(rank, flat))


def _on_cpu(parts: Any) -> Any:
    moved = [part.cpu() for part in parts]
    return type(parts)(*moved) if isinstance(parts, USV) else tuple(moved)
