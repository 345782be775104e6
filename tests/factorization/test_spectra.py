"""Functions of singular values: closed forms, invariances, extremes."""

import math

import numpy as np
import pytest
import torch

from lowrank.factorization.spectra import (
    effective_rank,
    nuclear_norm,
    rank_for_energy,
    retained_energy,
    stable_rank,
    tail_energy,
)

GEOMETRIC = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-200, 1e-6, 1.0, 1e6, 1e200])
@pytest.mark.parametrize("rank", [1, 7, 64])
def test_equal_values_have_their_number_as_rank(rank: int, scale: float) -> None:
    values = torch.cat([torch.full((rank,), scale, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)])
    assert stable_rank(values).item() == pytest.approx(rank, rel=1e-12)
    assert effective_rank(values).item() == pytest.approx(rank, rel=1e-12)
    assert rank_for_energy(values, 1.0) == rank


def test_geometric_spectrum_against_closed_forms() -> None:
    assert stable_rank(GEOMETRIC).item() == pytest.approx(85 / 64)
    assert nuclear_norm(GEOMETRIC).item() == 15
    p = np.array([8, 4, 2, 1]) / 15
    assert effective_rank(GEOMETRIC).item() == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    for rank, kept in enumerate([0, 64, 80, 84, 85]):
        assert retained_energy(GEOMETRIC, rank).item() == pytest.approx(kept / 85)
        assert tail_energy(GEOMETRIC, rank).item() == pytest.approx(1 - kept / 85)


@pytest.mark.parametrize(("threshold", "rank"), [(0.1, 1), (64 / 85, 1), (0.76, 2), (0.95, 3), (0.99, 4), (1.0, 4)])
def test_rank_for_energy_is_the_smallest_that_reaches_the_threshold(threshold: float, rank: int) -> None:
    assert rank_for_energy(GEOMETRIC, threshold) == rank


def test_ties_at_the_threshold_do_not_add_a_rank() -> None:
    assert rank_for_energy(torch.ones(10), 0.9) == 9


def test_order_does_not_matter_and_batches_equal_their_members(generator: torch.Generator) -> None:
    values = torch.rand(3, 5, 16, generator=generator, dtype=torch.float64)
    shuffled = values[..., torch.randperm(16, generator=generator)]
    for function in (stable_rank, effective_rank, nuclear_norm, lambda s: tail_energy(s, 4)):
        single = torch.stack([torch.stack([function(row) for row in block]) for block in values])
        assert torch.allclose(function(values), single, rtol=1e-14)
        assert torch.allclose(function(shuffled), single, rtol=1e-12)
    batched = rank_for_energy(values, 0.8)
    assert isinstance(batched, torch.Tensor)
    assert batched.tolist() == [[rank_for_energy(row, 0.8) for row in block] for block in values]


def test_bounds(generator: torch.Generator) -> None:
    values = torch.rand(100, 12, generator=generator)
    for function in (stable_rank, effective_rank):
        ranks = function(values)
        assert bool((ranks >= 1).all())
        assert bool((ranks <= 12 + 1e-9).all())


def test_a_zero_matrix_is_finite_and_of_rank_zero() -> None:
    zero = torch.zeros(5)
    assert stable_rank(zero) == effective_rank(zero) == nuclear_norm(zero) == 0
    assert rank_for_energy(zero, 0.9) == 0
    assert tail_energy(zero, 2) == 0
    assert retained_energy(zero, 0) == 1


@pytest.mark.parametrize("function", [stable_rank, effective_rank, nuclear_norm, lambda s: tail_energy(s, 2)])
def test_gradients_are_right_and_finite_with_zeros(function) -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, values)
    with_zero = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(stable_rank(with_zero), with_zero)[0]
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: stable_rank(torch.zeros(0)), "k >= 1"),
        (lambda: stable_rank(torch.tensor([1.0, -1.0])), ">= 0"),
        (lambda: nuclear_norm(torch.tensor([1.0, float("nan")])), "finite"),
        (lambda: tail_energy(torch.ones(3), 4), r"in \[0, 3\], got 4"),
        (lambda: rank_for_energy(torch.ones(3), 0.0), r"in \(0, 1\], got 0.0"),
        (lambda: rank_for_energy(torch.ones(3), 1.5), "got 1.5"),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
