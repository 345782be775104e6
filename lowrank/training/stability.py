"""How much the orthogonal basis of a weight turns, and how much its mixing changes, while a network trains.

A weight, flattened and stood upright, is W = Q P with the orthogonal polar factor Q = U V^T of its SVD and P = V diag(sigma) V^T.
*Stability* compares Q with that of an earlier time, as published. Two similarities of what mixes the basis are our own
definitions, for none was published: of P, and of R in W = Q' R (QR with a positive diagonal).
"""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.factorization.moments import all_finite
from lowrank.factorization.spectra import effective_rank
from lowrank.nn.targets import find_weights

DEFICIENT = 1e-6  # sigma_min / sigma_max below which float32 rounding alone turns the basis


class RankDeficientWarning(UserWarning):
    """The basis of a weight is not determined by the weight."""


class Anatomy(NamedTuple):
    """The parts of one upright weight, `(m, n)` with m >= n: `basis` Q `(m, n)`; `mixing` R `(n, n)`, upper triangular with a
    diagonal >= 0; `stretch` P `(n, n)`, symmetric; `sigma` `(n,)`, descending. float64 when made."""

    basis: Tensor
    mixing: Tensor
    stretch: Tensor
    sigma: Tensor


def anatomy(weight: Tensor) -> Anatomy:
    """The parts of a weight: a matrix `(out, in)`, or a kernel `(out, in, ...)`, which is flattened to `(out, in * ...)`."""
    upright = weight.detach().double().flatten(1)
    upright = upright.T if len(upright) < upright.shape[1] else upright
    left, sigma, right = torch.linalg.svd(upright, full_matrices=False)
    mixing = torch.linalg.qr(upright, mode="r").R
    signs = torch.where(mixing.diagonal() < 0, -1.0, 1.0)
    return Anatomy(left @ right, signs[:, None] * mixing, (right.T * sigma) @ right, sigma)


def basis_stability(previous: Tensor, current: Tensor) -> float:
    """Mean cosine between matching columns of the orthogonal bases of two weights, trace(Q_1^T Q_2) / n, in [-1, 1].

    1 for equal bases whatever their mixing; independent Gaussian weights have mean 0 and standard deviation 1 / sqrt(m n). It
    does not depend on the orientation of the weight or on an orthogonal change of its inputs or outputs.

    **Arguments:** `previous`, `current`: of one shape, `(out, in)` or a kernel `(out, in, ...)`, any floating dtype; computed in
    float64.

    **Returns:** NaN where either weight is rank deficient, sigma_min < 1e-6 sigma_max: there Q is not determined.

    **Raises:** `ValueError`: shapes that differ, fewer than two dimensions, values that are not finite. **Warns:**
    `RankDeficientWarning`, where NaN is returned.

    **Reference:** Coquelin et al., Harnessing Orthogonality to Train Low-Rank Neural Networks, arXiv:2401.08505, section 3.
    """
    before, after = _both(previous, current)
    if reason := _why_masked(before.sigma, after.sigma):
        warnings.warn(f"the stability is undefined: {reason}.", RankDeficientWarning, stacklevel=2)
        return float("nan")
    return _stability(before.basis, after.basis)


def mixing_similarity(previous: Tensor, current: Tensor, kind: str = "qr") -> float:
    """1 - ||M_1 - M_2||_F / (||M_1||_F + ||M_2||_F) of what mixes the bases of two weights, in [0, 1]: our definition.

    The Euclidean distance, put on a scale on which equal parts have 1. Independent weights do not have 0: square Gaussian ones
    have about .50 (R) and .62 (P), upright ones of 4 to 1 .75 and .82. To be shown beside every value.

    **Arguments:** `previous`, `current`: as in `basis_stability`. `kind`: 'qr', M = R of the QR decomposition with a positive
    diagonal, which depends on the order of the columns; 'polar', M = P = (W^T W)^(1/2), which is always unique.

    **Returns:** NaN for 'qr' where either weight is rank deficient.

    **Raises:** `ValueError`: as `basis_stability`, or an unknown kind. **Warns:** `RankDeficientWarning`, with NaN.
    """
    if kind not in ("qr", "polar"):
        raise ValueError(f"`kind` must be 'qr' or 'polar', got {kind!r}.")
    before, after = _both(previous, current)
    if kind == "polar":
        return _similarity(before.stretch, after.stretch)
    if reason := _why_masked(before.sigma, after.sigma):
        warnings.warn(f"the similarity of R is undefined: {reason}.", RankDeficientWarning, stacklevel=2)
        return float("nan")
    return _similarity(before.mixing, after.mixing)


