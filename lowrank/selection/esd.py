"""The empirical spectral density (ESD) of a weight: the sizes of its spectrum and the power-law exponents of its tail.

The eigenvalues are lambda = sigma^2 of the weight, ascending, without any normalisation. The published code computes in float32
and fits rounding errors of zeros too. Here fits leave zeros out, and a fit that cannot be made is NaN with a status.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lowrank.factorization.gram import gram_triangle, slabs, squared_singular_values
from lowrank.factorization.moments import all_finite
from lowrank.factorization.precision import with_float64
from lowrank.io.checks import require
from lowrank.selection.power_law import EQUAL, fit_power_law

WINDOWS = ("published", "corrected")
FITTED_METRICS = (
    "alpha", "alpha_distance", "alpha_xmin", "alpha_peak", "alpha_mid", "hill", "hill_tenth", "alpha_weighted", "log_alpha_norm"
)  # fmt: skip
SIZE_METRICS = ("norm", "spectral_norm", "log_norm", "log_spectral_norm", "stable_rank", "entropy", "matrix_rank")
SPECTRAL_METRICS = tuple(name for name in FITTED_METRICS + SIZE_METRICS if name not in ("alpha_distance", "alpha_xmin"))
_FEW = 8  # eigenvalues; a shorter tail says nothing
_EPSILON = 1e-10  # keeps the logarithms of the entropy finite


def esd_metrics(
    weight: Float[Tensor, "out in *kernel"], window: str = "published", smallest: float | int = 0.0
) -> dict[str, Any]:
    """Compute the metrics of the spectrum of one weight.

    **Arguments**

    - `weight`: `(out, in)`, any floating dtype. For a convolution `(out, in, kh, kw)` the eigenvalues of all kernel positions
      are pooled and halved, as published.
    - `window`: where the tail of `alpha_peak` may start. 'published' compares a logarithm with an eigenvalue at the lower end;
      'corrected' compares eigenvalues.
    - `smallest`: fits keep lambda > `smallest`, a number >= 0; WeightWatcher takes 1e-5.

    **Returns** a dict with `status`, one of

    - 'ok'
    - 'few': fewer than 8 eigenvalues are left
    - 'rank deficient': the fits leave out zeros
    - 'constant': all eigenvalues are equal
    - 'constant tail': the upper half of the eigenvalues is equal, and `alpha_mid` is NaN
    - 'zero': the weight is zero
    - 'not finite': the weight contains NaN or infinity
    - 'empty window': no tail starts in the window of `alpha_peak`

    and these floats, NaN if undefined:

    - `alpha`: exponent of the tail with the least Kolmogorov-Smirnov distance; `alpha_distance`: this distance; `alpha_xmin`:
      the eigenvalue at which this tail starts
    - `alpha_peak`: as `alpha`, among the tails that start near the peak of the histogram of log lambda
    - `alpha_mid`: exponent of the upper half of the eigenvalues
    - `hill`, `hill_tenth`: Hill's estimator for the upper half and the upper tenth
    - `alpha_weighted`: alpha log10 lambda_max; `log_alpha_norm`: log10 sum lambda^alpha
    - `norm`: sum lambda; `spectral_norm`: lambda_max; `log_norm`, `log_spectral_norm`: the same to base 10
    - `stable_rank`: norm / spectral_norm; `matrix_rank`: the numerical rank in float32; `entropy`: of lambda / sum lambda,
      divided by the log of the rank

    **Raises**

    - `ValueError`: an unknown window; a weight of fewer than two dimensions.

    **Reference** Clauset, Shalizi and Newman, SIAM Review 2009, for the fit; Lu et al., AlphaPruning, NeurIPS 2024; Martin, Peng
    and Mahoney, Nature Communications 2021.
    """
    return esd_metrics_together([weight], window, smallest)[0]


def esd_metrics_together(
    weights: Sequence[Tensor], window: str = "published", smallest: float | int = 0.0
) -> list[dict[str, Any]]:
    """Compute the metrics of the spectra of several weights at once.

    Gram matrices of one size are decomposed as a batch, which saves time on an accelerator. All of them are in memory
    together: 8 min(out, in)^2 bytes each.

    **Arguments**

    - `weights`: each `(out, in, *kernel)`, any floating dtype.
    - `window`, `smallest`: as in `esd_metrics`.

    **Returns** the dict of `esd_metrics` for each weight.

    **Raises**

    - `ValueError`: as `esd_metrics`.
    """
    require(window in WINDOWS, "window", f"be one of {list(WINDOWS)}", window)
    for weight in weights:
        require(weight.dim() >= 2, "weight", "have at least 2 dimensions", tuple(weight.shape))
    finite = [index for index, weight in enumerate(weights) if all_finite(weight)]
    spectra = dict(zip(finite, eigenvalues_together([weights[index] for index in finite]), strict=True))
    return [
        _compute_metrics(spectra[index], max(weight.shape[:2]), window, smallest)
        if index in spectra
        else _missing_metrics("not finite")
        for index, weight in enumerate(weights)
    ]


def eigenvalues(weight: Float[Tensor, "out in *kernel"]) -> Float[Tensor, " values"]:
    """Return the eigenvalues lambda = sigma^2 of a weight.

    **Arguments**

    - `weight`: `(out, in)`, any floating dtype. For a convolution the eigenvalues of all kernel positions are pooled and halved.

    **Returns** float64 `(min(out, in) * positions,)`, ascending, on the weight's device, or on the CPU if that has no float64.
    """
    return eigenvalues_together([weight])[0]


def eigenvalues_together(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the eigenvalues of several weights, with Gram matrices of one size decomposed as a batch.

    **Arguments**

    - `weights`: each as in `eigenvalues`.

    **Returns** the result of `eigenvalues` for each weight.
    """
    parts = [
        (owner, matrix)
        for owner, weight in enumerate(weights)
        for matrix in _split_kernel(with_float64(weight.detach()))
    ]
    grams = [gram_triangle(slabs(matrix)) for _, matrix in parts]
    spectra: list[list[Tensor]] = [[] for _ in weights]
    for size in dict.fromkeys(len(gram) for gram in grams):
        same = [index for index, gram in enumerate(grams) if len(gram) == size]
        batch = torch.stack([grams[i] for i in same]) if len(same) > 1 else grams[same[0]][None]  # one needs no copy
        for index, values in zip(same, squared_singular_values(batch), strict=True):
            spectra[parts[index][0]].append(values)
    factors = [0.5 if weight.dim() > 2 else 1.0 for weight in weights]
    return [torch.cat(values).sort().values * factor for values, factor in zip(spectra, factors, strict=True)]


