"""Pruning ratios against their definition, and what must not change them."""

import math

import numpy as np
import pytest

from lowrank.selection.pruning_ratios import pruning_ratios


def random_case(seed: int) -> tuple[dict[str, float], dict[str, int], dict[str, int]]:
    """Return the metric, the parameters and the block of 28 layers in four blocks."""
    generator = np.random.default_rng(seed)
    names = [f"layer {i}" for i in range(28)]
    metric = dict(zip(names, generator.uniform(1.3, 7.2, 28).tolist(), strict=True))
    parameters = dict(zip(names, generator.integers(10, 200, 28).tolist(), strict=True))
    return metric, parameters, {name: i // 7 for i, name in enumerate(names)}


def pruned(ratios: dict[str, float], parameters: dict[str, int]) -> float:
    return sum(ratio * parameters[name] for name, ratio in ratios.items())


@pytest.mark.parametrize(("sparsity", "epsilon"), [(0.0, 0.3), (0.3, 0.0), (0.7, 0.3), (0.85, 0.9), (0.99, 0.99)])
@pytest.mark.parametrize("block_wise", [False, True])
def test_the_total_is_the_sparsity(sparsity: float, epsilon: float, block_wise: bool) -> None:
    for seed in range(20):
        metric, parameters, blocks = random_case(seed)
        ratios = pruning_ratios(metric, parameters, sparsity, epsilon, blocks if block_wise else None)
        assert list(ratios) == list(metric)
        assert all(0 <= ratio <= 1 for ratio in ratios.values())
        assert pruned(ratios, parameters) == pytest.approx(sparsity * sum(parameters.values()), rel=1e-9)
        if block_wise:
            assert len({(blocks[name], ratio) for name, ratio in ratios.items()}) == 4
        else:
            rising = [ratios[name] for name in sorted(metric, key=metric.__getitem__)]
            assert (np.diff(rising) >= -1e-12).all()


def test_unclamped_ratios_are_the_formula() -> None:
    metric, parameters, _ = random_case(0)
    m, count = np.array(list(metric.values())), np.array(list(parameters.values()))
    t = (m - m.min()) / (m.max() - m.min()) * 0.6 + 0.7
    expected = t * 0.5 * count.sum() / (count * t).sum()
    for exact in (True, False):
        ratios = pruning_ratios(metric, parameters, 0.5, 0.3, exact=exact)
        np.testing.assert_allclose(list(ratios.values()), expected, rtol=1e-12)


def test_the_published_cut_misses_the_sparsity() -> None:
    metric, parameters, _ = random_case(0)
    published = pruning_ratios(metric, parameters, 0.85, 0.9, exact=False)
    assert max(published.values()) == 1.0
    assert pruned(published, parameters) / sum(parameters.values()) < 0.83


def test_equal_metrics_and_missing_ones() -> None:
    equal = pruning_ratios(dict.fromkeys("abc", 2.0), {"a": 1, "b": 5, "c": 9}, 0.4, 0.3)
    assert equal == pytest.approx(dict.fromkeys("abc", 0.4))
    filled = pruning_ratios({"a": 1.0, "b": math.nan, "c": 3.0}, dict.fromkeys("abc", 4), 0.5, 0.3, missing="median")
    assert filled == pytest.approx({"a": 0.35, "b": 0.5, "c": 0.65})
    with pytest.raises(ValueError, match="must be finite"):
        pruning_ratios(dict.fromkeys("ab", math.nan), dict.fromkeys("ab", 1), 0.5, 0.3, missing="median")


def test_order_of_names_does_not_matter() -> None:
    metric = {"a": 1.0, "b": 2.0, "c": 4.0}
    parameters = {"c": 3, "a": 1, "b": 2}
    ratios = pruning_ratios(metric, parameters, 0.5, 0.3)
    assert ratios == pytest.approx(pruning_ratios(dict(reversed(metric.items())), parameters, 0.5, 0.3))
    assert list(ratios) == ["a", "b", "c"]


def test_refusals() -> None:
    two, ones = {"a": 1.0, "b": 2.0}, {"a": 1, "b": 1}
    for message, arguments in [
        (r"`sparsity` must be in \[0, 1\), got 1.0", (two, ones, 1.0, 0.3)),
        (r"`sparsity` must be in \[0, 1\), got -0.1", (two, ones, -0.1, 0.3)),
        (r"`epsilon` must be in \[0, 1\), got 1.5", (two, ones, 0.5, 1.5)),
        ("`metric` must be finite, got nan for 'b'", ({"a": 1.0, "b": math.nan}, ones, 0.5, 0.3)),
        ("`metric` must have at least one layer, got none", ({}, {}, 0.5, 0.3)),
        ("`parameters` must have the layers of `metric`, got 'a' in one", ({"a": 1.0}, {"c": 1}, 0.5, 0.3)),
        ("`blocks` must have the layers of `metric`, got 'b' in one", (two, ones, 0.5, 0.3, {"a": 0})),
        ("`parameters` must be >= 1 for 'b', got 0", (two, {"a": 1, "b": 0}, 0.5, 0.3)),
    ]:
        with pytest.raises(ValueError, match=message):
            pruning_ratios(*arguments)
    with pytest.raises(ValueError, match="`missing` must be 'error' or 'median', got 'zero'"):
        pruning_ratios(two, ones, 0.5, 0.3, missing="zero")