class BasisMonitor:
    """Follows the bases of a model's weights through its training.

    `step(model)` after every optimiser step looks every `every` steps; `check(model)` looks now. `history` has one row per look
    and layer, for a DataFrame: `step`; `layer`; `stability`, `r_similarity`, `p_similarity` against the look before;
    `effective_rank`; `smallest_over_largest` singular value; `masked`, why the first three are NaN, else ''.

    The bases of the last look stay in host memory in float32. No module is held, so the model may be wrapped in between; its
    random state is not touched.

    **Arguments:** `every`: optimiser steps, >= 1. `include`, `exclude`: names or patterns of weights, as `find_weights` takes
    them. `progress`: a bar over the layers of a look.

    **Raises:** `ValueError`, in a look: no such weight; a weight that is not finite or has another shape than before, by name.
    """

    def __init__(
        self,
        every: int = 500,
        include: Iterable[str] = (".*",),
        exclude: Iterable[str] = (),
        *,
        progress: bool = True,
    ) -> None:
        if every < 1:
            raise ValueError(f"`every` must be >= 1, got {every}.")
        self.every, self.include, self.exclude, self.progress = every, tuple(include), tuple(exclude), progress
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self.previous: dict[str, Anatomy] = {}

    def step(self, model: nn.Module) -> list[dict[str, Any]]:
        """Counts an optimiser step; the rows of the look, none where none is due."""
        self.steps += 1
        return self.check(model) if self.steps % self.every == 0 else []

    def check(self, model: nn.Module) -> list[dict[str, Any]]:
        """Looks now; the rows of the look."""
        weights = find_weights(model, self.include, self.exclude)
        for name, weight in weights.items():
            _check_weight(weight, f"`model` must have finite weights: layer {name!r}")
            known = self.previous.get(name)
            if known and known.basis.shape != _upright(weight.shape):
                raise ValueError(
                    f"`model` must keep the shapes of its weights: layer {name!r} had a basis of shape "
                    f"{tuple(known.basis.shape)}, got {_upright(weight.shape)}."
                )
        rows = []
        for name, weight in tqdm(weights.items(), "bases", unit="layer", leave=False, disable=not self.progress):
            found = anatomy(weight)
            rows.append({"step": self.steps, "layer": name} | self._compared(name, found))
            self.previous[name] = Anatomy(*(part.float().cpu().contiguous() for part in found))
        self.history += rows
        return rows

    def _compared(self, name: str, now: Anatomy) -> dict[str, Any]:
        before = self.previous.get(name)
        masked = "nothing to compare with yet" if before is None else _why_masked(before.sigma, now.sigma)
        row: dict[str, Any] = dict.fromkeys(("stability", "r_similarity", "p_similarity"), float("nan"))
        if before is not None:
            row["p_similarity"] = _similarity(before.stretch, now.stretch)
            if not masked:
                row["stability"] = _stability(before.basis, now.basis)
                row["r_similarity"] = _similarity(before.mixing, now.mixing)
        return row | {
            "effective_rank": float(effective_rank(now.sigma)),
            "smallest_over_largest": _condition(now.sigma),
            "masked": masked,
        }

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from: plain values and tensors."""
        previous = {name: list(parts) for name, parts in self.previous.items()}
        return {"steps": self.steps, "history": self.history, "previous": previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.steps, self.history = state["steps"], list(state["history"])
        self.previous = {name: Anatomy(*parts) for name, parts in state["previous"].items()}


def _both(previous: Tensor, current: Tensor) -> tuple[Anatomy, Anatomy]:
    if previous.shape != current.shape:
        raise ValueError(
            f"`current` must have the shape of `previous`, {tuple(previous.shape)}, got {tuple(current.shape)}."
        )
    _check_weight(previous, "`previous` must be a finite matrix or kernel")
    _check_weight(current, "`current` must be a finite matrix or kernel")
    return anatomy(previous), anatomy(current)


def _check_weight(weight: Tensor, rule: str) -> None:
    if weight.dim() < 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"{rule}, got shape {tuple(weight.shape)} and {weight.dtype}.")
    if not all_finite(weight.detach()):
        raise ValueError(f"{rule}, got NaN or infinity.")


def _upright(shape: torch.Size) -> tuple[int, int]:
    sides = shape[0], shape[1:].numel()
    return max(sides), min(sides)


def _condition(sigma: Tensor) -> float:
    return float(sigma[-1] / sigma[0]) if sigma[0] > 0 else 0.0


def _why_masked(*spectra: Tensor) -> str:
    """The reason why the bases of weights with these singular values say nothing, '' where they do."""
    worst = min(_condition(sigma) for sigma in spectra)
    return f"rank deficient, sigma_min / sigma_max = {worst:.1e} < {DEFICIENT:.0e}" if worst < DEFICIENT else ""


def _stability(before: Tensor, after: Tensor) -> float:
    return float((before.to(after) * after).sum() / after.shape[1])


def _similarity(before: Tensor, after: Tensor) -> float:
    before = before.to(after)
    scale = before.norm() + after.norm()
    return float(1 - (before - after).norm() / scale) if scale > 0 else 1.0
