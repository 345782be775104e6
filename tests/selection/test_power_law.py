"""The fit of a tail against all tails, one after the other: what bounds leave out must not change the answer."""

import math

import numpy as np
import pytest

from lowrank.selection.esd import FITTED_METRICS
from lowrank.selection.power_law import fit_power_law

GENERATOR = np.random.default_rng(0)
SPECTRA = {
    "power law": GENERATOR.pareto(1.5, 300) + 1,
    "from a small value on": GENERATOR.pareto(2.0, 257) + 1e-6,
    "exponential": GENERATOR.exponential(1.0, 222),
    "uniform": GENERATOR.uniform(1e-9, 1.0, 301),
    "lognormal, over decades": GENERATOR.lognormal(0.0, 4.0, 320),
    "ties": np.round(GENERATOR.pareto(1.5, 300) + 1, 1),
    "every value four times": np.repeat(GENERATOR.pareto(2.0, 70) + 0.1, 4),
    "a constant tail": np.concatenate([GENERATOR.pareto(2.0, 150).clip(max=5) + 0.1, np.full(4, 7.0)]),
    "two": np.array([1.0, 2.0]),
    "a stride": GENERATOR.pareto(1.0, 32) + 1,
    "one more": GENERATOR.pareto(1.0, 33) + 1,
}


def closest(values: np.ndarray, starts: np.ndarray) -> tuple[float, float, float]:
    """The exponent, the distance and the start of the first tail that is closest, of those that start as given."""
    best = (math.nan, math.inf, math.nan)
    for start in starts:
        tail = values[start:]
        spread = sum(math.log(value / tail[0]) for value in tail)
        if spread == 0:
            continue
        alpha = 1 + len(tail) / spread
        distance = np.abs(1 - (tail / tail[0]) ** (1 - alpha) - np.arange(len(tail)) / len(tail)).max()
        if distance < best[1] * (1 - 1e-12):
            best = (alpha, float(distance), float(tail[0]))
    return best


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("window", ["published", "corrected"])
def test_the_closest_of_all_tails_is_found(name: str, window: str) -> None:
    values = np.sort(SPECTRA[name])
    fit = fit_power_law(values, window, "ok")
    assert fit.keys() == {"status", *FITTED_METRICS}
    found = (fit["alpha"], fit["alpha_distance"], fit["alpha_xmin"])
    assert found == pytest.approx(closest(values, np.arange(len(values) - 1)), rel=1e-9)
    counts, edges = np.histogram(np.log10(values), bins=100)
    peak = 10 ** edges[np.argmax(counts)]
    low = 0.95 * peak if window == "corrected" else math.log10(0.95 * peak)
    near = np.flatnonzero((values[:-1] >= low) & (values[:-1] <= 1.5 * peak))
    if len(near):
        assert fit["status"] == "ok"
        assert fit["alpha_peak"] == pytest.approx(closest(values, near)[0], rel=1e-9)
    else:
        assert fit["status"] == "empty window"
        assert math.isnan(fit["alpha_peak"])


@pytest.mark.parametrize("noise", [0.0, 1e-15])
@pytest.mark.parametrize("equal", [16, 20, 31])
def test_a_tail_that_does_not_fall_has_no_exponent(equal: int, noise: float) -> None:
    """As of a weight with as many orthonormal rows: the rest falls, the upper half is equal up to rounding."""
    values = np.sort(np.r_[np.geomspace(0.01, 0.9, 32 - equal), 1 + noise * np.arange(equal)])
    fit = fit_power_law(values, "corrected", "ok")
    assert fit["status"] in ("constant tail", "empty window")
    assert math.isnan(fit["alpha_mid"])
    assert not any(math.isinf(fit[name]) or fit[name] > 1e6 for name in FITTED_METRICS if not math.isnan(fit[name]))
    assert fit_power_law(values, "corrected", "rank deficient")["status"] in ("rank deficient", "empty window")


def test_the_exponents_are_those_of_any_scale() -> None:
    values = np.sort(SPECTRA["power law"])
    plain, scaled = fit_power_law(values, "corrected", "ok"), fit_power_law(1e-7 * values, "corrected", "ok")
    for name in ("alpha", "alpha_distance", "alpha_peak", "alpha_mid", "hill", "hill_tenth"):
        assert scaled[name] == pytest.approx(plain[name], rel=1e-9), name
