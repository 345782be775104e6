"""Spectral metrics against reference values, a naive fit, and what must not change them; ratios against their definition."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowrank.selection.esd import METRICS, PLAIN, eigenvalues, esd_metrics, esd_metrics_together
from lowrank.selection.pruning_ratios import pruning_ratios

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "layer_selection"
SAME = {  # ours -> theirs
    "alpha": "alpha", "alpha_distance": "alpha_D", "alpha_xmin": "alpha_xmin",
    "alpha_peak": "alpha_peak", "alpha_mid": "alpha_mid",
    "hill": "hill_k_half", "hill_tenth": "hill_k_tenth", "alpha_weighted": "alpha_weighted", "log_alpha_norm": "log_alpha_norm",
    "norm": "norm", "spectral_norm": "spectral_norm", "log_norm": "log_norm", "log_spectral_norm": "log_spectral_norm",
    "stable_rank": "stable_rank", "entropy": "entropy", "matrix_rank": "rank",
}  # fmt: skip


def test_reference_metrics() -> None:
    tensors = load_file(GOLDEN / "matrices.safetensors")
    for name, about in json.loads((GOLDEN / "esd_matrices.json").read_text())["layers"].items():
        weight = tensors[f"matrices.{name}"]
        for smallest, key in ((0.0, "float64"), (1e-5, "float64_filter1e-5")):
            found, corrected = (esd_metrics(weight, window, smallest) for window in ("published", "corrected"))
            for ours, theirs in SAME.items():
                assert found[ours] == pytest.approx(about[key][theirs], rel=1e-9), (name, key, ours)
            assert corrected["alpha_peak"] == pytest.approx(about[key]["alpha_peak_linear_window"], rel=1e-9)
            assert found["status"] == "ok"
        single, plain = about["reference_float32"], esd_metrics(weight)
        for ours in ("alpha", "alpha_peak", "alpha_mid", "norm", "spectral_norm"):
            assert plain[ours] == pytest.approx(single[ours], rel=1e-5), (name, ours)
        other = about["weightwatcher"]
        assert esd_metrics(weight, smallest=1e-5)["alpha"] == pytest.approx(other["alpha"], rel=1e-9)


def heavy(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).clamp_min(1e-2).sqrt()


def naive(values: np.ndarray) -> tuple[float, float]:
    """The fit by its definition, one tail after the other."""
    best = (math.inf, math.nan)
    for start in range(len(values) - 1):
        tail = values[start:]
        alpha = 1 + len(tail) / sum(math.log(value / tail[0]) for value in tail)
        distance = max(abs(1 - (value / tail[0]) ** (1 - alpha) - j / len(tail)) for j, value in enumerate(tail))
        best = min(best, (distance, alpha), key=lambda pair: pair[0])
    return best


@pytest.mark.parametrize("shape", [(48, 24), (32, 32), (24, 48)])
def test_the_fit_is_its_definition(shape: tuple[int, int]) -> None:
    weight = heavy(shape)
    values = np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
    np.testing.assert_allclose(eigenvalues(weight).numpy(), values, rtol=1e-9, atol=1e-12)
    found = esd_metrics(weight)
    assert (found["alpha_distance"], found["alpha"]) == pytest.approx(naive(values), rel=1e-9)
    k = 12
    logs = sum(math.log(values[-1 - m] / values[-1 - k]) for m in range(k))
    assert found["hill"] == pytest.approx(1 + k / logs if min(shape) == 24 else found["hill"], rel=1e-9)
    n = len(values) - len(values) // 2
    tail = values[len(values) // 2 :]
    assert found["alpha_mid"] == pytest.approx(1 + n / np.log(tail / tail[0]).sum(), rel=1e-9)


@pytest.mark.parametrize("shape", [(96, 24), (40, 40), (24, 96)])
def test_scale_and_transpose_change_no_exponent(shape: tuple[int, int]) -> None:
    weight = heavy(shape, 1)
    plain, corrected = esd_metrics(weight), esd_metrics(weight, "corrected")
    turned = esd_metrics(weight.T)
    for name in METRICS:
        assert turned[name] == pytest.approx(plain[name], rel=1e-9), name
    for power in (-10, -3, 1, 10):
        scaled, own = esd_metrics(weight * 2.0**power), esd_metrics(weight * 2.0**power, "corrected")
        for name in ("alpha", "alpha_mid", "hill", "hill_tenth", "stable_rank", "entropy", "matrix_rank"):
            assert scaled[name] == pytest.approx(plain[name], rel=1e-6), name
        assert own["alpha_peak"] == pytest.approx(corrected["alpha_peak"], rel=1e-6)
        assert scaled["norm"] == pytest.approx(plain["norm"] * 4.0**power)


def test_a_known_exponent_is_found() -> None:
    quantiles = (np.arange(2000) + 0.5) / 2000
    sigma = torch.from_numpy((1 - quantiles) ** (-1 / (2 * (3.0 - 1))))  # lambda has density ~ lambda^-3
    found = esd_metrics(torch.diag(sigma))
    assert found["alpha"] == pytest.approx(3.0, abs=0.1)
    assert found["hill"] == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize(
    ("weight", "status", "numbers"),
    [
        (torch.zeros(16, 16), "zero", {"norm", "spectral_norm", "matrix_rank"}),
        (torch.eye(16), "constant", set(PLAIN)),
        (torch.full((16, 16), math.nan), "not finite", set()),
        (torch.full((16, 16), math.inf), "not finite", set()),
        (heavy((1, 16)), "few", set(PLAIN)),
        (heavy((5, 64)), "few", set(METRICS) - {"hill_tenth"}),
        (heavy((64, 10)) @ heavy((10, 64), 1), "rank deficient", set(METRICS)),
    ],
    ids=["zero", "identity", "NaN", "infinity", "1xN", "5xN", "rank 10 of 64"],
)  # fmt: skip
def test_every_odd_input_has_a_status_and_no_silent_number(weight: Tensor, status: str, numbers: set[str]) -> None:
    found = esd_metrics(weight)
    assert found["status"] == status
    assert {name for name in METRICS if math.isfinite(found[name])} == numbers
    assert found.keys() == esd_metrics(heavy((16, 16))).keys()
    assert not any(math.isinf(found[name]) for name in METRICS)


def test_zeros_are_no_tail() -> None:
    narrow = heavy((64, 12)) @ torch.linalg.qr(heavy((64, 12), 1)).Q.T
    few = esd_metrics(narrow)
    kept = np.sort(torch.linalg.svdvals(narrow.double()).square().numpy())[-12:]
    assert few["alpha"] == pytest.approx(naive(kept)[1], rel=1e-4)
    assert few["matrix_rank"] == 12


def test_kernels_pool_their_positions() -> None:
    kernel = heavy((20, 16, 3, 3))
    positions = [kernel[:, :, i, j].double() for i in range(3) for j in range(3)]
    pooled = np.sort(np.concatenate([torch.linalg.svdvals(position).square() / 2 for position in positions]))
    np.testing.assert_allclose(eigenvalues(kernel).numpy(), pooled, rtol=1e-8, atol=1e-12)
    assert esd_metrics(kernel)["norm"] == pytest.approx(float(kernel.double().square().sum() / 2))


def test_several_weights_together_are_each_alone() -> None:
    weights = [
        heavy((24, 40)),
        heavy((40, 24), 1),
        torch.full((24, 24), math.nan),
        heavy((16, 12, 3, 3), 2),
        heavy((12, 48), 3),
    ]
    together = esd_metrics_together(weights, smallest=1e-5)
    assert [found["status"] for found in together] == ["ok", "ok", "not finite", "ok", "ok"]
    for weight, found in zip(weights, together, strict=True):
        alone = esd_metrics(weight, smallest=1e-5)
        assert found.pop("status") == alone.pop("status")
        assert found == pytest.approx(alone, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_equal_their_upcast(dtype: torch.dtype) -> None:
    weight = heavy((40, 24)).to(dtype)
    assert esd_metrics(weight) == esd_metrics(weight.float())


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"`window` must be one of \['published', 'corrected'\], got 'linear'"):
        esd_metrics(torch.eye(4), "linear")
    for words, arguments in [
        (r"`sparsity` must be in \[0, 1\), got 1.0", ([1.0, 2.0], [1, 1], 1.0, 0.3)),
        (r"`sparsity` must be in \[0, 1\), got -0.1", ([1.0, 2.0], [1, 1], -0.1, 0.3)),
        (r"`epsilon` must be in \[0, 1\), got 1.5", ([1.0, 2.0], [1, 1], 0.5, 1.5)),
        ("`metric` must be finite, got nan for 1", ([1.0, math.nan], [1, 1], 0.5, 0.3)),
        ("`metric` must be finite, got nan for 'b'", ({"a": 1.0, "b": math.nan}, {"a": 1, "b": 2}, 0.5, 0.3)),
        ("`parameters` must be of the layers of `metric`, got 'a' in one", ({"a": 1.0}, {"c": 1}, 0.5, 0.3)),
        ("`parameters` and `blocks` must be one for each of 2 metrics", ([1.0, 2.0], [1], 0.5, 0.3)),
        ("`parameters` must be >= 1, got 0 for 1", ([1.0, 2.0], [1, 0], 0.5, 0.3)),
        ("`metric` must hold at least one layer, got none", ([], [], 0.5, 0.3)),
    ]:
        with pytest.raises(ValueError, match=words):
            pruning_ratios(*arguments)  # pyright: ignore
    with pytest.raises(ValueError, match="`missing` must be 'error' or 'median', got 'zero'"):
        pruning_ratios([1.0], [1], 0.5, 0.3, missing="zero")


# --- ratios ---


def random_case(seed: int) -> tuple[list[float], list[int], list[int]]:
    generator = np.random.default_rng(seed)
    return (
        generator.uniform(1.3, 7.2, 28).tolist(),
        generator.integers(10, 200, 28).tolist(),
        [i // 7 for i in range(28)],
    )


@pytest.mark.parametrize(("sparsity", "epsilon"), [(0.0, 0.3), (0.3, 0.0), (0.7, 0.3), (0.85, 0.9), (0.99, 0.99)])
@pytest.mark.parametrize("block_wise", [False, True])
def test_the_total_is_the_sparsity(sparsity: float, epsilon: float, block_wise: bool) -> None:
    for seed in range(20):
        metric, parameters, blocks = random_case(seed)
        ratios = pruning_ratios(metric, parameters, sparsity, epsilon, blocks if block_wise else None)
        assert all(0 <= ratio <= 1 for ratio in ratios)
        total = sum(ratio * count for ratio, count in zip(ratios, parameters, strict=True))
        assert total == pytest.approx(sparsity * sum(parameters), rel=1e-9)
        if not block_wise:
            order = np.argsort(metric)
            assert (np.diff(np.array(ratios)[order]) >= -1e-12).all()
        else:
            assert all(ratios[i] == ratios[i - i % 7] for i in range(28))


def test_unclamped_ratios_are_the_formula() -> None:
    metric, parameters, _ = random_case(0)
    m, count = np.array(metric), np.array(parameters)
    t = (m - m.min()) / (m.max() - m.min()) * 0.6 + 0.7
    wanted = t * 0.5 * count.sum() / (count * t).sum()
    for exact in (True, False):
        np.testing.assert_allclose(pruning_ratios(metric, parameters, 0.5, 0.3, exact=exact), wanted, rtol=1e-12)


def test_the_published_cut_misses_the_sparsity() -> None:
    metric, parameters, _ = random_case(0)
    published = pruning_ratios(metric, parameters, 0.85, 0.9, exact=False)
    assert max(published) == 1.0
    share = sum(ratio * count for ratio, count in zip(published, parameters, strict=True)) / sum(parameters)
    assert share < 0.83


def test_equal_metrics_and_missing_ones() -> None:
    assert pruning_ratios([2.0, 2.0, 2.0], [1, 5, 9], 0.4, 0.3) == pytest.approx([0.4] * 3)
    filled = pruning_ratios({"a": 1.0, "b": math.nan, "c": 3.0}, dict.fromkeys("abc", 4), 0.5, 0.3, missing="median")
    assert filled == pytest.approx({"a": 0.35, "b": 0.5, "c": 0.65})
    with pytest.raises(ValueError, match="must be finite"):
        pruning_ratios([math.nan, math.nan], [1, 1], 0.5, 0.3, missing="median")


def test_order_of_names_does_not_matter() -> None:
    metric: dict[str, Any] = {"a": 1.0, "b": 2.0, "c": 4.0}
    parameters = {"c": 3, "a": 1, "b": 2}
    found = pruning_ratios(metric, parameters, 0.5, 0.3)
    turned = pruning_ratios(dict(reversed(metric.items())), parameters, 0.5, 0.3)
    assert found == pytest.approx(turned)
    assert list(found) == ["a", "b", "c"]
