"""Factors: the theorem, optimality, invariances, and inputs on which a Cholesky factor does not exist."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowrank.factorization import decompositions
from lowrank.factorization.alternatives import ALTERNATIVES
from lowrank.factorization.factorize import Factors, factorize, weighted_norm
from lowrank.factorization.gram import eigh
from lowrank.factorization.methods import ALPHA, METHODS, RIDGE, needs_gradients
from lowrank.factorization.moments import LayerStatistics, centre_moments, output_norm, whitening_factor
from lowrank.factorization.running_moments import statistics_of_rows
from lowrank.factorization.weighting import Weighting


def truncate(method: str, weight: Tensor, rank: int, statistics: LayerStatistics | None = None) -> Factors:
    return factorize(weight, rank, METHODS[method](statistics, weight))


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


def gradients(tokens: int, outputs: int, generator: torch.Generator) -> Tensor:
    """Gradients at the outputs, correlated, of sizes that differ."""
    mixing = torch.randn(outputs, outputs, generator=generator, dtype=torch.float64)
    mixing *= torch.logspace(0, -1, outputs, dtype=torch.float64)
    return torch.randn(tokens, outputs, generator=generator, dtype=torch.float64) @ mixing * 1e-2


def statistics_with_gradients(rows: Tensor, outputs: int, generator: torch.Generator) -> LayerStatistics:
    """All that any method asks for; the row Fisher information as of samples of one token."""
    g = gradients(len(rows), outputs, generator)
    fisher = (g.square() * rows.square().sum(1, keepdim=True)).sum(0)
    return replace(statistics_of_rows(rows), gradient_gram=g.T @ g, row_fisher=fisher)


def root(moment: Tensor) -> Tensor:
    """The symmetric square root, by eigenvalues."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


# H and S of the norm ||H D S||_F, each formed in full: what the methods avoid.
SIDES: dict[str, Callable[[LayerStatistics], tuple[Tensor, Tensor]]] = {
    "svd": lambda s: (torch.eye(len(s.row_fisher)).double(), torch.eye(len(s.gram)).double()),
    "asvd": lambda s: (torch.eye(len(s.row_fisher)).double(), torch.diag(s.abs_mean**ALPHA)),
    "fwsvd": lambda s: (torch.diag(s.row_fisher.sqrt()), torch.eye(len(s.gram)).double()),
    "whitened": lambda s: (torch.eye(len(s.row_fisher)).double(), root(s.gram)),
    "two_sided": lambda s: (root(ridged(s)), root(s.gram)),
}


def ridged(statistics: LayerStatistics) -> Tensor:
    """E[g g^T] + RIDGE times its mean eigenvalue."""
    second = statistics.gradient_gram / statistics.tokens
    return second + RIDGE * second.trace() / len(second) * torch.eye(len(second)).double()


