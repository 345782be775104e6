"""The edge of the spectrum of noise, for matrices of any size."""

from functools import lru_cache
from math import exp, log, pi

import numpy as np

TRACY_WIDOM = 3.27  # the largest eigenvalue of noise exceeds it once in a thousand cases, in units of its spread
POINTS = 20000  # of the density of Marchenko and Pastur
# Exponents of the fit below, of 1, log k, log n/k and its square; of 1/k and (log n/k)/k if k is even; of 1/(k (n - k + 1)).
FIT = (1.895, -1.150, -1.133, 0.079, 1.845, -0.344, 0.902)


@lru_cache
def noise_edge(shape: tuple[int, int]) -> float:
    """Compute the edge of the spectrum of noise: the largest sigma^2 divided by the median sigma^2.

    A matrix of independent Gaussian entries exceeds it once in a thousand cases, at any size: the largest value fluctuates by the
    law of Tracy and Widom, the median of a short spectrum by as much again. The second part is a fit to simulations of 55
    shapes from 3 x 3 to 128 x 512, of 40,000 matrices each at least. Of an even number of values, the lower of the two middle
    ones is the median.

    **Arguments**

    - `shape`: (out, in).

    **Reference** Johnstone, On the distribution of the largest eigenvalue in principal components analysis, 2001, for centre
    and spread of the largest value; Marchenko and Pastur for the median.
    """
    k, n = (float(size) for size in sorted(shape))
    one, other = (n - 0.5) ** 0.5, (k - 0.5) ** 0.5
    largest = (one + other) ** 2 + TRACY_WIDOM * (one + other) * (1 / one + 1 / other) ** (1 / 3)
    middle = ((k - 1) // 2 + 0.5) / k  # the place of the median among the values
    even, excess = float(k % 2 == 0), log(n / k)
    terms = (1.0, log(k), excess, excess**2, even / k, even * excess / k, 1 / (k * (n - k + 1)))
    fluctuation = exp(sum(weight * term for weight, term in zip(FIT, terms, strict=True)))
    return largest / (n * _quantile(k / n, middle)) * exp(fluctuation)


def _quantile(ratio: float, share: float) -> float:
    """Return the value below which a share of the spectrum of noise lies, for k / n = ratio and entries of variance 1 / n."""
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    ends = np.arange(POINTS + 1) * (pi / POINTS)  # of steps of an angle, of which the density is a smooth function
    middles = (ends[1:] + ends[:-1]) / 2
    values = lambda angles: (low + high) / 2 - (high - low) / 2 * np.cos(angles)  # noqa: E731
    mass = np.cumsum(np.sin(middles) ** 2 / values(middles))
    return float(np.interp(share, mass / mass[-1], values(ends[1:])))