def _split_kernel(weight: Tensor) -> Sequence[Tensor]:
    """Return the matrices `(out, in)` of all kernel positions."""
    return [weight] if weight.dim() == 2 else weight.flatten(2).unbind(-1)


def _missing_metrics(status: str) -> dict[str, Any]:
    return {"status": status} | dict.fromkeys(FITTED_METRICS + SIZE_METRICS, math.nan)


def _compute_metrics(
    spectrum: Float[Tensor, " values"], largest_side: int, window: str, smallest: float | int
) -> dict[str, Any]:
    """Compute the metrics of ascending eigenvalues; `largest_side` is max(out, in), for the numerical rank."""
    values = spectrum.cpu().numpy()
    total, top = float(values.sum()), float(values[-1])
    metrics = _missing_metrics("ok")
    if top == 0:
        return metrics | {"status": "zero", "norm": 0.0, "spectral_norm": 0.0, "matrix_rank": 0.0}
    rounding = float(np.finfo(np.float32).eps)
    rank = int((values > top * (largest_side * rounding) ** 2).sum())
    metrics |= _compute_sizes(values, total, top, rank)
    # the rounding errors of a float32 matrix of lower rank, and values too small for the Gram matrix to tell from zero
    zero = top * max(16 * rounding**2, len(values) * float(np.finfo(np.float64).eps))
    kept = values[values > max(zero, smallest)]
    if len(kept) < len(values) and smallest < zero:
        metrics["status"] = "rank deficient"
    if len(kept) < _FEW:
        metrics["status"] = "few"
    if len(kept) < 2:
        return metrics
    if kept[-1] <= kept[0] * (1 + EQUAL):
        return metrics | {"status": "constant"}
    return metrics | fit_power_law(kept, window, metrics["status"])


def _compute_sizes(values: np.ndarray, total: float, top: float, rank: int) -> dict[str, float]:
    share = values / total + _EPSILON
    return {
        "norm": total,
        "spectral_norm": top,
        "log_norm": math.log10(total),
        "log_spectral_norm": math.log10(top),
        "stable_rank": total / top,
        "entropy": float(-(share * np.log(share)).sum() / math.log(rank + _EPSILON)) if rank > 1 else 0.0,
        "matrix_rank": float(rank),
    }