def measured(weight: Tensor, replaced: Tensor, rows: Tensor) -> float:
    return ((weight - replaced) @ rows.T).norm().item()


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12])
def test_discarded_singular_values_are_the_output_error(shape, condition, generator) -> None:
    weight, rows = problem(shape, condition, generator)
    statistics = statistics_of_rows(rows)
    for rank in (1, 4, min(shape) // 3, min(shape) // 2):
        factors = truncate("whitened", weight, rank, statistics)
        error = measured(weight, factors.left @ factors.right, rows)
        output = (weight @ rows.T).norm().item()
        # G carries cond(X)^2: what lies below 1e-16 of ||WX||^2 is rounding
        assert abs(error**2 - factors.error**2) <= 1e-10 * factors.error**2 + 1e-14 * output**2
        assert abs(error - factors.error) <= 1e-6 * factors.error + 1e-7 * output * (condition > 1e9)


@pytest.mark.parametrize("dependent", [False, True], ids=["regular weight", "dependent columns"])
def test_inputs_behind_a_layer_norm_take_one_decomposition(dependent: bool, generator, monkeypatch) -> None:
    weight, rows = problem((48, 20), 30.0, generator)
    rows = rows - rows.mean(1, keepdim=True)  # the ones are not excited: G has no Cholesky factor
    if dependent:
        weight[:, 1] = weight[:, 0]
    calls = []
    counted = lambda *args, **options: calls.append(args) or eigh(*args, **options)  # noqa: E731
    monkeypatch.setattr(decompositions, "eigh", counted)
    for rank in (1, 6, 19, 20):
        calls.clear()
        factors = truncate("whitened", weight, rank, statistics_of_rows(rows))
        u, sigma, _ = torch.linalg.svd(weight @ rows.T, full_matrices=False)  # a second method, on the data itself
        best = u[:, :rank] @ u[:, :rank].T @ weight
        least = sigma[rank:].norm().item()
        found = measured(weight, factors.left @ factors.right, rows)
        assert found == pytest.approx(least, abs=1e-7 * sigma.norm().item())
        assert measured(best, factors.left @ factors.right, rows) <= 1e-6 * sigma.norm()
        assert factors.error == pytest.approx(least, abs=1e-7 * sigma.norm().item())
        if not dependent and rank < 20:
            assert len(calls) == 1


def test_it_is_the_optimum(shape, generator) -> None:
    weight, rows = problem(shape, 100.0, generator)
    statistics, rank = statistics_of_rows(rows), 6
    best = truncate("whitened", weight, rank, statistics).error
    left = torch.linalg.svd(weight @ rows.T, full_matrices=False).U[:, :rank]  # a second method, on the data itself
    assert best == pytest.approx(measured(weight, left @ left.T @ weight, rows), rel=1e-9)
    assert best <= measured(weight, truncate("svd", weight, rank).dense(), rows)
    for _ in range(100):
        basis = torch.linalg.qr(left + 0.1 * torch.randn(left.shape, generator=generator, dtype=torch.float64)).Q
        assert best <= measured(weight, basis @ basis.T @ weight, rows)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2, 1e4])
def test_scale_of_the_activations_does_not_matter(shape, scale, generator) -> None:
    weight, rows = problem(shape, 1e4, generator)
    before = truncate("whitened", weight, 8, statistics_of_rows(rows)).dense()
    after = truncate("whitened", weight, 8, statistics_of_rows(rows * scale)).dense()
    assert torch.allclose(before, after, rtol=0, atol=1e-8 * weight.norm().item())


def test_a_rotation_of_the_inputs_rotates_the_factors(shape, generator) -> None:
    weight, rows = problem(shape, 50.0, generator)
    q = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)).Q
    plain = truncate("whitened", weight, 7, statistics_of_rows(rows)).dense()
    rotated = truncate("whitened", weight @ q.T, 7, statistics_of_rows(rows @ q.T)).dense()
    assert torch.allclose(plain, rotated @ q, atol=1e-9)


