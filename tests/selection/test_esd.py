"""Spectral metrics against reference values, a naive fit, and what must not change them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowrank.selection.esd import SIZE_METRICS, SPECTRAL_METRICS, eigenvalues, esd_metrics, esd_metrics_together

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
    for name, expected in json.loads((GOLDEN / "esd_matrices.json").read_text())["layers"].items():
        weight = tensors[f"matrices.{name}"]
        for smallest, key in ((0.0, "float64"), (1e-5, "float64_filter1e-5")):
            metrics, corrected = (esd_metrics(weight, window, smallest) for window in ("published", "corrected"))
            for ours, theirs in SAME.items():
                assert metrics[ours] == pytest.approx(expected[key][theirs], rel=1e-9), (name, key, ours)
            assert corrected["alpha_peak"] == pytest.approx(expected[key]["alpha_peak_linear_window"], rel=1e-9)
            assert metrics["status"] == "ok"
        single, plain = expected["reference_float32"], esd_metrics(weight)
        for ours in ("alpha", "alpha_peak", "alpha_mid", "norm", "spectral_norm"):
            assert plain[ours] == pytest.approx(single[ours], rel=1e-5), (name, ours)
        other = expected["weightwatcher"]
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
    metrics = esd_metrics(weight)
    assert (metrics["alpha_distance"], metrics["alpha"]) == pytest.approx(naive(values), rel=1e-9)
    for name, k in (("hill", len(values) // 2), ("hill_tenth", len(values) // 10)):
        logs = sum(math.log(values[-1 - m] / values[-1 - k]) for m in range(k))
        assert metrics[name] == pytest.approx(1 + k / logs, rel=1e-9)
    n = len(values) - len(values) // 2
    tail = values[len(values) // 2 :]
    assert metrics["alpha_mid"] == pytest.approx(1 + n / np.log(tail / tail[0]).sum(), rel=1e-9)


@pytest.mark.parametrize("shape", [(96, 24), (40, 40), (24, 96)])
def test_scale_and_transpose_change_no_exponent(shape: tuple[int, int]) -> None:
    weight = heavy(shape, 1)
    plain, corrected = esd_metrics(weight), esd_metrics(weight, "corrected")
    transposed = esd_metrics(weight.T)
    for name in SPECTRAL_METRICS:
        assert transposed[name] == pytest.approx(plain[name], rel=1e-9), name
    for power in (-10, -3, 1, 10):
        scaled = esd_metrics(weight * 2.0**power)
        scaled_corrected = esd_metrics(weight * 2.0**power, "corrected")
        for name in ("alpha", "alpha_mid", "hill", "hill_tenth", "stable_rank", "entropy", "matrix_rank"):
            assert scaled[name] == pytest.approx(plain[name], rel=1e-6), name
        assert scaled_corrected["alpha_peak"] == pytest.approx(corrected["alpha_peak"], rel=1e-6)
        assert scaled["norm"] == pytest.approx(plain["norm"] * 4.0**power)


def test_the_exponent_of_a_power_law_is_recovered() -> None:
    quantiles = (np.arange(2000) + 0.5) / 2000
    sigma = torch.from_numpy((1 - quantiles) ** (-1 / (2 * (3.0 - 1))))  # lambda has density ~ lambda^-3
    metrics = esd_metrics(torch.diag(sigma))
    assert metrics["alpha"] == pytest.approx(3.0, abs=0.1)
    assert metrics["hill"] == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize(
    ("weight", "status", "numbers"),
    [
        (torch.zeros(16, 16), "zero", {"norm", "spectral_norm", "matrix_rank"}),
        (torch.eye(16), "constant", set(SIZE_METRICS)),
        (torch.full((16, 16), math.nan), "not finite", set()),
        (torch.full((16, 16), math.inf), "not finite", set()),
        (heavy((1, 16)), "few", set(SIZE_METRICS)),
        (heavy((5, 64)), "few", set(SPECTRAL_METRICS) - {"hill_tenth"}),
        (heavy((64, 10)) @ heavy((10, 64), 1), "rank deficient", set(SPECTRAL_METRICS)),
    ],
    ids=["zero", "identity", "NaN", "infinity", "1xN", "5xN", "rank 10 of 64"],
)  # fmt: skip
def test_every_odd_input_has_a_status_and_no_silent_number(weight: Tensor, status: str, numbers: set[str]) -> None:
    metrics = esd_metrics(weight)
    assert metrics["status"] == status
    assert {name for name in SPECTRAL_METRICS if math.isfinite(metrics[name])} == numbers
    assert metrics.keys() == esd_metrics(heavy((16, 16))).keys()
    assert not any(math.isinf(metrics[name]) for name in SPECTRAL_METRICS)


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
    assert [metrics["status"] for metrics in together] == ["ok", "ok", "not finite", "ok", "ok"]
    for weight, metrics in zip(weights, together, strict=True):
        alone = esd_metrics(weight, smallest=1e-5)
        assert metrics.pop("status") == alone.pop("status")
        assert metrics == pytest.approx(alone, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_equal_their_upcast(dtype: torch.dtype) -> None:
    weight = heavy((40, 24)).to(dtype)
    assert esd_metrics(weight) == esd_metrics(weight.float())


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"`window` must be one of \['published', 'corrected'\], got 'linear'"):
        esd_metrics(torch.eye(4), "linear")
    with pytest.raises(ValueError, match=r"`weight` must have at least 2 dimensions, got \(4,\)"):
        esd_metrics_together([torch.eye(4), torch.ones(4)])
