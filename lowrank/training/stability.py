"""Measure how much the orthogonal basis of a weight rotates, and how much its mixing changes, while a network trains.

A weight is flattened to a matrix and transposed if it is wide. Then W = Q P: Q = U V^T is the orthogonal polar factor of its SVD,
and P = V diag(sigma) V^T. *Stability* compares Q with an earlier Q, as published. For the mixing of the basis, nothing was
published. Two similarities are our definitions: of P, and of R in W = Q' R (QR with a positive diagonal).
"""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.factorization.moments import all_finite
from lowrank.factorization.precision import with_float64
from lowrank.factorization.spectra import effective_rank
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.nn.targets import find_weights

DEFICIENT = 1e-6  # sigma_min / sigma_max; below it, float32 rounding alone rotates the basis


class RankDeficientWarning(UserWarning):
    """Warn that a weight does not determine its basis."""


class WeightParts(NamedTuple):
    """Hold the parts of a weight W, `(m, n)` with m >= n, in float64 or float32.

    **Arguments**

    - `basis`: Q, `(m, n)`, orthonormal columns.
    - `mixing`: R, `(n, n)`, upper triangular with a diagonal >= 0.
    - `stretch`: P, `(n, n)`, symmetric.
    - `sigma`: singular values, `(n,)`, descending.
    """

    basis: Tensor
    mixing: Tensor
    stretch: Tensor
    sigma: Tensor


def decompose_weight(weight: Tensor) -> WeightParts:
    """Decompose a weight into basis, mixing and stretch.

    **Arguments**

    - `weight`: a matrix `(out, in)`, or a kernel `(out, in, ...)`, which is flattened to `(out, in * ...)`.

    **Returns** `WeightParts`, float64, of the matrix or of its transpose, whichever is not wide.
    """
    matrix = with_float64(weight.detach()).double().flatten(1)
    matrix = matrix.T if len(matrix) < matrix.shape[1] else matrix
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    mixing = torch.linalg.qr(matrix, mode="r").R
    signs = torch.where(mixing.diagonal() < 0, -1.0, 1.0)
    return WeightParts(left @ right, signs[:, None] * mixing, (right.T * sigma) @ right, sigma)


def basis_stability(previous: Tensor, current: Tensor) -> float:
    """Compute the mean cosine between matching columns of the orthogonal bases of two weights.

    The formula is trace(Q_1^T Q_2) / n, in [-1, 1]. Equal bases have 1, whatever their mixing. Independent Gaussian weights have
    mean 0 and standard deviation 1 / sqrt(m n). The value does not change if both weights are transposed, or if the same
    orthogonal matrix is applied to the inputs or outputs of both.

    **Arguments**

    - `previous`: a matrix `(out, in)` or a kernel `(out, in, ...)`, any floating dtype; computed in float64.
    - `current`: the same shape.

    **Returns** NaN, with a `RankDeficientWarning`, if either weight is rank deficient, sigma_min < 1e-6 sigma_max: Q is not
    determined then.

    **Raises**

    - `ValueError`: shapes that differ; fewer than two dimensions; values that are not finite.

    **Reference** Coquelin et al., Harnessing Orthogonality to Train Low-Rank Neural Networks, arXiv:2401.08505, section 3.
    """
    before, after = _decompose_both(previous, current)
    if reason := _why_masked(before.sigma, after.sigma):
        warnings.warn(f"the stability is undefined: {reason}.", RankDeficientWarning, stacklevel=2)
        return float("nan")
    return _stability(before.basis, after.basis)


def mixing_similarity(previous: Tensor, current: Tensor, kind: str = "qr") -> float:
    """Compute a similarity of the mixing of the bases of two weights, in [0, 1]: our definition.

    The formula is 1 - ||M_1 - M_2||_F / (||M_1||_F + ||M_2||_F): the Euclidean distance on a scale on which equal parts have 1.
    Independent weights do not have 0. Square Gaussian ones have about .50 (R) and .62 (P), ones with sides of 4 to 1 about .75
    and .82. Show these values beside every result.

    **Arguments**

    - `previous`: a matrix `(out, in)` or a kernel `(out, in, ...)`, any floating dtype; computed in float64.
    - `current`: the same shape.
    - `kind`: 'qr', M = R of the QR decomposition with a positive diagonal, which depends on the order of the columns; or
      'polar', M = P = (W^T W)^(1/2), which is always unique.

    **Returns** NaN for 'qr', with a `RankDeficientWarning`, if either weight is rank deficient.

    **Raises**

    - `ValueError`: an unknown kind; shapes that differ; fewer than two dimensions; values that are not finite.
    """
    require(kind in ("qr", "polar"), "kind", "be 'qr' or 'polar'", kind)
    before, after = _decompose_both(previous, current)
    if kind == "polar":
        return _similarity(before.stretch, after.stretch)
    if reason := _why_masked(before.sigma, after.sigma):
        warnings.warn(f"the similarity of R is undefined: {reason}.", RankDeficientWarning, stacklevel=2)
        return float("nan")
    return _similarity(before.mixing, after.mixing)


