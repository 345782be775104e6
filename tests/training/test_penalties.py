"""Rank penalties: their values from an SVD, gradients against finite differences, scale, stale bases, zero matrices."""

import pytest
import torch
from torch import Tensor

from lowrank.factorization import spectra
from lowrank.training.penalties import COLUMNS, PENALTIES, power_step, singular_basis

SHAPES = [(9, 5), (6, 6), (5, 9)]
RANK = 3
FROM_SPECTRUM = {
    "stable_rank": spectra.stable_rank,
    "nuclear": spectra.nuclear_norm,
    "entropy_rank": spectra.effective_rank,
    "tail": lambda sigma: spectra.tail_energy(sigma, RANK),
}
every_penalty = pytest.mark.parametrize("name", PENALTIES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


def matrix(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=dtype)


@every_penalty
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_value_is_that_of_the_singular_values(name, shape, dtype, generator) -> None:
    weight = matrix(generator, *shape, dtype=dtype)
    expected = FROM_SPECTRUM[name](torch.linalg.svdvals(weight.double())).item()
    assert PENALTIES[name](weight, RANK).item() == pytest.approx(expected, rel=1e-4)
    assert PENALTIES[name](weight.T, RANK).item() == pytest.approx(expected, rel=1e-4)


@every_penalty
@every_shape
def test_gradients_are_those_of_finite_differences(name, shape, generator) -> None:
    weight = matrix(generator, *shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: PENALTIES[name](w, RANK), (weight,))


@every_shape
def test_the_gradient_of_the_nuclear_norm_is_u_vt(shape, generator) -> None:
    weight = matrix(generator, *shape).requires_grad_()
    u, _, vt = torch.linalg.svd(weight.detach(), full_matrices=False)
    (gradient,) = torch.autograd.grad(PENALTIES["nuclear"](weight), weight)
    torch.testing.assert_close(gradient, u @ vt, atol=1e-6, rtol=0)


@every_penalty
@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e12])
def test_scale_changes_nothing_but_the_nuclear_norm(name, scale, generator) -> None:
    weight = matrix(generator, 6, 8, dtype=torch.float32)
    grown = PENALTIES[name](scale * weight, RANK) / PENALTIES[name](weight, RANK)
    assert grown.item() == pytest.approx(scale if name == "nuclear" else 1.0, rel=1e-4)


@every_penalty
def test_a_zero_matrix_has_a_finite_value_and_gradient(name) -> None:
    weight = torch.zeros(4, 6, requires_grad=True)
    value = PENALTIES[name](weight, 2)
    (gradient,) = torch.autograd.grad(value, weight)
    assert value.item() == 0.0
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("name", ["stable_rank", "entropy_rank"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_ranks_of_known_matrices(name, scale, generator) -> None:
    orthogonal = torch.linalg.qr(matrix(generator, 12, 12)).Q
    line = torch.outer(matrix(generator, 7), matrix(generator, 12))
    assert PENALTIES[name](scale * orthogonal).item() == pytest.approx(12, rel=1e-6)
    assert PENALTIES[name](scale * line).item() == pytest.approx(1, rel=1e-6)


def test_the_tail_of_a_matrix_of_the_rank_is_nothing(generator) -> None:
    weight = matrix(generator, 8, 3) @ matrix(generator, 3, 10)
    assert PENALTIES["tail"](weight, 3).item() < 1e-20
    assert PENALTIES["tail"](weight, 8).item() < 1e-20
    assert PENALTIES["tail"](weight, 0).item() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"`rank` must be in \[0, 8\], got 9"):
        PENALTIES["tail"](weight, 9)


@every_penalty
@every_shape
def test_the_columns_that_a_penalty_names_are_all_it_looks_at(name, shape, generator) -> None:
    weight = matrix(generator, *shape)
    basis = singular_basis(weight)
    needed = basis[:, : COLUMNS[name](len(basis), RANK)]
    assert PENALTIES[name](weight, RANK, needed).item() == pytest.approx(PENALTIES[name](weight, RANK).item())


@pytest.mark.parametrize("name", ["tail", "nuclear"])
@every_shape
def test_an_old_basis_never_flatters(name, shape, generator) -> None:
    for _ in range(20):
        weight = matrix(generator, *shape)
        old = singular_basis(weight + 0.3 * matrix(generator, *shape))
        assert PENALTIES[name](weight, RANK, old).item() >= PENALTIES[name](weight, RANK).item() * (1 - 1e-12)


@every_shape
def test_power_steps_follow_a_moving_matrix(shape, generator) -> None:
    weight = matrix(generator, *shape)
    basis = singular_basis(weight)[:, :1]
    weight = weight + 0.05 * matrix(generator, *shape)
    exact = PENALTIES["stable_rank"](weight).item()
    stale = PENALTIES["stable_rank"](weight, basis=basis).item()
    for _ in range(60):
        basis = power_step(weight, basis)
    followed = PENALTIES["stable_rank"](weight, basis=basis).item()
    assert abs(followed - exact) < 1e-3 * exact
    assert abs(followed - exact) < abs(stale - exact)
    assert torch.equal(power_step(0 * weight, basis), basis)
