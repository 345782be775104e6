"""Sums over the tokens or samples of one block: the formulas of the fields of `LayerStatistics`."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

SKETCH_ROWS = 64  # an estimated squared norm is off by about 18 %; only rounding is estimated


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
    """Return the sum of vectors `(tokens, n)`, in their dtype."""
    return rows.sum(0)  # torch sums pairwise: rounding does not grow with the block


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