@check_arguments
class BasisMonitor:
    """Follow the bases of the weights of a model through its training.

    Call `step(model)` after every step of the optimiser. At every `every`-th step it makes a checkpoint: it compares the bases
    with those of the checkpoint before. `check(model)` makes one now. `history` has one row per checkpoint and layer, for a
    DataFrame: `step`; `layer`; `stability`, `r_similarity`, `p_similarity` to the checkpoint before; `effective_rank`;
    `smallest_over_largest` singular value; `masked`, why the first three are NaN, else ''.

    The bases of the last checkpoint stay in host memory in float32. The monitor keeps no module, so the model may be wrapped in
    between. It does not use random numbers.

    **Arguments**

    - `every`: steps of the optimiser between two checkpoints, >= 1.
    - `include`: names or patterns of weights, see `lowrank.nn.targets.find_weights`.
    - `exclude`: names or patterns of weights to leave out.
    - `progress`: show a progress bar over the layers of a checkpoint.

    **Raises**

    - `ValueError`: `every` out of its range.
    """

    def __init__(
        self,
        every: int = 500,
        include: Iterable[str] = (".*",),
        exclude: Iterable[str] = (),
        *,
        progress: bool = True,
    ) -> None:
        require(every >= 1, "every", "be >= 1", every)
        self.every, self.include, self.exclude, self.progress = every, tuple(include), tuple(exclude), progress
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self.previous: dict[str, WeightParts] = {}

    @check_arguments
    def step(self, model: nn.Module) -> list[dict[str, Any]]:
        """Count a step of the optimiser, and return the rows of the checkpoint, none if it is not one."""
        self.steps += 1
        return self.check(model) if self.steps % self.every == 0 else []

    @check_arguments
    def check(self, model: nn.Module) -> list[dict[str, Any]]:
        """Compare the bases with the last checkpoint.

        **Arguments**

        - `model`: may be wrapped anew, but has the same weights as before.

        **Returns** one row per layer, as in `history`.

        **Raises**

        - `ValueError`: no such weight; a weight that is not finite or has another shape than before, by name.
        """
        weights = find_weights(model, self.include, self.exclude)
        for name, weight in weights.items():
            _check_weight(weight, f"`model` must have finite weights: layer {name!r}")
            before = self.previous.get(name)
            if before and before.basis.shape != _tall(weight.shape):
                raise ValueError(
                    f"`model` must keep the shapes of its weights: layer {name!r} had a basis of shape "
                    f"{tuple(before.basis.shape)}, got {_tall(weight.shape)}."
                )
        rows = []
        for name, weight in tqdm(weights.items(), "bases", unit="layer", leave=False, disable=not self.progress):
            now = decompose_weight(weight)
            rows.append({"step": self.steps, "layer": name} | self._compare(name, now))
            self.previous[name] = WeightParts(*(part.float().cpu().contiguous() for part in now))
        self.history += rows
        return rows

    def _compare(self, name: str, now: WeightParts) -> dict[str, Any]:
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
        """Return the state as plain values and tensors."""
        previous = {name: list(parts) for name, parts in self.previous.items()}
        return {"steps": self.steps, "history": self.history, "previous": previous}

    @check_arguments
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.steps, self.history = state["steps"], list(state["history"])
        self.previous = {name: WeightParts(*parts) for name, parts in state["previous"].items()}


def _decompose_both(previous: Tensor, current: Tensor) -> tuple[WeightParts, WeightParts]:
    if previous.shape != current.shape:
        raise ValueError(
            f"`current` must have the shape of `previous`, {tuple(previous.shape)}, got {tuple(current.shape)}."
        )
    _check_weight(previous, "`previous` must be a finite matrix or kernel")
    _check_weight(current, "`current` must be a finite matrix or kernel")
    return decompose_weight(previous), decompose_weight(current)


def _check_weight(weight: Tensor, rule: str) -> None:
    if weight.dim() < 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"{rule}, got shape {tuple(weight.shape)} and {weight.dtype}.")
    if not all_finite(weight.detach()):
        raise ValueError(f"{rule}, got NaN or infinity.")


def _tall(shape: torch.Size) -> tuple[int, int]:
    sides = shape[0], shape[1:].numel()
    return max(sides), min(sides)


def _condition(sigma: Tensor) -> float:
    return float(sigma[-1] / sigma[0]) if sigma[0] > 0 else 0.0


def _why_masked(*spectra: Tensor) -> str:
    """Return why weights with these singular values do not determine their bases, '' if they do."""
    worst = min(_condition(sigma) for sigma in spectra)
    return f"rank deficient, sigma_min / sigma_max = {worst:.1e} < {DEFICIENT:.0e}" if worst < DEFICIENT else ""


def _stability(before: Tensor, after: Tensor) -> float:
    return float((before.to(after) * after).sum() / after.shape[1])


def _similarity(before: Tensor, after: Tensor) -> float:
    before = before.to(after)
    scale = before.norm() + after.norm()
    return float(1 - (before - after).norm() / scale) if scale > 0 else 1.0
