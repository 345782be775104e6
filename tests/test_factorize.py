"""Factors: the theorem, optimality, invariances, and inputs on which a Cholesky factor does not exist."""

import pytest
import torch
from torch import Tensor

from lowrank.factorize import METHODS, svd, whitened
from lowrank.moments import LayerStatistics, output_norm, statistics_of_rows, whitening_factor
from lowrank.recipes import RECIPES


def anisotropic(tokens: int, inputs: int, condition: float, generator: torch.Generator) -> Tensor:
    """Rows with singular values spread evenly in the logarithm."""
    rotation = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)).Q
    spread = torch.logspace(0, -torch.tensor(condition).log10().item(), inputs, dtype=torch.float64)
    rows = torch.linalg.qr(torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)).Q
    return (rows * spread) @ rotation.T * tokens**0.5


def problem(shape: tuple[int, int], condition: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    out, inputs = shape
    weight = torch.randn(out, inputs, generator=generator, dtype=torch.float64)
    return weight, anisotropic(400, inputs, condition, generator)


def measured(weight: Tensor, replaced: Tensor, rows: Tensor) -> float:
    return ((weight - replaced) @ rows.T).norm().item()


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12])
def test_discarded_singular_values_are_the_output_error(shape, condition, generator) -> None:
    weight, rows = problem(shape, condition, generator)
    statistics = statistics_of_rows(rows)
    for rank in (1, 4, min(shape) // 3, min(shape) // 2):
        factors = whitened(weight, rank, statistics)
        error = measured(weight, factors.left @ factors.right, rows)
        output = (weight @ rows.T).norm().item()
        # G carries cond(X)^2: what lies below 1e-16 of ||WX||^2 is rounding
        assert abs(error**2 - factors.error**2) <= 1e-10 * factors.error**2 + 1e-14 * output**2
        assert abs(error - factors.error) <= 1e-6 * factors.error + 1e-7 * output * (condition > 1e9)


def test_it_is_the_optimum(shape, generator) -> None:
    weight, rows = problem(shape, 100.0, generator)
    statistics, rank = statistics_of_rows(rows), 6
    best = whitened(weight, rank, statistics).error
    left = torch.linalg.svd(weight @ rows.T, full_matrices=False).U[:, :rank]  # a second method, on the data itself
    assert best == pytest.approx(measured(weight, left @ left.T @ weight, rows), rel=1e-9)
    assert best <= measured(weight, svd(weight, rank).dense(), rows)
    for _ in range(100):
        basis = torch.linalg.qr(left + 0.1 * torch.randn(left.shape, generator=generator, dtype=torch.float64)).Q
        assert best <= measured(weight, basis @ basis.T @ weight, rows)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2, 1e4])
def test_scale_of_the_activations_does_not_matter(shape, scale, generator) -> None:
    weight, rows = problem(shape, 1e4, generator)
    before = whitened(weight, 8, statistics_of_rows(rows)).dense()
    after = whitened(weight, 8, statistics_of_rows(rows * scale)).dense()
    assert torch.allclose(before, after, rtol=0, atol=1e-8 * weight.norm().item())


def test_a_rotation_of_the_inputs_rotates_the_factors(shape, generator) -> None:
    weight, rows = problem(shape, 50.0, generator)
    q = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)).Q
    plain = whitened(weight, 7, statistics_of_rows(rows)).dense()
    rotated = whitened(weight @ q.T, 7, statistics_of_rows(rows @ q.T)).dense()
    assert torch.allclose(plain, rotated @ q, atol=1e-9)


