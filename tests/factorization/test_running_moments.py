"""Sums of blocks in float32 keep the moments about the mean, however large the mean is."""

import pytest
import torch
from torch import Tensor

from lowrank.factorization.moments import MOMENTS, LayerStatistics, centre_moments
from lowrank.factorization.running_moments import BLOCK_TOKENS, RunningMoments
from lowrank.factorization.transfer import RunningPairs

SIZE = 6
FIELDS = ("gram", "mean", "abs_mean", "input_square", "input_sketch")
MEANS = (0.0, 1.0, 1e3, 1e5)


def draw(mean: float, tokens: int = 900) -> Tensor:
    """Inputs whose first block has another mean than the rest, exact in float32."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(tokens, SIZE, generator=generator) @ torch.randn(SIZE, SIZE, generator=generator)
    mixed[: tokens // 3] -= 3.0
    return (mixed + mean * torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, 1.0])).float()


def collect(*parts: Tensor, products: torch.dtype = torch.float32, fields: tuple[str, ...] = FIELDS) -> LayerStatistics:
    sums = RunningMoments(fields, SIZE, torch.device("cpu"), products)
    for part in parts:
        sums.add(part)
    return LayerStatistics(tokens=sums.tokens, **sums.finish())


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("sizes", [(900,), (300, 600), (1, 0, 899), (1,) * 900])
def test_centred_moments_keep_their_digits_in_any_split(mean: float, sizes: tuple[int, ...]) -> None:
    rows = draw(mean)
    wide = rows.double()
    about = wide - wide.mean(0)
    found = collect(*rows.split(sizes))
    assert relative(found.gram, wide.T @ wide) <= 1e-6
    assert relative(found.mean, wide.mean(0)) <= 1e-7
    assert relative(found.abs_mean, wide.abs().mean(0)) <= 1e-6
    assert relative(found.input_square, wide.square().sum()) <= 1e-6
    centred = centre_moments(found)
    assert relative(centred.gram, about.T @ about) <= 1e-5
    assert relative(centred.input_square, about.square().sum()) <= 1e-5


@pytest.mark.parametrize("mean", MEANS)
def test_parts_that_are_merged_are_the_whole(mean: float) -> None:
    rows = draw(mean)
    whole, merged = collect(rows), collect(rows[:100]) + collect(rows[100:])
    for name in ("gram", "mean", "abs_mean", "input_square"):
        assert relative(getattr(merged, name), getattr(whole, name)) <= 1e-6
    assert relative(centre_moments(merged).gram, centre_moments(whole).gram) <= 1e-5


@pytest.mark.parametrize("mean", MEANS)
def test_a_sketch_of_centred_inputs_is_the_sketch_about_their_mean(mean: float) -> None:
    rows, signs = draw(mean), []
    for products in (torch.float32, torch.float64):
        sums = RunningMoments(("input_sketch", "mean"), SIZE, torch.device("cpu"), products)
        sums.add(rows)
        finished = sums.finish()
        sketch = finished["input_sketch"]
        signs.append((sketch[:, :-1] - sketch[:, -1:] * finished["mean"], sketch[:, -1]))
    assert torch.equal(signs[0][1], signs[1][1])
    assert relative(signs[0][0], signs[1][0]) <= 1e-5


@pytest.mark.parametrize("mean", MEANS)
def test_products_of_two_inputs_keep_their_digits_too(mean: float) -> None:
    x, y = draw(mean, 600), draw(-mean, 600).flip(0)
    pairs = RunningPairs(SIZE, SIZE, x.device)
    for part in zip(x.split((150, 0, 450)), y.split((150, 0, 450)), strict=True):
        pairs.add(*part)
    found = pairs.finish().centred()
    about_x, about_y = (part.double() - part.double().mean(0) for part in (x, y))
    assert relative(found.mean, x.double().mean(0)) <= 1e-7
    scale = about_x.norm() * about_y.norm()
    assert (found.cross - about_x.T @ about_y).norm() <= 1e-5 * scale


@pytest.mark.parametrize("products", [torch.float32, torch.float64])
def test_no_field_depends_on_tokens_that_are_not_there(products: torch.dtype) -> None:
    fields = tuple(name for name, about in MOMENTS.items() if about["over_tokens"] and about["of"] == "input")
    rows = draw(1.0, BLOCK_TOKENS + 5)
    some, empty = collect(rows, products=products, fields=fields), rows[:0]
    padded = collect(empty, rows, empty, products=products, fields=fields)
    assert padded.tokens == some.tokens
    assert all(torch.equal(value, some.moments()[name]) for name, value in padded.moments().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_shows(bad: float) -> None:
    rows = draw(1.0, 50)
    rows[20, 3] = bad
    sums = RunningMoments(FIELDS, SIZE, torch.device("cpu"), torch.float32)
    sums.add(rows)
    assert not sums.all_finite()


def test_inputs_that_do_not_vary_have_no_spread() -> None:
    rows = torch.full((500, SIZE), 1e4 / 3)
    found = centre_moments(collect(rows))
    assert found.gram is not None
    assert found.gram.abs().max() <= 1e-12 * 500 * 1e8
