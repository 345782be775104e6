"""The edge of noise, by simulation at every size, and changes whose rank is known."""

import numpy as np
import pytest
import torch
from torch import Tensor
from weight_changes import spectrum_of

from lowrank.lora.deltas import DeltaSpectrum
from lowrank.lora.noise import _quantile, noise_edge

SHAPES = [(3, 3), (4, 9), (5, 5), (8, 8), (7, 30), (12, 18), (16, 16), (16, 64), (32, 32), (24, 100)]


def spectra_of_noise(shape: tuple[int, int], draws: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, *shape, generator=generator)
    return torch.linalg.eigvalsh(noise @ noise.mT)  # sigma^2, ascending


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_exceeds_the_edge_once_in_a_thousand_cases(shape: tuple[int, int]) -> None:
    """Of 4,000 matrices 4 on average; 13 or more come by chance once in 3,000 times, none once in 50."""
    values = spectra_of_noise(shape, 4000)
    ratios = values[:, -1] / values[:, (shape[0] - 1) // 2]  # the lower of two middle values
    assert int((ratios > noise_edge(shape)).sum()) <= 12
    assert ratios.quantile(0.995) < noise_edge(shape) < 1.5 * ratios.quantile(0.9985)


@pytest.mark.parametrize("shape", [(5, 5), (16, 16), (40, 12)], ids=str)
def test_the_rank_of_a_spectrum_counts_what_exceeds_the_edge(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    spectra = [spectrum_of(torch.randn(shape, generator=generator)) for _ in range(300)]
    assert sum(spectrum.signal_rank > 0 for spectrum in spectra) <= 3
    spike = 1e3 * torch.randn(shape[0], 1, generator=generator) @ torch.randn(1, shape[1], generator=generator)
    assert spectrum_of(torch.randn(shape, generator=generator) + spike).signal_rank == 1


@pytest.mark.parametrize("shape", [(24, 40), (32, 32), (64, 24), (6, 6)], ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_rank_of_an_exact_product_is_its_rank(shape: tuple[int, int], rank: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in shape)
    product = spectrum_of(scale * left @ right.T)
    assert product.signal_rank == rank
    assert product.status == "signal"
    rows = torch.zeros(shape, dtype=torch.float64)
    rows[:rank] = scale * torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    assert spectrum_of(rows).signal_rank == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_of_the_weights_is_noise(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 64, generator=generator).to(dtype)
    change = 0.1 * torch.randn(64, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    tuned = (base.float() + change).to(dtype)
    assert spectrum_of(tuned.float() - base.float()).signal_rank == 2


def test_a_spectrum_of_one_value_tells_nothing() -> None:
    for shape in ((1, 1), (1, 9), (9, 1)):
        assert noise_edge(shape) > 1
        assert spectrum_of(torch.randn(shape)).status == "noise"


def test_the_edge_is_that_of_large_matrices_in_the_limit() -> None:
    """The bulk ends at (1 + sqrt(k / n))^2; the median by numerical integration of the density."""
    for ratio in (0.01, 0.25, 1.0):
        high, low = (1 + ratio**0.5) ** 2, (1 - ratio**0.5) ** 2
        x = np.linspace(low**0.5, high**0.5, 400001)[1:-1]  # in sigma, in which the density has no pole
        mass = np.cumsum(np.sqrt((high - x**2) * (x**2 - low)) / x)
        median = np.interp(0.5, mass / mass[-1], x) ** 2
        assert _quantile(ratio, 0.5) == pytest.approx(median, rel=1e-4)
        assert noise_edge((int(10**6 * ratio), 10**6)) == pytest.approx(high / median, rel=2e-3)
    assert noise_edge((30, 50)) == noise_edge((50, 30))


def test_singular_values_of_any_dtype_count_alike() -> None:
    sigma = torch.tensor([5.0, 1.0, 0.9, 0.8, 0.8, 0.7, 0.7, 0.6])
    found = [
        DeltaSpectrum((8, 200), sigma.to(dtype), 30.0, 1.0).signal_rank for dtype in (torch.float32, torch.float64)
    ]
    assert found == [1, 1]
