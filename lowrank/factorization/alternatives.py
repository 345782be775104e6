"""Other computations of the whitened optimum in common use, to compare `whitened` with.

All are functions `(weight, rank, statistics) -> Factors`. On well-conditioned moments they agree; they differ if G is nearly
singular. Nothing in the library builds on them.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank.factorization.factorize import Factors, factorize
from lowrank.factorization.methods import whitened
from lowrank.factorization.moments import LayerStatistics, output_norm, read_gram, second_moment_eigh
from lowrank.factorization.running_moments import statistics_of_rows


def _unwhitened(weight: Tensor, rank: int, factor: Tensor, inverse: Tensor, tokens: int) -> Factors:
    """Return [W S]_r S^-1, the classical form, with the singular values split evenly over the two factors."""
    u, sigma, vt = torch.linalg.svd(weight.to(factor.dtype) @ factor, full_matrices=False)
    root = sigma[:rank].sqrt()
    left, right = u[:, :rank] * root, (root[:, None] * vt[:rank]) @ inverse
    return Factors(left.to(weight.dtype), right.to(weight.dtype), sigma.double() * tokens**0.5)


def cholesky_inverse(weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics) -> Factors:
    """Truncate by a Cholesky factor of G summed in float32 and its explicit inverse.

    If Cholesky fails, (|lambda_min| + 1e-6) I is added, an absolute constant. S and its inverse are cast to float32, as in the
    widely copied code of SVD-LLM (arXiv:2403.07378).

    **Arguments**

    - `weight`: W, `(out, in)`, any floating dtype.
    - `rank`: int in [1, min(out, in)].
    - `statistics`: its `gram` is used.

    **Raises**

    - `torch.linalg.LinAlgError`: Cholesky fails again after the addition.
    """
    gram = read_gram(statistics).float().double()  # as rounded by a sum in float32
    try:
        factor = torch.linalg.cholesky(gram)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        smallest = torch.linalg.eigvalsh(gram)[0]
        gram = gram + (smallest.abs() + 1e-6) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor = torch.linalg.cholesky(gram)
    factor, inverse = factor.float(), torch.linalg.inv(factor).float()
    return _unwhitened(weight, rank, factor, inverse, tokens=1)  # S S^T = G, not G/N


def eigen_inverse(weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics) -> Factors:
    """Truncate by an eigen factor of G/N in float64 and its pseudo-inverse.

    Eigenvalues below 1e-15 n lambda_max are dropped.

    **Arguments**

    - `weight`: W, `(out, in)`, any floating dtype.
    - `rank`: int in [1, min(out, in)].
    - `statistics`: its `gram` and `tokens` are used.
    """
    values, vectors = second_moment_eigh(statistics)
    root = values.sqrt()
    large = values > 1e-15 * len(values) * values[-1]
    inverse = torch.where(large, 1.0 / root.clamp_min(torch.finfo(root.dtype).tiny), 0.0)
    return _unwhitened(weight, rank, vectors * root, inverse[:, None] * vectors.T, statistics.tokens)


def projector(weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics) -> Factors:
    """Truncate by the library's `whitened` and `factorize`, without any inverse.

    **Arguments**

    - `weight`: W, `(out, in)`, any floating dtype.
    - `rank`: int in [1, min(out, in)].
    - `statistics`: its `gram` is used.
    """
    return factorize(weight, rank, whitened(statistics, weight))


ALTERNATIVES: dict[str, Callable[[Tensor, int, LayerStatistics], Factors]] = {
    "cholesky + inverse": cholesky_inverse,
    "eigen factor + inverse": eigen_inverse,
    "projector": projector,
}


def stress_cases(statistics: LayerStatistics, few: Float[Tensor, "tokens n"]) -> dict[str, LayerStatistics]:
    """Return a layer's moments as measured, and in three states that real models produce.

    **Arguments**

    - `statistics`: of the layer, as measured.
    - `few`: input vectors of the layer, `(tokens, in)`, fewer than it has inputs.

    **Returns** name of the case -> `LayerStatistics`.
    """
    gram = read_gram(statistics)
    channels = torch.logspace(0, -6, len(gram), dtype=torch.float64, device=gram.device)
    return {
        "as measured": statistics,
        "scaled by 1e-4": replace(statistics, gram=gram * 1e-8),
        "half as many tokens as inputs": statistics_of_rows(few),
        "channels from 1 to 1e-6": replace(statistics, gram=channels[:, None] * gram * channels),
    }


def compare_alternatives(
    weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics, repeats: int
) -> Iterator[tuple[str, float, float, float]]:
    """Measure error and time of each alternative on one layer.

    The optimum is the tail of the singular values of W S in float64. If it is zero to rounding, only the second figure means
    anything and the first is NaN.

    **Arguments**

    - `weight`: W, `(out, in)`, any floating dtype.
    - `rank`: int in [1, min(out, in)].
    - `statistics`: of the layer.
    - `repeats`: int >= 1, timed runs of each alternative.

    **Returns** an iterator of: name, error over the optimum minus 1, excess error over ||W X||_F, median time in ms. The errors
    are infinite if an alternative raises.
    """
    values, vectors = second_moment_eigh(statistics)
    sigma = torch.linalg.svdvals(weight.double() @ (vectors * values.sqrt())) * statistics.tokens**0.5
    output = sigma.norm().item()
    best = sigma[rank:].norm().item()
    for name, truncate in ALTERNATIVES.items():
        times, error = [], float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            try:
                factors = truncate(weight, rank, statistics)
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
                break
            times.append(time.perf_counter() - start)
            error = output_norm(weight.double() - factors.left.double() @ factors.right.double(), statistics)
        ratio = error / best - 1 if best > 1e-6 * output else float("nan")
        yield name, ratio, (error - best) / output, 1e3 * median(times) if times else float("nan")
