"""Squared singular values as the eigenvalues of a float64 Gram matrix.

Several times faster than an SVD, and exact to about 1e-16 of the largest.
"""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

SLAB = 512  # rows that are widened to float64 at once; more are a little faster and fragment the heap


def slabs(matrix: Float[Tensor, "rows columns"]) -> list[Tensor]:
    """Split a matrix along its long side into views, each with the short side as its columns."""
    rows, columns = matrix.shape
    return [piece if rows >= columns else piece.T for piece in matrix.split(SLAB, dim=0 if rows >= columns else 1)]


def gram_matrix(pieces: Iterable[Float[Tensor, "_ short"]]) -> Float[Tensor, "short short"]:
    """Return W^T W of a matrix W with at least as many rows as columns.

    **Arguments**

    - `pieces`: the slabs of W, at least one, any floating dtype; see `slabs`.

    **Returns** `(short, short)`, float64, on the device of the slabs.
    """
    gram: Tensor | None = None
    for piece in pieces:
        wide = piece.double()
        if wide.device.type == "cpu":
            array = wide.numpy()
            product = torch.from_numpy(array.T @ array)  # NumPy sees one matrix twice, and does half the work
        else:
            product = wide.T @ wide
        gram = product if gram is None else gram.add_(product)
    if gram is None:
        raise ValueError("`pieces` must hold at least one slab, got none.")
    return gram


def squared_singular_values(grams: Float[Tensor, "*batch short short"]) -> Float[Tensor, "*batch short"]:
    """Return the eigenvalues of Gram matrices, ascending and clipped at 0.

    **Arguments**

    - `grams`: `(*batch, short, short)`, float64; an accelerator takes a batch at once.

    **Returns** `(*batch, short)`, float64.
    """
    if grams.device.type == "cpu":  # NumPy takes a third less time than torch
        return torch.from_numpy(np.linalg.eigvalsh(grams.numpy())).clamp_min_(0.0)
    return torch.linalg.eigvalsh(grams).clamp_min_(0.0)
