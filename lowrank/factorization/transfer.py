"""The best weight for inputs that have changed: least squares with a ridge, from second moments of both inputs.

With inputs x of the dense model and x^ of the compressed one, H = sum x^ x^^T and C = sum x x^^T over the same tokens:

    min ||W X - W' X^||  over W' of a rank  =  min ||(T - W') H^(1/2)|| + a constant,  T = W C H^-1,

so that every method truncates T on H as it would truncate W on G. C H^-1 is the same for all layers that receive one input.

A layer whose output is added to hidden states s can repair those too. It is then to give W x + s - s^, in place of W x: with
D = sum (s - s^) x^^T, T = (W C + D) H^-1. Both are one problem: V u is wanted, where u is x and V = W, or u is x with s - s^
below it and V = [W, I].
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank.factorization.block_sums import move_product, subtract_mean
from lowrank.factorization.moments import LayerStatistics, centre_moments, read_gram
from lowrank.factorization.precision import with_float64
from lowrank.factorization.running_moments import BLOCK_TOKENS, RunningMoments

OF_INPUTS = ("gram", "mean", "abs_mean", "input_square", "input_sketch")


@dataclass(frozen=True, eq=False)
class PairedMoments:
    """Hold the moments of the inputs of a layer in two models over the same tokens; `a + b` joins two parts of the data.

    **Arguments**

    - `moments`: those of x^, the input in the compressed model.
    - `cross`: sum of u x^^T, `(in, in)` or `(in + out, in)`, float64. It begins with C.
    - `mean`: mean of u, `(in,)` or `(in + out,)`, float64.
    """

    moments: LayerStatistics
    cross: Float[Tensor, "u n"]
    mean: Float[Tensor, " u"]

    def __add__(self, other: "PairedMoments") -> "PairedMoments":
        """Return the moments of both parts of the data together."""
        tokens = self.moments.tokens + other.moments.tokens
        mean = (self.mean * self.moments.tokens + other.mean * other.moments.tokens) / tokens
        return PairedMoments(self.moments + other.moments, self.cross + other.cross, mean)

    def centred(self) -> "PairedMoments":
        """Return the moments about both means; the means are kept."""
        product = self.moments.tokens * torch.outer(self.mean, self.moments.mean)
        return PairedMoments(centre_moments(self.moments), self.cross - product, self.mean)


class RunningPairs:
    """Add up paired moments, block by block, in float64.

    **Arguments**

    - `size`: int, length of an input.
    - `wanted`: int, length of u.
    - `device`: device of the sums.
    - `products`: least dtype in which a block is multiplied, float32 or float64.
    """

    def __init__(self, size: int, wanted: int, device: torch.device, products: torch.dtype = torch.float32) -> None:
        self.inputs = RunningMoments(OF_INPUTS, size, device, products)
        self.cross = torch.zeros(wanted, size, dtype=torch.float64, device=device)
        self.total = torch.zeros(wanted, dtype=torch.float64, device=device)

    def add(self, wanted: Float[Tensor, "tokens u"], rows: Float[Tensor, "tokens n"]) -> None:
        """Add the inputs of the same tokens in both models.

        **Arguments**

        - `wanted`: u; its first entries are the inputs in the dense model.
        - `rows`: inputs in the compressed model.
        """
        wanted, rows = with_float64(wanted), with_float64(rows)
        self.inputs.add(rows)
        wide = torch.promote_types(rows.dtype, self.inputs.products)
        pairs = zip(wanted.to(wide).split(BLOCK_TOKENS), rows.to(wide).split(BLOCK_TOKENS), strict=True)
        for x, y in pairs if len(rows) else ():
            (x, of_x), (y, of_y) = subtract_mean(x), subtract_mean(y)
            self.cross += (x.T @ y).to(self.cross)
            move_product(self.cross, of_x, of_y)
            of_x = of_x.to(self.total)
            self.total += of_x.rest + of_x.tokens * of_x.point

    @property
    def tokens(self) -> int:
        """Return the number of tokens so far."""
        return self.inputs.tokens

    def all_finite(self) -> bool:
        """Return whether all sums are finite so far."""
        return self.inputs.all_finite() and bool(self.total.isfinite().all())

    def finish(self) -> PairedMoments:
        """Return the moments of all inputs so far; at least one."""
        tokens = self.inputs.tokens
        return PairedMoments(LayerStatistics(tokens=tokens, **self.inputs.finish()), self.cross, self.total / tokens)


@dataclass(frozen=True, eq=False)
class Transfer:
    """Hold the best weight T = V M for the inputs of the compressed model, and how it was chosen.

    **Arguments**

    - `matrix`: M, `(in, in)` or `(in + out, in)`, float64; its first `in` rows are R, with T = W R if nothing else is wanted.
    - `ridge`: float, relative to the mean diagonal entry of H.
    - `blend`: float in [0, 1], the share of the least-squares solution; the rest is the dense weight.
    """

    matrix: Float[Tensor, "u n"]
    ridge: float
    blend: float


def extend_weight(weight: Float[Tensor, "m n"], pairs: PairedMoments) -> Float[Tensor, "m u"]:
    """Return V: W, or [W, I] if a repair is wanted too.

    **Arguments**

    - `weight`: W, `(out, in)`, float64.
    - `pairs`: the moments that it is used with.
    """
    out, inputs = weight.shape
    eye = torch.eye(out, len(pairs.cross) - inputs, dtype=weight.dtype, device=weight.device)
    return torch.cat([weight, eye], dim=1)


def solve_transfer(pairs: PairedMoments, ridge: float, blend: float = 1.0) -> Transfer:
    """Return M = (1 - b) J + b (U + l J)(H + l I)^-1 with U = sum u x^^T, J = [I, 0]^T and l = ridge * mean(diag H).

    V M x^ is V u as closely as a linear map can make it. Where H says nothing, the ridge leaves W as it is. A ridge below the
    rounding of H is raised tenfold until H + l I is positive definite.

    **Arguments**

    - `pairs`: moments of both inputs.
    - `ridge`: float > 0.
    - `blend`: float in [0, 1]. Default 1.

    **Returns** `Transfer`.
    """
    gram = read_gram(pairs.moments)
    start = torch.eye(*pairs.cross.shape, dtype=gram.dtype, device=gram.device)
    scale = gram.diagonal().mean()
    if not scale > 0:  # the input is always zero
        return Transfer(start, ridge, 0.0)
    root, failed = torch.linalg.cholesky_ex(gram + ridge * scale * start[: len(gram)])
    if bool(failed):
        return solve_transfer(pairs, 10 * ridge, blend)
    solved = torch.cholesky_solve((pairs.cross + ridge * scale * start).T, root).T
    return Transfer(torch.lerp(start, solved, blend), ridge, blend)


def choose_transfer(
    fit: PairedMoments,
    held_out: PairedMoments,
    weight: Float[Tensor, "m u"],
    ridges: Sequence[float],
    blends: Sequence[float],
) -> tuple[float, float]:
    """Return the ridge and the blend that serve held-out tokens best.

    What counts is ||V u - V M x^|| before truncation. Too small a ridge fits the noise of few tokens, and that shows without
    truncating, which would cost a decomposition for each ridge, blend and layer.

    **Arguments**

    - `fit`: moments to solve with.
    - `held_out`: moments of the other tokens.
    - `weight`: V of the layers that receive the input, one below the other, float64.
    - `ridges`: float > 0 each.
    - `blends`: float in [0, 1] each; the first of equally good ones is taken.

    **Returns** (ridge, blend).
    """
    best, gain = (ridges[0], blends[0]), -torch.inf
    rows = torch.linalg.qr(weight, mode="r").R  # the same norms from fewer rows
    gram = read_gram(held_out.moments)
    missing = rows @ held_out.cross - rows[:, : len(gram)] @ gram
    for ridge in ridges:
        change = rows @ solve_transfer(fit, ridge).matrix - rows[:, : len(gram)]
        linear, quadratic = (change * missing).sum().item(), (change @ gram * change).sum().item()
        for blend in blends:
            if (
                found := 2 * blend * linear - blend**2 * quadratic
            ) > gain:  # what the blend takes off the squared error
                best, gain = (ridge, blend), found
    return best


def retargeted_statistics(dense: LayerStatistics | None, pairs: PairedMoments, transfer: Transfer) -> LayerStatistics:
    """Return the statistics to truncate T with: inputs of the compressed model, output gradients of the dense one.

    **Arguments**

    - `dense`: statistics of the dense model, or None.
    - `pairs`: moments of both inputs.
    - `transfer`: what T comes from. Moments of the outputs stay; what refers to inputs of W refers to inputs of W R.
    """
    if dense is None:
        return pairs.moments
    sent = dense.input_gradient_gram
    if sent is not None:  # of the weight W R
        change = transfer.matrix[: len(sent)].to(sent)
        sent = change.T @ sent @ change
    return replace(
        dense,
        tokens=pairs.moments.tokens,
        **pairs.moments.moments(),  # pyright: ignore[reportArgumentType]
        output_gram=None,
        output_mean=None,
        input_gradient_gram=sent,
    )
