"""Gram matrices and their eigenvalues against float64 products and an SVD."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank.factorization.gram import LARGE, SLAB, eigh, gram_triangle, slabs, squared_singular_values, wide_product

MANY = 2 * SLAB + 5  # rows of three slabs, the last one short


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(MANY, 6), (6, MANY), (SLAB, 6), (24, 24), (1, 5), (5, 1), (1, 1)], ids=str)
def test_the_triangle_and_its_eigenvalues_are_those_of_the_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = draw(*shape).to(dtype)
    before, exact = matrix.clone(), matrix.double()
    product = exact.T @ exact if shape[0] >= shape[1] else exact @ exact.T
    gram = gram_triangle(slabs(matrix))
    torch.testing.assert_close(gram.tril(), product.tril(), rtol=1e-13, atol=1e-12)
    values = squared_singular_values(gram)
    squares = torch.linalg.svdvals(exact).square().flip(0)
    torch.testing.assert_close(values, squares, rtol=0, atol=1e-14 * float(squares[-1]) * len(squares))
    assert torch.equal(matrix, before)


def test_every_layout_gives_the_same() -> None:
    wide = draw(12, MANY).double()
    large = torch.zeros(24, 2 * MANY, dtype=torch.float64)
    large[::2, ::2] = wide
    kernel = torch.stack([wide, wide + 1], dim=-1)
    expected = gram_triangle(slabs(wide)).tril()
    for same in (wide.T, wide.T.contiguous(), large[::2, ::2], large.T[::2, ::2], kernel.unbind(-1)[0]):
        torch.testing.assert_close(gram_triangle(slabs(same)).tril(), expected, rtol=1e-13, atol=1e-12)


def test_only_lower_triangles_are_read_and_batches_are_each_alone() -> None:
    grams = [gram_triangle(slabs(draw(rows, 9))) for rows in (9, 40, MANY)]
    batch = squared_singular_values(torch.stack(grams))
    for gram, values in zip(grams, batch, strict=True):
        torch.testing.assert_close(squared_singular_values(gram), values, rtol=1e-13, atol=1e-13 * float(values[-1]))
        above = torch.full((9, 9), math.nan, dtype=torch.float64).triu(1)
        assert torch.equal(squared_singular_values(gram.tril() + above), squared_singular_values(gram.tril()))


def test_no_eigenvalue_is_negative() -> None:
    narrow = draw(40, 3) @ draw(3, 20)
    values = squared_singular_values(gram_triangle(slabs(narrow))).numpy()
    assert np.all(values >= 0)
    assert np.sum(values > 1e-10 * values[-1]) == 3


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`pieces` must hold at least one slab, got none"):
        gram_triangle([])


@pytest.mark.parametrize("size", [20, LARGE + 8])
@pytest.mark.parametrize("rank", [6, 10_000])
@pytest.mark.parametrize("leading", [None, 0, 5, 400])
def test_eigenpairs_of_small_and_large_deficient_and_clustered_matrices(size, rank, leading) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(min(rank, 2 * size), size, generator=generator, dtype=torch.float64)
    matrix = rows.T @ rows + (torch.eye(size, dtype=torch.float64) if rank > size else 0)
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    values, vectors = eigh(matrix.clone(), leading)
    count = size if leading in (None, 0) else min(leading, size)
    assert len(values) >= count
    assert vectors.shape == (size, 0 if leading == 0 else count)
    scale = expected[0].item()
    assert torch.allclose(values, expected[: len(values)].clamp_min(0), atol=1e-12 * scale)
    assert torch.allclose(matrix @ vectors, vectors * values[: vectors.shape[1]], atol=1e-11 * scale)
    again = eigh(matrix.clone(), leading, overwrite=True)
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], vectors)
    assert torch.allclose(vectors.T @ vectors, torch.eye(vectors.shape[1], dtype=torch.float64), atol=1e-11)


@pytest.mark.parametrize("size", [1, SLAB, 2 * SLAB + 5])
def test_a_matrix_counts_as_its_mean_with_its_transpose(size: int) -> None:
    square = draw(size, size).double()
    matrix = square @ square.T + 1e-3 * draw(size, size)
    mean = (matrix + matrix.T) / 2
    before = matrix.clone()
    assert torch.equal(eigh(matrix, 0)[0], eigh(mean, 0)[0])
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(MANY, 6), (6, MANY), (1, 5), (5, 1)], ids=str)
def test_a_product_is_that_of_the_widened_factors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    narrow, right, left = draw(*shape).to(dtype), draw(shape[1], 4).double(), draw(4, shape[0]).double()
    torch.testing.assert_close(wide_product(narrow, right), narrow.double() @ right, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(wide_product(left, narrow), left @ narrow.double(), rtol=1e-13, atol=1e-13)
