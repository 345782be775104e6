"""The empirical spectral density (ESD) of a weight: power-law exponents of its tail, and what they say about pruning it.

Eigenvalues are lambda = sigma^2 of the weight, ascending, nothing divided out. The published code computes in float32 and keeps
what rounding makes of zeros; here zeros are left out of fits, and a fit that cannot be made is NaN with a status.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lowrank.factorization.gram import gram_matrix, slabs, squared_singular_values

WINDOWS = ("published", "corrected")
BINS = 100
SCRATCH = 2**15  # numbers of a block of tails, in the cache of a core; an accelerator takes more
FEW = 8  # a tail of fewer eigenvalues says nothing
EPSILON = 1e-10  # of the entropy


def esd_metrics(
    weight: Float[Tensor, "out in *kernel"], window: str = "published", smallest: float | int = 0.0
) -> dict[str, Any]:
    """Metrics of the spectrum of one weight.

    **Arguments:** `weight`: a matrix, any floating dtype; of a convolution `(out, in, kh, kw)` the eigenvalues of all kernel
    positions are pooled, each halved, as published. `window`: of `alpha_peak`: 'published', whose lower end compares a
    logarithm with an eigenvalue, or 'corrected'. `smallest`: fits keep lambda > smallest; 1e-5 in WeightWatcher.

    **Returns:** `status`: 'ok', 'few' (fewer than 8 eigenvalues are left), 'rank deficient' (zeros were left out of the fits),
    'constant' (all are equal), 'zero', 'not finite', 'empty window'; and floats, NaN where there is none: `alpha`, the exponent
    of the tail whose Kolmogorov-Smirnov distance `alpha_distance` is least, and `alpha_xmin`, where that tail starts;
    `alpha_peak`, the same among tails that start near the peak of the histogram of log lambda; `alpha_mid`, of the upper half;
    `hill`, Hill's estimator for the upper half, and `hill_tenth`; `alpha_weighted` = alpha log10 lambda_max; `log_alpha_norm` =
    log10 sum lambda^alpha; `norm` = sum lambda, `spectral_norm` = lambda_max, and `log_norm`, `log_spectral_norm` to base 10;
    `stable_rank`; `entropy`; `matrix_rank`.

    **Raises:** `ValueError`: an unknown window, a weight of fewer than 2 dimensions.

    **Reference:** Clauset, Shalizi and Newman, SIAM Review 2009, for the fit; Lu et al., AlphaPruning, NeurIPS 2024; Martin,
    Peng and Mahoney, Nature Communications 2021.
    """
    return esd_metrics_together([weight], window, smallest)[0]


def esd_metrics_together(
    weights: Sequence[Tensor], window: str = "published", smallest: float | int = 0.0
) -> list[dict[str, Any]]:
    """`esd_metrics` of several weights `(out, in, *kernel)`. Their Gram matrices are held together and those of one size are
    decomposed as a batch, which an accelerator does at once: 8 min(out, in)^2 bytes each."""
    if window not in WINDOWS:
        raise ValueError(f"`window` must be one of {list(WINDOWS)}, got {window!r}.")
    if flat := next((weight for weight in weights if weight.dim() < 2), None):
        raise ValueError(f"`weight` must have at least 2 dimensions, got shape {tuple(flat.shape)}.")
    finite = [index for index, weight in enumerate(weights) if bool(torch.isfinite(weight).all())]
    spectra = dict(zip(finite, eigenvalues_together([weights[index] for index in finite]), strict=True))
    return [
        spectrum_metrics(spectra[index], max(weight.shape[:2]), window, smallest)
        if index in spectra
        else {"status": "not finite"} | dict.fromkeys(FITTED + PLAIN, math.nan)
        for index, weight in enumerate(weights)
    ]


FITTED = (
    "alpha", "alpha_distance", "alpha_xmin", "alpha_peak", "alpha_mid", "hill", "hill_tenth", "alpha_weighted", "log_alpha_norm"
)  # fmt: skip
PLAIN = ("norm", "spectral_norm", "log_norm", "log_spectral_norm", "stable_rank", "entropy", "matrix_rank")
METRICS = tuple(name for name in FITTED + PLAIN if name not in ("alpha_distance", "alpha_xmin"))


def eigenvalues(weight: Float[Tensor, "out in *kernel"]) -> Float[Tensor, " values"]:
    """lambda of a weight, ascending, float64, on its device; of a kernel those of its positions together, halved."""
    return eigenvalues_together([weight])[0]


def eigenvalues_together(weights: Sequence[Tensor]) -> list[Tensor]:
    """`eigenvalues` of several weights."""
    parts = [(owner, matrix) for owner, weight in enumerate(weights) for matrix in _matrices(weight.detach())]
    grams = [gram_matrix(slabs(matrix)) for _, matrix in parts]
    spectra: list[list[Tensor]] = [[] for _ in weights]
    for size in dict.fromkeys(len(gram) for gram in grams):
        where = [index for index, gram in enumerate(grams) if len(gram) == size]
        for index, values in zip(where, squared_singular_values(torch.stack([grams[i] for i in where])), strict=True):
            spectra[parts[index][0]].append(values)
    halved = [0.5 if weight.dim() > 2 else 1.0 for weight in weights]
    return [torch.cat(own).sort().values * factor for own, factor in zip(spectra, halved, strict=True)]


def _matrices(weight: Tensor) -> Sequence[Tensor]:
    return [weight] if weight.dim() == 2 else weight.flatten(2).unbind(-1)


def spectrum_metrics(
    spectrum: Float[Tensor, " values"], largest_side: int, window: str, smallest: float | int
) -> dict[str, Any]:
    """`esd_metrics` of eigenvalues, ascending; `largest_side`: the larger side of the matrix, for its numerical rank."""
    values = spectrum.cpu().numpy()
    total, top = float(values.sum()), float(values[-1])
    metrics: dict[str, Any] = {"status": "ok"} | dict.fromkeys(FITTED + PLAIN, math.nan)
    if top == 0:
        return metrics | {"status": "zero", "norm": 0.0, "spectral_norm": 0.0, "matrix_rank": 0.0}
    rounding = float(np.finfo(np.float32).eps)
    rank = int((values > top * (largest_side * rounding) ** 2).sum())
    share = values / total + EPSILON
    metrics |= {
        "norm": total,
        "spectral_norm": top,
        "log_norm": math.log10(total),
        "log_spectral_norm": math.log10(top),
        "stable_rank": total / top,
        "entropy": float(-(share * np.log(share)).sum() / math.log(rank + EPSILON)) if rank > 1 else 0.0,
        "matrix_rank": float(rank),
    }
    # what rounding a matrix of lower rank to float32 leaves, and what the Gram matrix cannot tell from zero
    zero = top * max(16 * rounding**2, len(values) * float(np.finfo(np.float64).eps))
    kept = values[values > max(zero, smallest)]
    if len(kept) < len(values) and smallest < zero:
        metrics["status"] = "rank deficient"
    if len(kept) < FEW:
        metrics["status"] = "few"
    if len(kept) < 2:
        return metrics
    if kept[-1] <= kept[0] * (1 + 1e-12):
        return metrics | {"status": "constant"}
    return metrics | _fits(kept, window, metrics["status"], spectrum.device)


def _fits(values: np.ndarray, window: str, status: str, device: torch.device) -> dict[str, Any]:
    """Exponents of the tail of eigenvalues that are positive and not all equal."""
    exponents, distances = (found.cpu().numpy() for found in _tails(torch.from_numpy(values).to(device)))
    best = int(np.argmin(distances))
    low, high = _window(values, window)
    near = np.flatnonzero((values[:-1] >= low) & (values[:-1] <= high))
    alpha, top = float(exponents[best]), math.log(values[-1])
    middle = len(values) // 2
    return {
        "status": status if len(near) else "empty window",
        "alpha": alpha,
        "alpha_distance": float(distances[best]),
        "alpha_xmin": float(values[best]),
        "alpha_peak": float(exponents[near[np.argmin(distances[near])]]) if len(near) else math.nan,
        "alpha_mid": float(exponents[middle]) if middle < len(exponents) else math.nan,
        "hill": _hill(values, len(values) // 2),
        "hill_tenth": _hill(values, len(values) // 10),
        "alpha_weighted": alpha * top / math.log(10),
        "log_alpha_norm": (alpha * top + math.log(np.exp(alpha * (np.log(values) - top)).sum())) / math.log(10),
    }


def _tails(values: Float[Tensor, " n"]) -> tuple[Float[Tensor, " starts"], Float[Tensor, " starts"]]:
    """For every start of the tail but the last: the exponent of maximum likelihood, and how far it is from the data."""
    logs, count = values.log(), len(values)
    left = torch.arange(count, 0, -1, device=values.device, dtype=torch.float64)  # how many a tail has
    sums = logs.flip(0).cumsum(0).flip(0)
    exponents = (1 + left / (sums - left * logs).clamp_min(0.0))[:-1]
    together = max(1, (SCRATCH if values.device.type == "cpu" else 512 * SCRATCH) // count)
    distances = []
    for first in range(0, count - 1, together):
        rows = slice(first, min(first + together, count - 1))  # tails by eigenvalues; below the diagonal is no tail
        gaps = (logs[first:] - logs[rows, None]).mul_(1 - exponents[rows, None]).exp_().neg_().add_(1)
        gaps.sub_((left[rows, None] - left[first:]).div_(left[rows, None]))
        distances.append(gaps.triu_().abs_().amax(1))
    found = torch.cat(distances)
    return exponents, found.where(exponents.isfinite(), math.inf)


def _window(values: np.ndarray, window: str) -> tuple[float, float]:
    """Where a tail may start: from 0.95 to 1.5 times the left edge of the fullest of 100 bins of log10 lambda."""
    counts, edges = np.histogram(np.log10(values), bins=BINS)
    peak = 10 ** float(edges[int(np.argmax(counts))])
    return (0.95 * peak if window == "corrected" else math.log10(0.95 * peak)), 1.5 * peak


def _hill(values: np.ndarray, count: int) -> float:
    """1 + k / sum of ln lambda / threshold over the k largest; the threshold is the next one."""
    if not 1 <= count < len(values):
        return math.nan
    spread = float((np.log(values[-count:]) - math.log(values[-count - 1])).sum())
    return 1 + count / spread if spread > 0 else math.nan
