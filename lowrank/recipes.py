"""Other ways to compute the whitened optimum, as they are in common use, to compare `factorize.whitened` with.

All share the signature of a method. On well-conditioned moments they agree; they differ where G is nearly singular.
Nothing in the library builds on them.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank.factorize import Factors, Method, whitened
from lowrank.statistics import LayerStatistics, second_moment_eigh


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
    except torch.linalg.LinAlgError:
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
