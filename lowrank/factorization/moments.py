"""Second moments of the inputs of one layer: the statistics themselves, and what is computed from them alone.

Blocks of tokens are multiplied in float32 and added into float64, which keeps G to about 1e-7 of its largest eigenvalue:
enough to compress with. What the error of a nearly low-rank layer will be is decided below that; multiply in float64
(`products`) to predict it, at about twice the cost. On the CPU the product goes through NumPy, which sees a symmetric one
and does half the work.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_TOKENS = 4096  # tokens per product: bounds its memory, and in float32 its rounding
SLAB = 1024  # rows of a product that are widened to float64 at a time


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Moments of one layer's inputs over `tokens` tokens; `a + b` joins two disjoint parts of the data.

    `gram`: G = sum of x x^T, `(in, in)`, float64. `tokens`: N. `mean`, `abs_mean`: means of x and of |x|, `(in,)`, float64.
    Where a loss was given, with g its gradient at the layer's output: `gradient_gram`: sum of g g^T over tokens,
    `(out, out)`, float64; `row_fisher`: sum over samples of the squared gradient of the loss by the weight, summed over
    each row of the weight, `(out,)`, float64.
    """

    gram: Float[Tensor, "n n"]
    tokens: int
    mean: Float[Tensor, " n"]
    abs_mean: Float[Tensor, " n"]
    gradient_gram: Float[Tensor, "m m"] | None = None
    row_fisher: Float[Tensor, " m"] | None = None

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        if self.gram.shape != other.gram.shape:
            raise ValueError(
                f"`other` must have moments of shape {tuple(self.gram.shape)}, got {tuple(other.gram.shape)}."
            )
        tokens = self.tokens + other.tokens
        return LayerStatistics(
            gram=self.gram + other.gram,
            tokens=tokens,
            mean=(self.mean * self.tokens + other.mean * other.tokens) / tokens,
            abs_mean=(self.abs_mean * self.tokens + other.abs_mean * other.tokens) / tokens,
            gradient_gram=_sum_of_both(self.gradient_gram, other.gradient_gram),
            row_fisher=_sum_of_both(self.row_fisher, other.row_fisher),
        )


def _sum_of_both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if (a is None) != (b is None):
        raise ValueError("`other` must hold gradient moments exactly where this one does.")
    return None if a is None or b is None else a + b


def centred(statistics: LayerStatistics) -> LayerStatistics:
    """The same statistics with the second moment about the mean, G - N mu mu^T, in the place of G.

    What a layer does to the mean input is then left to its bias: b + (W - W') mu restores it exactly. The mean is kept for
    that, so this is for statistics that have not been centred before.
    """
    gram = checked_gram(statistics)
    return replace(statistics, gram=gram - statistics.tokens * torch.outer(statistics.mean, statistics.mean))


def whitening_factor(statistics: LayerStatistics, shrinkage: float = 0.0) -> Float[Tensor, "n n"]:
    """A factor S of the second moment: S S^T = G/N + shrinkage * tr(G/N)/n * I.

    S = Q sqrt(lambda) from the eigenvalues of G/N in float64, with what rounding left below zero set to zero: no
    Cholesky factor that could fail, and no absolute constant, so S scales with the activations. S^-1 x is white.

    **Arguments:** `shrinkage`: >= 0, relative to the mean eigenvalue. A statistical choice (fewer tokens than about 5 per
    dimension), not a numerical need.

    **Returns:** `(n, n)`, float64, columns by ascending eigenvalue.

    **Reference:** Wang et al., SVD-LLM, ICLR 2025, arXiv:2403.07378, section 3.1, which uses a Cholesky factor.
    """
    values, vectors = second_moment_eigh(statistics, shrinkage)
    return vectors * values.sqrt()


def second_moment_eigh(
    statistics: LayerStatistics, shrinkage: float = 0.0
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Eigenvalues (ascending, clipped at 0) and eigenvectors of G/N + shrinkage * tr(G/N)/n * I, float64."""
    values, vectors = torch.linalg.eigh(shrunk(statistics, shrinkage).gram / statistics.tokens)
    return values.clamp_min(0.0), vectors


def shrunk(statistics: LayerStatistics, shrinkage: float) -> LayerStatistics:
    """The same statistics with G + shrinkage * tr(G)/n * I in the place of G.

    **Raises:** `ValueError`: `shrinkage` below 0, no tokens, or moments that are not finite.
    """
    if not shrinkage >= 0.0:
        raise ValueError(f"`shrinkage` must be >= 0, got {shrinkage}.")
    gram = checked_gram(statistics).clone()
    gram.diagonal().add_(shrinkage * gram.diagonal().mean())
    return replace(statistics, gram=gram)


def output_norm(weight: Float[Tensor, "m n"], statistics: LayerStatistics) -> float:
    """||W X||_F = sqrt(tr(W G W^T)), in float64: the norm of a layer's outputs, or of the error W - W' in them."""
    w = weight.detach().double()
    return torch.einsum("mn,mn->", w @ checked_gram(statistics).to(w.device), w).clamp_min(0.0).sqrt().item()


def statistics_of_rows(rows: Float[Tensor, "tokens n"]) -> LayerStatistics:
    """The statistics of given input vectors, multiplied in float64."""
    moments = Moments(rows.shape[-1], rows.device, torch.float64)
    moments.add(rows)
    return moments.finish()


def checked_gram(statistics: LayerStatistics) -> Float[Tensor, "n n"]:
    """G in float64, once it is known to be usable.

    **Raises:** `ValueError`: no tokens, or moments that are not finite.
    """
    if statistics.tokens < 1:
        raise ValueError(f"`statistics` must count at least one token, got {statistics.tokens}.")
    if not all_finite(statistics.gram):
        raise ValueError("`statistics.gram` must be finite, got NaN or infinity.")
    return statistics.gram.double()


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. Looks at the extremes: `isfinite` would make a copy of the size of the tensor."""
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


class Moments:
    """The running sums of one input, or of the output gradients of one layer."""

    def __init__(self, size: int, device: torch.device, products: torch.dtype) -> None:
        self.products = products
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.abs_sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, rows: Float[Tensor, "tokens n"]) -> None:
        for block in rows.detach().split(BLOCK_TOKENS):
            block = block.to(torch.promote_types(block.dtype, self.products))
            parts = _outer_sum(block).to(self.gram.device).split(SLAB)
            for gram, part in zip(self.gram.split(SLAB), parts, strict=True):
                gram += part
            self.sum += block.sum(0).to(self.sum)  # torch sums pairwise: rounding does not grow with the block
            self.abs_sum += block.abs().sum(0).to(self.sum)
        self.tokens += len(rows)

    def finish(self) -> LayerStatistics:
        return LayerStatistics(
            gram=(self.gram + self.gram.T).div_(2),
            tokens=self.tokens,
            mean=self.sum / self.tokens,
            abs_mean=self.abs_sum / self.tokens,
        )


def _outer_sum(rows: Float[Tensor, "tokens n"]) -> Float[Tensor, "n n"]:
    """sum of x x^T over rows. NumPy sees that both factors are one matrix and calls syrk; torch multiplies in full."""
    if rows.device.type == "cpu":
        array = rows.numpy()
        with np.errstate(all="ignore"):  # what is not finite is looked for afterwards, and named
            return torch.from_numpy(array.T @ array)
    return rows.T @ rows