def test_every_factor_of_the_moment_gives_the_same_weight(shape, generator) -> None:
    weight, rows = problem(shape, 30.0, generator)
    statistics = statistics_of_rows(rows)
    second = statistics.gram / statistics.tokens
    values, vectors = torch.linalg.eigh(second)
    roots = [torch.linalg.cholesky(second), vectors * values.sqrt() @ vectors.T, whitening_factor(statistics)]
    expected = truncate("whitened", weight, 9, statistics).dense()
    for root in roots:
        u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
        classical = (u[:, :9] * s[:9]) @ vt[:9] @ torch.linalg.inv(root)
        assert torch.allclose(classical, expected, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_returns_the_weight(shape, method, generator) -> None:
    weight, rows = problem(shape, 10.0, generator)
    for tokens in (400, 5):  # 5: a singular moment
        statistics = statistics_with_gradients(rows[:tokens], shape[0], generator)
        factors = truncate(method, weight, min(shape), statistics)
        assert torch.allclose(factors.dense(), weight, atol=1e-12)
        assert factors.error == 0


def test_unseen_directions_are_filled_by_plain_svd(shape, generator) -> None:
    weight, rows = problem(shape, 1.0, generator)
    few = statistics_of_rows(rows[:5])
    filled = truncate("whitened", weight, 12, few)
    assert measured(weight, filled.dense(), rows[:5]) <= 1e-7 * (weight @ rows[:5].T).norm()
    rest = weight - filled.left[:, :5] @ filled.left[:, :5].T @ weight
    residual = (weight - filled.dense()).norm().item()
    assert residual == pytest.approx(torch.linalg.svdvals(rest)[7:].norm().item(), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_nested_and_the_error_falls(shape, method, generator) -> None:
    weight, rows = problem(shape, 1e3, generator)
    statistics = statistics_with_gradients(rows, shape[0], generator)
    full = truncate(method, weight, min(shape), statistics)
    errors = []
    for rank in range(1, min(shape) + 1):
        direct, cut = truncate(method, weight, rank, statistics), full.truncate(rank)
        assert torch.allclose(direct.dense(), cut.dense(), atol=1e-9)
        assert direct.error == pytest.approx(cut.error)
        assert torch.allclose(direct.spectrum, full.spectrum, rtol=1e-9, atol=1e-12 * full.spectrum[0].item())
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
        factors = truncate("whitened", weight.to(dtype), rank, statistics)
        assert factors.left.dtype == dtype
        assert bool(torch.isfinite(factors.left).all() & torch.isfinite(factors.right).all())
        assert factors.error == factors.error < float("inf")


def test_half_precision_activations_do_not_overflow() -> None:
    rows = torch.full((5000, 8), 6e4, dtype=torch.float16)
    assert statistics_of_rows(rows).gram[0, 0].item() == pytest.approx(5000 * rows[0, 0].double().item() ** 2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_factors_of_half_precision_hold_gradients_of_any_size(shape, method, scale, dtype, generator) -> None:
    weight, rows = problem(shape, 10, generator)
    weight = weight.to(dtype)
    statistics = statistics_with_gradients(rows, shape[0], generator)
    size = {"gradient_gram": statistics.gradient_gram * scale**2, "row_fisher": statistics.row_fisher * scale**2}
    weighting = METHODS[method](replace(statistics, **size), weight)
    factors = factorize(weight, 5, weighting)
    assert factors.left.dtype == factors.right.dtype == dtype
    error = weighted_norm(weight.double() - factors.left.double() @ factors.right.double(), weighting)
    assert error == pytest.approx(factors.error, rel=1e-3)
    if weighting.outputs is not None and weighting.outputs.dim() == 2:
        assert torch.allclose(factors.left.norm(dim=0), factors.right.norm(dim=1), rtol=0.02)


def test_recipes_agree_where_the_moment_is_well_conditioned(shape, generator) -> None:
    weight, rows = problem(shape, 10.0, generator)
    statistics = statistics_of_rows(rows)
    best = truncate("whitened", weight, 6, statistics)
    for recipe in ALTERNATIVES.values():
        factors = recipe(weight, 6, statistics)
        error = output_norm(weight - factors.left @ factors.right, statistics)
        assert error == pytest.approx(best.error, rel=1e-5)
        assert factors.error == pytest.approx(best.error, rel=1e-4)


def test_svd_error_is_the_frobenius_norm(shape, generator) -> None:
    weight, _ = problem(shape, 1.0, generator)
    factors = truncate("svd", weight, 5)
    assert factors.error == pytest.approx((weight - factors.dense()).norm().item(), rel=1e-12)


# --- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_optimum_of_its_own_norm(shape, method, generator) -> None:
    weight, rows = problem(shape, 100.0, generator)
    statistics, rank = statistics_with_gradients(rows, shape[0], generator), 6
    factors = truncate(method, weight, rank, statistics)

    def norm(difference: Tensor) -> float:
        return weighted_norm(difference, METHODS[method](statistics, weight))

    assert norm(weight - factors.dense()) == pytest.approx(factors.error, rel=1e-9)
    for other in METHODS:
        assert factors.error <= norm(weight - truncate(other, weight, rank, statistics).dense()) * (1 + 1e-12)
    for step in torch.logspace(-4, 0, 50).tolist():
        left, right = (
            side + step * side.abs().mean() * torch.randn(side.shape, generator=generator, dtype=torch.float64)
            for side in (factors.left, factors.right)
        )
        assert factors.error < norm(weight - left @ right)


@pytest.mark.parametrize("method", METHODS)
def test_the_spectrum_and_the_norm_are_those_of_both_sides_formed_in_full(shape, method, generator) -> None:
    weight, rows = problem(shape, 100.0, generator)
    statistics = statistics_with_gradients(rows, shape[0], generator)
    outer, inner = SIDES[method](statistics)
    spectrum = torch.linalg.svdvals(outer @ weight @ inner)
    found = truncate(method, weight, 3, statistics).spectrum
    assert torch.allclose(found, spectrum, rtol=1e-9, atol=1e-9 * spectrum[0].item())
    difference = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = (outer @ difference @ inner).norm().item()
    assert weighted_norm(difference, METHODS[method](statistics, weight)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_its_classical_form_with_inverses(shape, method, generator) -> None:
    weight, rows = problem(shape, 30.0, generator)
    statistics = statistics_with_gradients(rows, shape[0], generator)
    outer, inner = SIDES[method](statistics)
    u, s, vt = torch.linalg.svd(outer @ weight @ inner, full_matrices=False)
    for rank in (1, 7, min(shape) - 1):
        truncated = (u[:, :rank] * s[:rank]) @ vt[:rank]
        classical = torch.linalg.inv(outer) @ truncated @ torch.linalg.inv(inner)  # H^-1 [H W S]_r S^-1
        assert torch.allclose(truncate(method, weight, rank, statistics).dense(), classical, atol=1e-8)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_two_sided_is_whitened_where_all_outputs_count_alike(shape, size, generator) -> None:
    weight, rows = problem(shape, 30.0, generator)
    plain = statistics_of_rows(rows)
    alike = replace(plain, gradient_gram=size * plain.tokens * torch.eye(shape[0], dtype=torch.float64))
    one, two = truncate("whitened", weight, 9, plain), truncate("two_sided", weight, 9, alike)
    assert torch.allclose(one.dense(), two.dense(), atol=1e-10)
    assert two.error == pytest.approx(one.error * (size * (1 + RIDGE)) ** 0.5, rel=1e-10)


@pytest.mark.parametrize("method", ["fwsvd", "two_sided"])
def test_without_any_gradient_only_the_other_side_counts(shape, method, generator) -> None:
    weight, rows = problem(shape, 30.0, generator)
    plain, out = statistics_of_rows(rows), shape[0]
    none = replace(plain, gradient_gram=torch.zeros(out, out).double(), row_fisher=torch.zeros(out).double())
    expected = truncate({"fwsvd": "svd", "two_sided": "whitened"}[method], weight, 5, plain)
    assert torch.allclose(truncate(method, weight, 5, none).dense(), expected.dense(), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1e3, 1e8])
@pytest.mark.parametrize("method", METHODS)
def test_scales_of_activations_and_of_gradients_do_not_matter(shape, method, scale, generator) -> None:
    weight, rows = problem(shape, 100.0, generator)
    before = statistics_with_gradients(rows, shape[0], generator)
    activations = replace(before, gram=before.gram * scale**2, abs_mean=before.abs_mean * scale)
    losses = replace(
        before, gradient_gram=before.gradient_gram * scale**2, row_fisher=before.row_fisher * scale**2
    )  # a loss times `scale`
    expected = truncate(method, weight, 8, before).dense()
    for after in (activations, losses):
        assert torch.allclose(truncate(method, weight, 8, after).dense(), expected, rtol=0, atol=1e-9 * weight.norm())


@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_the_weight_scales_the_factors(shape, method, generator) -> None:
    weight, rows = problem(shape, 100.0, generator)
    statistics = statistics_with_gradients(rows, shape[0], generator)
    one, two = (truncate(method, weight * scale, 8, statistics) for scale in (1.0, -3e3))
    assert torch.allclose(two.dense(), -3e3 * one.dense(), rtol=1e-9, atol=1e-7)
    assert two.error == pytest.approx(3e3 * one.error)


def dead_outputs(moment: Tensor) -> Tensor:
    """Every third output gets no gradient."""
    alive = (torch.arange(len(moment)) % 3 > 0).to(moment)
    return moment * alive * alive[:, None] if moment.dim() == 2 else moment * alive


DEFECTS: dict[str, Callable[[LayerStatistics], LayerStatistics]] = {
    "no gradient": lambda s: replace(s, gradient_gram=s.gradient_gram * 0, row_fisher=s.row_fisher * 0),
    "dead outputs": lambda s: replace(
        s, gradient_gram=dead_outputs(s.gradient_gram), row_fisher=dead_outputs(s.row_fisher)
    ),
    "one output": lambda s: replace(
        s,
        gradient_gram=torch.diag(torch.eye(len(s.row_fisher)).double()[0]),
        row_fisher=torch.eye(len(s.row_fisher)).double()[0],
    ),
    "dead channels": lambda s: replace(s, gram=dead_outputs(s.gram), abs_mean=dead_outputs(s.abs_mean)),
    "no activation": lambda s: replace(s, gram=s.gram * 0, abs_mean=s.abs_mean * 0),
    "tiny gradients": lambda s: replace(s, gradient_gram=s.gradient_gram * 1e-40, row_fisher=s.row_fisher * 1e-40),
}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("method", METHODS)
def test_dead_inputs_and_outputs_stay_finite_and_full_rank_returns_the_weight(shape, method, defect, generator) -> None:
    weight, rows = problem(shape, 10.0, generator)
    statistics = DEFECTS[defect](statistics_with_gradients(rows, shape[0], generator))
    for rank in (1, 8, min(shape)):
        factors = truncate(method, weight, rank, statistics)
        assert bool(torch.isfinite(factors.left).all() & torch.isfinite(factors.right).all())
        assert bool(torch.isfinite(factors.spectrum).all() & (factors.spectrum >= 0).all())
        measured_error = weighted_norm(weight - factors.dense(), METHODS[method](statistics, weight))
        whole = weighted_norm(weight, METHODS[method](statistics, weight))
        assert measured_error == pytest.approx(factors.error, rel=1e-7, abs=1e-7 * whole)
    assert torch.allclose(factors.dense(), weight, atol=1e-11)
    assert factors.error == 0


# Weightings that no method uses, by (outputs, inputs): the number of dimensions of each side, 0 for None.
OTHER_SIDES = [(1, 1), (1, 2), (2, 0), (2, 1)]


def side(size: int, dimensions: int, generator: torch.Generator) -> Tensor | None:
    if dimensions == 0:
        return None
    if dimensions == 1:
        return torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
    rows = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    return rows.T @ rows


@pytest.mark.parametrize("dimensions", OTHER_SIDES)
def test_every_combination_of_sides_is_the_optimum_of_its_norm(shape, dimensions, generator) -> None:
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    weighting = Weighting(*(side(size, count, generator) for size, count in zip(shape, dimensions, strict=True)))
    outer, inner = (
        torch.eye(size, dtype=torch.float64) if part is None else root(torch.diag(part) if part.dim() == 1 else part)
        for size, part in zip(shape, weighting[:2], strict=True)
    )
    u, sigma, vt = torch.linalg.svd(outer @ weight @ inner, full_matrices=False)
    for rank in (1, 6, min(shape)):
        factors = factorize(weight, rank, weighting)
        best = torch.linalg.inv(outer) @ (u[:, :rank] * sigma[:rank]) @ vt[:rank] @ torch.linalg.inv(inner)
        assert torch.allclose(factors.dense(), best, atol=1e-8)
        assert torch.allclose(factors.spectrum, sigma, rtol=1e-8, atol=1e-10)
        error = (outer @ (weight - factors.dense()) @ inner).norm().item()
        measured_error = weighted_norm(weight - factors.dense(), weighting)
        assert measured_error == pytest.approx(error, rel=1e-8, abs=1e-6 * sigma.norm().item())
        assert factors.error == pytest.approx(error, rel=1e-7, abs=1e-6 * sigma.norm().item())


def test_inputs_that_do_not_count_need_no_care_and_outputs_that_do_not_count_are_refused(generator) -> None:
    weight, zeros = torch.randn(6, 9, generator=generator, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    zeros[::2] = 0
    one = Weighting(torch.ones(6, dtype=torch.float64), zeros)
    assert torch.allclose(factorize(weight, 6, one).dense(), weight)
    with pytest.raises(ValueError, match=r"`weighting.outputs` must be > 0 if inputs are weighted too"):
        factorize(weight, 2, Weighting(zeros[:6], zeros))
    with pytest.raises(ValueError, match=r"`weighting.outputs` must be positive definite"):
        factorize(weight, 2, Weighting(torch.diag(zeros[:6]), None))
    for wrong in (Weighting(inputs=torch.ones(6)), Weighting(torch.ones(9, 9))):
        with pytest.raises(ValueError, match=r"`weighting.(inputs|outputs)` must be of size"):
            factorize(weight, 2, wrong)
        with pytest.raises(ValueError, match=r"`weighting.(inputs|outputs)` must be of size"):
            weighted_norm(weight, wrong)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_what_it_needs(method, generator) -> None:
    weight, rows = problem((6, 4), 10.0, generator)
    plain = statistics_of_rows(rows)
    if method == "svd":
        assert METHODS[method](None, weight) == Weighting()
    else:
        with pytest.raises(ValueError, match="`statistics` must hold .*, got None: see collect_statistics"):
            METHODS[method](None, weight)
    if needs_gradients(method):
        with pytest.raises(ValueError, match="pass `loss` to collect_statistics"):
            METHODS[method](plain, weight)
    else:
        METHODS[method](plain, weight)
    METHODS[method](statistics_with_gradients(rows, 6, generator), weight)


def test_rows_with_gradient_come_first_and_the_others_are_filled_by_plain_svd(generator) -> None:
    shape, live = (20, 30), 6
    weight, rows = problem(shape, 10.0, generator)
    fisher = torch.zeros(shape[0], dtype=torch.float64)
    fisher[:live] = torch.rand(live, generator=generator, dtype=torch.float64) + 0.1
    statistics = replace(statistics_of_rows(rows), row_fisher=fisher)
    kept = truncate("fwsvd", weight, live + 5, statistics)
    assert kept.error == 0
    assert torch.allclose(kept.dense()[:live], weight[:live], atol=1e-12)
    rows_left = torch.linalg.qr(weight[:live].T).Q
    rest = weight - weight @ rows_left @ rows_left.T
    residual = (weight - kept.dense()).norm().item()
    assert residual == pytest.approx(torch.linalg.svdvals(rest)[5:].norm().item(), rel=1e-9)


def test_channels_without_magnitude_do_not_enter_asvd(shape, generator) -> None:
    weight, rows = problem(shape, 10.0, generator)
    rows[:, ::2] = 0
    live = truncate("asvd", weight[:, 1::2].contiguous(), 5, statistics_of_rows(rows[:, 1::2]))
    factors = truncate("asvd", weight, 5, statistics_of_rows(rows))
    assert factors.error == pytest.approx(live.error, rel=1e-12)
    assert torch.allclose(factors.dense()[:, 1::2], live.dense(), atol=1e-10)


# --- centred moments --------------------------------------------------------------------------------------------------


def off_centre(shape: tuple[int, int], offset: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    weight, rows = problem(shape, 30.0, generator)
    return weight, rows + offset * torch.randn(shape[1], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0])
def test_centred_statistics_are_those_of_centred_rows(shape, offset, generator) -> None:
    weight, rows = off_centre(shape, offset, generator)
    statistics = statistics_of_rows(rows)
    explicit = statistics_of_rows(rows - rows.mean(0))
    scale = statistics.gram.norm().item()
    assert torch.allclose(centre_moments(statistics).gram, explicit.gram, rtol=0, atol=1e-13 * scale)
    one, two = truncate("whitened", weight, 7, centre_moments(statistics)), truncate("whitened", weight, 7, explicit)
    assert torch.allclose(one.dense(), two.dense(), atol=1e-8)
    assert one.error == pytest.approx(two.error, rel=1e-8)


@pytest.mark.parametrize("offset", [0.0, 0.3, 3.0, 30.0])
def test_centring_with_the_bias_restored_is_never_worse_and_keeps_the_mean_output(shape, offset, generator) -> None:
    weight, rows = off_centre(shape, offset, generator)
    bias = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    statistics = statistics_of_rows(rows)
    wanted = rows @ weight.T + bias
    for rank in (1, 5, min(shape) // 2):
        plain, factors = (
            truncate("whitened", weight, rank, statistics),
            truncate("whitened", weight, rank, centre_moments(statistics)),
        )
        replaced = factors.dense()
        outputs = rows @ replaced.T + bias + (weight - replaced) @ statistics.mean
        assert (outputs.mean(0) - wanted.mean(0)).abs().max() <= 1e-10 * max(1.0, wanted.abs().max().item())
        error = (outputs - wanted).norm().item()
        assert error == pytest.approx(factors.error, rel=1e-8)
        assert error <= measured(weight, plain.dense(), rows) * (1 + 1e-12)
        shifted = (weight - plain.dense()) @ (rows - rows.mean(0)).T  # the other factors, with their bias restored too
        assert error <= shifted.norm().item() * (1 + 1e-12)


def test_centring_changes_nothing_but_the_second_moment(generator) -> None:
    _, rows = off_centre((6, 4), 2.0, generator)
    statistics = statistics_with_gradients(rows, 6, generator)
    after = centre_moments(statistics)
    assert (after.tokens, after.mean, after.abs_mean) == (statistics.tokens, statistics.mean, statistics.abs_mean)
    assert (after.gradient_gram, after.row_fisher) == (statistics.gradient_gram, statistics.row_fisher)


# --- bad input --------------------------------------------------------------------------------------------------------


def empty(inputs: int) -> LayerStatistics:
    zero = torch.zeros(inputs, dtype=torch.float64)
    return LayerStatistics(torch.zeros(inputs, inputs, dtype=torch.float64), 0, zero, zero)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda w, s: truncate("whitened", w, 9, s),
            r"`rank` must be in \[1, 4\] for a weight of shape \(6, 4\), got 9",
        ),
        (lambda w, s: truncate("whitened", w, 0, s), r"got 0"),
        (lambda w, s: truncate("whitened", w * float("nan"), 1, s), "`weight` must be finite"),
        (
            lambda w, s: truncate("whitened", w, 1, statistics_of_rows(torch.ones(3, 5))),
            r"`statistics` must have second moments of the inputs of size 4 for a weight of shape \(6, 4\), got 5\.",
        ),
        (lambda w, s: truncate("asvd", w, 1, statistics_of_rows(torch.ones(3, 5))), r"mean \|x\| of size 4 .* got 5"),
        (
            lambda w, s: truncate("asvd", w, 1, statistics_of_rows(torch.ones(3, 4) * float("nan"))),
            r"NaN or infinity in the mean",
        ),
        (
            lambda w, s: truncate("fwsvd", w, 1, s),
            r"must hold row Fisher information: pass `loss` to collect_statistics",
        ),
        (lambda w, s: truncate("two_sided", w, 1, s), r"must hold second moments of the output gradients: pass `loss`"),
        (
            lambda w, s: truncate("fwsvd", w, 1, replace(s, row_fisher=torch.ones(5))),
            r"row Fisher information of size 6 .* got 5",
        ),
        (
            lambda w, s: truncate("two_sided", w, 1, replace(s, gradient_gram=torch.eye(4))),
            r"second moments of the output gradients of size 6 for a weight of shape \(6, 4\), got 4\.",
        ),
        (
            lambda w, s: truncate("fwsvd", w, 1, replace(s, row_fisher=torch.full((6,), float("inf")))),
            "must be finite, got NaN or infinity in the row Fisher information",
        ),
        (
            lambda w, s: truncate("two_sided", w, 1, replace(s, gradient_gram=torch.full((6, 6), float("nan")))),
            "must be finite, got NaN or infinity in the second moments of the output gradients",
        ),
        (
            lambda w, s: truncate("two_sided", w, 1, replace(empty(4), gradient_gram=torch.eye(6))),
            "at least one token, got 0",
        ),
        (lambda w, s: truncate("whitened", w, 1, empty(4)), "at least one token, got 0"),
        (
            lambda w, s: truncate("whitened", w, 1, statistics_of_rows(torch.ones(3, 4) * float("nan"))),
            "NaN or infinity in the second moments of the inputs",
        ),
        (lambda w, s: whitening_factor(s, -0.1), "`shrinkage` must be >= 0, got -0.1"),
        (lambda w, s: truncate("whitened", w, 2, s).truncate(3), r"in \[1, 2\], got 3"),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(torch.ones(6, 4), statistics_of_rows(torch.eye(4)))
