"""Other ways to compute the whitened optimum, as they are in common use, to compare `factorize.whitened` with.

All share the signature of a method. On well-conditioned moments they agree; they differ where G is nearly singular.
Nothing in the library builds on them.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank.factorization.methods import Factors, Method, whitened
from lowrank.factorization.moments import LayerStatistics, output_norm, second_moment_eigh, statistics_of_rows


def _unwhitened(weight: Tensor, rank: int, factor: Tensor, inverse: Tensor, tokens: int) -> Factors:
    """[W S]_r S^-1, the classical form, with the singular values split evenly over the two factors."""
    u, sigma, vt = torch.linalg.svd(weight.to(factor.dtype) @ factor, full_matrices=False)
    root = sigma[:rank].sqrt()
    left, right = u[:, :rank] * root, (root[:, None] * vt[:rank]) @ inverse
    return Factors(left.to(weight.dtype), right.to(weight.dtype), sigma.double() * tokens**0.5)


def cholesky_inverse(weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics) -> Factors:
    """Cholesky factor of G summed in float32, its explicit inverse, and a fallback where Cholesky fails.

    The fallback adds (|lambda_min| + 1e-6) I, an absolute constant; S and its inverse are cast to float32, as in the
    widely copied code of SVD-LLM (arXiv:2403.07378).

    **Raises:** `torch.linalg.LinAlgError`: Cholesky fails again after the fallback.
    """
    gram = statistics.gram.float().double()  # the rounding of a float32 sum
    try:
        factor = torch.linalg.cholesky(gram)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        smallest = torch.linalg.eigvalsh(gram)[0]
        gram = gram + (smallest.abs() + 1e-6) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor = torch.linalg.cholesky(gram)
    factor, inverse = factor.float(), torch.linalg.inv(factor).float()
    return _unwhitened(weight, rank, factor, inverse, tokens=1)  # S S^T = G, not G/N


def eigen_inverse(weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics) -> Factors:
    """Eigen factor of G/N in float64 and its pseudo-inverse: eigenvalues below 1e-15 n lambda_max are dropped."""
    values, vectors = second_moment_eigh(statistics)
    root = values.sqrt()
    kept = values > 1e-15 * len(values) * values[-1]
    inverse = torch.where(kept, 1.0 / root.clamp_min(torch.finfo(root.dtype).tiny), 0.0)
    return _unwhitened(weight, rank, vectors * root, inverse[:, None] * vectors.T, statistics.tokens)


RECIPES: dict[str, Method] = {
    "cholesky + inverse": cholesky_inverse,
    "eigen factor + inverse": eigen_inverse,
    "projector": whitened,
}


def stress_cases(statistics: LayerStatistics, few: Float[Tensor, "tokens n"]) -> dict[str, LayerStatistics]:
    """A layer's moments as they are, and in three states that real models produce.

    **Arguments:** `few`: fewer input vectors of the layer than it has inputs.
    """
    channels = torch.logspace(0, -6, len(statistics.gram), dtype=torch.float64, device=statistics.gram.device)
    return {
        "as measured": statistics,
        "scaled by 1e-4": replace(statistics, gram=statistics.gram * 1e-8),
        "half as many tokens as inputs": statistics_of_rows(few),
        "channels from 1 to 1e-6": replace(statistics, gram=channels[:, None] * statistics.gram * channels),
    }


def compare_recipes(
    weight: Float[Tensor, "out in"], rank: int, statistics: LayerStatistics, repeats: int
) -> Iterator[tuple[str, float, float, float]]:
    """Each recipe on one layer: name, error over the optimum minus 1, excess error over ||W X||_F, median time in ms.

    The errors are infinite where a recipe raises. The optimum is what the singular values of W S in float64 predict; where
    it is zero to rounding, only the second figure means anything and the first is NaN.
    """
    values, vectors = second_moment_eigh(statistics)
    sigma = torch.linalg.svdvals(weight.double() @ (vectors * values.sqrt())) * statistics.tokens**0.5
    output = sigma.norm().item()
    best = sigma[rank:].norm().item()
    for name, recipe in RECIPES.items():
        times, error = [], float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            try:
                factors = recipe(weight, rank, statistics)
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
                break
            times.append(time.perf_counter() - start)
            error = output_norm(weight.double() - factors.left.double() @ factors.right.double(), statistics)
        ratio = error / best - 1 if best > 1e-6 * output else float("nan")
        yield name, ratio, (error - best) / output, 1e3 * median(times) if times else float("nan")