def test_every_factor_of_the_moment_gives_the_same_weight(shape, generator) -> None:
    weight, rows = problem(shape, 30.0, generator)
    statistics = statistics_of_rows(rows)
    second = statistics.gram / statistics.tokens
    values, vectors = torch.linalg.eigh(second)
    roots = [torch.linalg.cholesky(second), vectors * values.sqrt() @ vectors.T, whitening_factor(statistics)]
    expected = whitened(weight, 9, statistics).dense()
    for root in roots:
        u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
        classical = (u[:, :9] * s[:9]) @ vt[:9] @ torch.linalg.inv(root)
        assert torch.allclose(classical, expected, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_returns_the_weight(shape, method, generator) -> None:
    weight, rows = problem(shape, 10.0, generator)
    for tokens in (400, 5):  # 5: a singular moment
        factors = METHODS[method](weight, min(shape), statistics_of_rows(rows[:tokens]))
        assert torch.allclose(factors.dense(), weight, atol=1e-12)
        assert factors.error == 0


def test_unseen_directions_are_filled_by_plain_svd(shape, generator) -> None:
    weight, rows = problem(shape, 1.0, generator)
    few = statistics_of_rows(rows[:5])
    filled = whitened(weight, 12, few)
    assert measured(weight, filled.dense(), rows[:5]) <= 1e-7 * (weight @ rows[:5].T).norm()
    rest = weight - filled.left[:, :5] @ filled.left[:, :5].T @ weight
    residual = (weight - filled.dense()).norm().item()
    assert residual == pytest.approx(torch.linalg.svdvals(rest)[7:].norm().item(), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_nested_and_the_error_falls(shape, method, generator) -> None:
    weight, rows = problem(shape, 1e3, generator)
    statistics = statistics_of_rows(rows)
    full = METHODS[method](weight, min(shape), statistics)
    errors = []
    for rank in range(1, min(shape) + 1):
        direct, cut = METHODS[method](weight, rank, statistics), full.truncate(rank)
        assert torch.allclose(direct.dense(), cut.dense(), atol=1e-9)
        assert direct.error == pytest.approx(cut.error)
        assert direct.left.shape == (shape[0], rank)
        assert direct.right.shape == (rank, shape[1])
        errors.append(direct.error)
    assert errors == sorted(errors, reverse=True)


HARD = {
    "all zero": lambda rows: rows * 0,
    "constant": lambda rows: torch.ones_like(rows),
    "duplicated": lambda rows: rows[:, :1].expand_as(rows),
    "dead channels": lambda rows: rows * (torch.arange(rows.shape[1]) % 3 > 0),
    "one token": lambda rows: rows[:1],
    "fewer tokens than inputs": lambda rows: rows[:7],
    "large": lambda rows: rows * 6e4,
    "tiny": lambda rows: rows * 1e-30,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", HARD)
def test_hard_inputs_stay_finite(shape, case, dtype, generator) -> None:
    weight, rows = problem(shape, 10.0, generator)
    rows = HARD[case](rows / rows.abs().max()).to(dtype)
    statistics = statistics_of_rows(rows)
    for rank in (1, 8, min(shape)):
        factors = whitened(weight.to(dtype), rank, statistics)
        assert factors.left.dtype == dtype
        assert bool(torch.isfinite(factors.left).all() & torch.isfinite(factors.right).all())
        assert factors.error == factors.error < float("inf")


def test_half_precision_activations_do_not_overflow() -> None:
    rows = torch.full((5000, 8), 6e4, dtype=torch.float16)
    assert statistics_of_rows(rows).gram[0, 0].item() == pytest.approx(5000 * rows[0, 0].double().item() ** 2, rel=1e-6)


def test_recipes_agree_where_the_moment_is_well_conditioned(shape, generator) -> None:
    weight, rows = problem(shape, 10.0, generator)
    statistics = statistics_of_rows(rows)
    best = whitened(weight, 6, statistics)
    for recipe in RECIPES.values():
        factors = recipe(weight, 6, statistics)
        error = output_norm(weight - factors.left @ factors.right, statistics)
        assert error == pytest.approx(best.error, rel=1e-5)
        assert factors.error == pytest.approx(best.error, rel=1e-4)


def test_svd_error_is_the_frobenius_norm(shape, generator) -> None:
    weight, _ = problem(shape, 1.0, generator)
    factors = svd(weight, 5)
    assert factors.error == pytest.approx((weight - factors.dense()).norm().item(), rel=1e-12)


def empty(inputs: int) -> LayerStatistics:
    zero = torch.zeros(inputs, dtype=torch.float64)
    return LayerStatistics(torch.zeros(inputs, inputs, dtype=torch.float64), 0, zero, zero)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w, s: whitened(w, 9, s), r"`rank` must be in \[1, 4\] for a weight of shape \(6, 4\), got 9"),
        (lambda w, s: whitened(w, 0, s), r"got 0"),
        (lambda w, s: whitened(w * float("nan"), 1, s), "`weight` must be finite"),
        (lambda w, s: whitened(w, 1, statistics_of_rows(torch.ones(3, 5))), "4 inputs .* got 5"),
        (lambda w, s: whitened(w, 1, empty(4)), "at least one token, got 0"),
        (lambda w, s: whitened(w, 1, statistics_of_rows(torch.ones(3, 4) * float("nan"))), "gram` must be finite"),
        (lambda w, s: whitening_factor(s, -0.1), "`shrinkage` must be >= 0, got -0.1"),
        (lambda w, s: whitened(w, 2, s).truncate(3), r"in \[1, 2\], got 3"),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(torch.ones(6, 4), statistics_of_rows(torch.eye(4)))
