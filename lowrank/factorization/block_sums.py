"""Sums over the tokens or samples of one block: the formulas of the fields of `LayerStatistics`."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


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
