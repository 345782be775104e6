"""Sums over the tokens or samples of one block: the formulas of the fields of `LayerStatistics`.

A block is summed about its own mean, and what that leaves out is added in float64. So a mean that is large beside the spread
takes no digits of float32 products, and sums of blocks still add up.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

RUN = 64  # vectors that are added up in their own dtype
SKETCH_ROWS = 64  # an estimated squared norm is off by about 18 %; only rounding is estimated


class Shift(NamedTuple):
    """Hold what is left out by summing vectors x about a point.

    **Arguments**

    - `point`: the point c, `(n,)`, float64.
    - `rest`: sum of x - c, `(n,)`, float64; not zero, since c is rounded.
    - `tokens`: int N, the number of vectors.
    """

    point: Float[Tensor, " n"]
    rest: Float[Tensor, " n"]
    tokens: int

    def to(self, total: Tensor) -> "Shift":
        """Return it on the device of a sum.

        **Arguments**

        - `total`: the sum, float64.
        """
        return self._replace(point=self.point.to(total), rest=self.rest.to(total))


def subtract_mean(rows: Float[Tensor, "tokens n"]) -> tuple[Float[Tensor, "tokens n"], Shift]:
    """Return vectors about their mean, rounded to their dtype, and what that leaves out.

    **Arguments**

    - `rows`: `(tokens, n)`, at least one vector, float32 or float64.

    **Returns** x - c, `(tokens, n)`, in the dtype of the rows, and the `Shift`.

    **Reference** Chan, Golub and LeVeque, Algorithms for computing the sample variance, The American Statistician 1983.
    """
    point = rows.mean(0)
    offsets = rows - point
    return offsets, Shift(point.double(), sum_rows(offsets), len(rows))


def move_product(total: Float[Tensor, "m n"], one: Shift, other: Shift) -> None:
    """Add to a sum of products x y^T, in place, what summing both about a point left out.

    **Arguments**

    - `total`: the sum, `(m, n)`, float64.
    - `one`, `other`: the shifts of x, of length m, and of y, of length n.
    """
    one, other = one.to(total), other.to(total)
    left = torch.stack([one.point, one.rest + one.tokens * one.point], dim=1)
    total.addmm_(left, torch.stack([other.rest, other.point]))


def _move_outer(total: Float[Tensor, "n n"], part: Tensor, shift: Shift) -> None:
    """Add to a sum of x x^T, in place, what summing about a point left out; `part` is not used."""
    move_product(total, shift, shift)


def _move_rows(total: Float[Tensor, " n"], part: Tensor, shift: Shift) -> None:
    """Add to a sum of x, in place, what summing about a point left out; `part` is not used."""
    total += shift.tokens * shift.to(total).point


def _move_squares(total: Float[Tensor, ""], part: Tensor, shift: Shift) -> None:
    """Add to a sum of |x|^2, in place, what summing about a point left out; `part` is not used."""
    point, rest, tokens = shift.to(total)
    total += point.dot(2 * rest + tokens * point)


def _move_signed(total: Float[Tensor, "k n1"], part: Float[Tensor, "k n1"], shift: Shift) -> None:
    """Add to a sketch, in place, what the sketch `part` of vectors about a point left out."""
    total[:, :-1].addr_(part[:, -1].to(total), shift.to(total).point)


def outer_sum(rows: Float[Tensor, "tokens n"]) -> Float[Tensor, "n n"]:
    """Return the sum of x x^T over rows `(tokens, n)`, in their dtype.

    NumPy sees that both factors are one matrix and calls syrk; torch multiplies in full.
    """
    if rows.device.type == "cpu":
        array = rows.numpy()
        with np.errstate(all="ignore"):  # infinities are found afterwards, with the name of the layer
            return torch.from_numpy(array.T @ array)
    return rows.T @ rows


def sum_squared_gradients(
    x: Float[Tensor, "samples tokens n"], g: Float[Tensor, "samples tokens m"]
) -> Float[Tensor, " m"]:
    """Return the squared gradient of the weight, summed over samples and over each row of the weight.

    The gradient sum_t g_t x_t^T of a sample is never formed.

    **Arguments**

    - `x`: inputs of the layer, `(samples, tokens, in)`.
    - `g`: gradients at its output, `(samples, tokens, out)`, of the same dtype.

    **Returns** `(out,)`, float64.
    """
    scale = g.abs().amax(dim=(0, 1)).clamp_min(torch.finfo(g.dtype).tiny)  # squares must not vanish
    g = g / scale
    return ((x @ x.mT) @ g * g).sum(dim=(0, 1), dtype=torch.float64).clamp_min(0.0) * scale.double().square()


def sum_rows(rows: Float[Tensor, "tokens n"]) -> Float[Tensor, " n"]:
    """Return the sum of vectors `(tokens, n)`, in float64.

    Runs of a few vectors are summed in their dtype first, which is many times as fast and loses no more than rounding them did.
    """
    count = len(rows) // RUN
    runs = rows[: count * RUN].unflatten(0, (count, RUN)).sum(1)
    return runs.sum(0, dtype=torch.float64) + rows[count * RUN :].sum(0, dtype=torch.float64)


def sum_abs(rows: Float[Tensor, "tokens n"]) -> Float[Tensor, " n"]:
    """Return the sum of the absolute values of vectors `(tokens, n)`, in their dtype."""
    return rows.abs().sum(0)


def sum_squares(rows: Float[Tensor, "tokens n"]) -> Float[Tensor, ""]:
    """Return the sum of the squares of all entries of vectors `(tokens, n)`, in float64."""
    return rows.flatten().dot(rows.flatten()).double()


def sum_signed(rows: Float[Tensor, "tokens n"], generator: torch.Generator) -> Float[Tensor, "k n1"]:
    """Sum vectors into a few rows under random signs: for any D the square of ||D Z^T|| has the mean ||D X^T||^2.

    Token t goes to row t mod 64. Products of different tokens cancel on average, so that Z^T Z estimates X^T X.

    **Arguments**

    - `rows`: X, `(tokens, n)`, any floating dtype.
    - `generator`: draws the signs, on the CPU.

    **Returns** Z, `(64, n + 1)`, in the dtype of the rows; the last column holds the sums of the signs.

    **Reference** Charikar, Chen and Farach-Colton, Finding frequent items in data streams, 2004, for the sketch.
    """
    tokens, size = rows.shape
    layers = max(1, -(-tokens // SKETCH_ROWS))
    signs = torch.randint(0, 2, (layers * SKETCH_ROWS,), generator=generator).mul_(2).sub_(1).to(rows)
    signs[tokens:] = 0
    signs = signs.view(layers, SKETCH_ROWS)
    sketch = rows.new_zeros(SKETCH_ROWS, size + 1)
    for part, sign in zip(rows.split(SKETCH_ROWS), signs, strict=True):
        sketch[: len(part), :size].addcmul_(part, sign[: len(part), None])
    sketch[:, size] = signs.sum(0)
    return sketch


# sum over tokens -> what adds to it the part that is left out about a point; the others are sums about 0.
MOVES: dict[Callable[..., Tensor], Callable[[Tensor, Tensor, Shift], None]] = {
    outer_sum: _move_outer,
    sum_rows: _move_rows,
    sum_squares: _move_squares,
    sum_signed: _move_signed,
}
