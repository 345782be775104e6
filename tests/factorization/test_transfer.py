"""The best weight for changed inputs: against least squares on the inputs themselves, in float64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from lowrank.factorization.factorize import factorize
from lowrank.factorization.running_moments import statistics_of_rows
from lowrank.factorization.transfer import (
    PairedMoments,
    RunningPairs,
    choose_transfer,
    extend_weight,
    retargeted_statistics,
    solve_transfer,
)
from lowrank.factorization.weighting import Weighting

SHAPES = {"tall": (9, 5), "square": (6, 6), "wide": (4, 7)}


def draw(shape: tuple[int, int], tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and inputs with means, before and after a change that is in part linear and in part noise."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, x = rand(*shape), rand(tokens, shape[1]) + 2.0
    return weight, x, x @ (torch.eye(shape[1]) + 0.3 * rand(shape[1], shape[1])) + 0.2 * rand(tokens, shape[1]) - 0.5


def paired(x: Tensor, changed: Tensor) -> PairedMoments:
    running = RunningPairs(changed.shape[1], x.shape[1], x.device)
    for part in zip(x.split(70), changed.split(70), strict=True):
        running.add(*part)
    return running.finish()


def error(weight: Tensor, x: Tensor, other: Tensor, changed: Tensor) -> float:
    return (x @ weight.T - changed @ other.T).square().sum().item()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ridge", [1e-9, 1e-3, 0.5])
def test_it_is_least_squares_with_a_ridge_towards_the_weight(shape: tuple[int, int], ridge: float) -> None:
    weight, x, changed = draw(shape)
    found = weight @ solve_transfer(paired(x, changed), ridge).matrix
    level = (ridge * changed.square().sum(0).mean()).sqrt() * torch.eye(shape[1], dtype=torch.float64)
    rows, wanted = torch.cat([changed, level]), torch.cat([x @ weight.T, level @ weight.T])
    assert torch.allclose(found, torch.linalg.lstsq(rows, wanted).solution.T, atol=1e-10)
    if ridge < 1e-6:
        free = torch.linalg.lstsq(changed, x @ weight.T).solution.T
        assert torch.allclose(found, free, atol=1e-6)
        assert error(weight, x, found, changed) < 0.5 * error(weight, x, weight, changed)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_truncating_it_on_the_changed_inputs_is_the_optimum_of_its_rank(shape: tuple[int, int]) -> None:
    """The error is that of full rank and the discarded energy; no other weight of the rank does better."""
    weight, x, changed = draw(shape)
    pairs = paired(x, changed)
    target = weight @ solve_transfer(pairs, 1e-12).matrix
    factors = factorize(target, 2, Weighting(inputs=pairs.moments.gram))
    best = error(weight, x, factors.dense(), changed)
    assert best == pytest.approx(error(weight, x, target, changed) + factors.error**2, rel=1e-9)
    plain = factorize(weight, 2, Weighting(inputs=x.T @ x)).dense()
    assert best < error(weight, x, plain, changed)
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-1, 1e-3):
        left, right = (
            part + scale * torch.randn(part.shape, generator=generator) for part in (factors.left, factors.right)
        )
        assert error(weight, x, left @ right, changed) > best


def test_centred_moments_leave_the_means_to_the_bias() -> None:
    weight, x, changed = draw((4, 7))
    pairs = paired(x, changed).centred()
    target = weight @ solve_transfer(pairs, 1e-12).matrix
    offset = weight @ pairs.mean - target @ pairs.moments.mean
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    free = torch.linalg.lstsq(torch.cat([changed, ones], 1), x @ weight.T).solution.T
    assert torch.allclose(target, free[:, :-1], atol=1e-8)
    assert torch.allclose(offset, free[:, -1], atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("centre", [False, True])
def test_a_repair_is_wanted_beside_the_output(shape: tuple[int, int], centre: bool) -> None:
    weight, x, changed = draw(shape)
    generator = torch.Generator().manual_seed(4)
    missing = changed @ torch.randn(shape[1], shape[0], generator=generator, dtype=torch.float64) + 1.0
    missing = missing + torch.randn(missing.shape, generator=generator, dtype=torch.float64)
    pairs = paired(torch.cat([x, missing], 1), changed)
    assert pairs.cross.shape == (sum(shape), shape[1])
    v = extend_weight(weight, pairs)
    used = pairs.centred() if centre else pairs
    target = v @ solve_transfer(used, 1e-12).matrix
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    rows = torch.cat([changed, ones], 1) if centre else changed
    free = torch.linalg.lstsq(rows, x @ weight.T + missing).solution.T
    assert torch.allclose(target, free[:, : shape[1]], atol=1e-8)
    if centre:
        assert torch.allclose(v @ pairs.mean - target @ pairs.moments.mean, free[:, -1], atol=1e-8)
    assert torch.equal(v @ solve_transfer(used, 1e-3, 0.0).matrix, weight)  # neither the change nor the repair
    halves = (slice(None, 100), slice(100, None))
    fit, held_out = (paired(torch.cat([x, missing], 1)[part], changed[part]) for part in halves)
    errors = {
        (ridge, blend): (
            (x @ weight.T + missing)[100:] - changed[100:] @ (v @ solve_transfer(fit, ridge, blend).matrix).T
        )
        .square()
        .sum()
        .item()
        for ridge in (1e-4, 1e-2, 1.0)
        for blend in (0.0, 0.5, 1.0)
    }
    found = choose_transfer(fit, held_out, v, (1e-4, 1e-2, 1.0), (0.0, 0.5, 1.0))
    assert found == min(errors, key=lambda choice: errors[choice])


def test_where_the_inputs_say_nothing_the_weight_stays() -> None:
    weight, x, changed = draw((4, 7))
    x, changed = x.clone(), changed.clone()
    changed[:, 3:] = x[:, 3:] = 0.0
    found = weight @ solve_transfer(paired(x, changed), 1e-3).matrix
    assert torch.allclose(found[:, 3:], weight[:, 3:], atol=1e-12)
    nothing = solve_transfer(paired(0 * x, 0 * changed), 1e-3)
    assert torch.equal(nothing.matrix, torch.eye(7, dtype=torch.float64))


def test_inputs_that_have_not_changed_give_the_identity_and_a_blend_lies_between() -> None:
    _, x, changed = draw((4, 7))
    eye = torch.eye(7, dtype=torch.float64)
    assert torch.allclose(solve_transfer(paired(x, x), 1e-4).matrix, eye, atol=1e-12)
    pairs = paired(x, changed)
    whole, half = (solve_transfer(pairs, 1e-3, blend).matrix for blend in (1.0, 0.5))
    assert torch.allclose(half, (whole + eye) / 2, atol=1e-14)
    assert torch.equal(solve_transfer(pairs, 1e-3, 0.0).matrix, eye)


def test_a_ridge_below_the_rounding_of_the_moments_is_raised() -> None:
    _, x, changed = draw((4, 7))
    pairs = paired(x, changed)
    indefinite = pairs.moments.gram - 2 * torch.linalg.eigvalsh(pairs.moments.gram)[0] * torch.eye(7)
    pairs = dataclasses.replace(pairs, moments=dataclasses.replace(pairs.moments, gram=indefinite))
    found = solve_transfer(pairs, 1e-6)
    assert found.ridge > 1e-6
    assert torch.isfinite(found.matrix).all()


@pytest.mark.parametrize("tokens", [9, 30, 3000])
def test_ridge_and_blend_are_the_best_on_held_out_tokens(tokens: int) -> None:
    weight, x, changed = draw((5, 7), 2 * tokens, seed=tokens)
    changed = changed + torch.randn(changed.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fit, held_out = paired(x[:tokens], changed[:tokens]), paired(x[tokens:], changed[tokens:])
    ridges, blends = (1e-4, 1e-2, 1.0), (0.0, 0.5, 1.0)
    found = choose_transfer(fit, held_out, weight, ridges, blends)
    errors = {
        (ridge, blend): error(weight, x[tokens:], weight @ solve_transfer(fit, ridge, blend).matrix, changed[tokens:])
        for ridge in ridges
        for blend in blends
    }
    assert found == min(errors, key=lambda choice: errors[choice])


def test_parts_of_the_data_add_up_and_outputs_keep_their_gradients() -> None:
    _, x, changed = draw((4, 7))
    whole, parts = paired(x, changed), paired(x[:50], changed[:50]) + paired(x[50:], changed[50:])
    assert torch.allclose(whole.cross, x.T @ changed, rtol=1e-12)
    assert torch.allclose(parts.cross, whole.cross, rtol=1e-12)
    assert torch.allclose(parts.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(parts.moments.gram, changed.T @ changed, rtol=1e-12)
    gradients = torch.eye(4, dtype=torch.float64)
    dense = dataclasses.replace(statistics_of_rows(x), gradient_gram=gradients)
    transfer = solve_transfer(whole, 1e-3)
    found = retargeted_statistics(dense, whole, transfer)
    assert found.gradient_gram is gradients
    for name in ("gram", "mean", "abs_mean", "tokens"):
        assert getattr(found, name) is getattr(whole.moments, name)
    assert retargeted_statistics(None, whole, transfer) is whole.moments


def test_float32_inputs_add_up_in_float64() -> None:
    _, x, changed = draw((4, 7))
    pairs = paired(x.float(), changed.float())
    assert pairs.cross.dtype == pairs.mean.dtype == torch.float64
    assert torch.allclose(pairs.cross, x.T @ changed, rtol=1e-5)
