"""Stability of bases and similarity of mixing: reference values, invariances, statistics of independent pairs, refusals."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lowrank.nn.targets import find_weights
from lowrank.training.stability import (
    BasisMonitor,
    RankDeficientWarning,
    basis_stability,
    decompose_weight,
    mixing_similarity,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "stability"
KINDS = ("qr", "polar")
WEIGHTS = [(24, 40), (32, 32), (40, 24), (12, 5, 3, 3), (5, 12, 3, 3), (96, 32)]
every_shape = pytest.mark.parametrize("shape", WEIGHTS, ids=str)


def gaussian(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(gaussian((size, size), generator)).Q


@pytest.mark.parametrize("name", ["square_64_perturb", "conv_24x8x3x3_independent"])
def test_reference_values(name: str) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())["pairs"][name]
    pair = load_file(GOLDEN / f"{name}.safetensors")
    weights = pair["w_prev"], pair["w_now"]
    assert basis_stability(*weights) == pytest.approx(expected["stability"], abs=1e-5)
    assert mixing_similarity(*weights, "qr") == pytest.approx(expected["r_similarity"], abs=1e-5)
    assert mixing_similarity(*weights, "polar") == pytest.approx(expected["polar_p_similarity"], abs=1e-5)
    smallest = [float(found.sigma[-1] / found.sigma[0]) for found in map(decompose_weight, weights)]
    assert smallest == pytest.approx(expected["sigma_min_over_max"], rel=1e-4)


@every_shape
@pytest.mark.parametrize("factor", [1.0, 7.5, 1e-3, -1.0, -4.0])
def test_scaled_weights_have_the_same_basis(shape: tuple[int, ...], factor: float, generator: torch.Generator) -> None:
    weight = gaussian(shape, generator, torch.float32)
    assert basis_stability(weight, factor * weight) == pytest.approx(1.0 if factor > 0 else -1.0, abs=1e-6)


@every_shape
def test_stability_is_the_mean_cosine_of_columns(shape: tuple[int, ...], generator: torch.Generator) -> None:
    first, second = gaussian(shape, generator), gaussian(shape, generator)
    upright = [w.flatten(1) if shape[0] >= w[0].numel() else w.flatten(1).T for w in (first, second)]
    bases = []
    for weight in upright:  # a second way to the polar factor: W (W^T W)^(-1/2)
        values, vectors = torch.linalg.eigh(weight.T @ weight)
        bases.append(weight @ (vectors / values.sqrt()) @ vectors.T)
    cosines = nn.functional.cosine_similarity(*bases, dim=0)
    assert basis_stability(first, second) == pytest.approx(cosines.mean().item(), abs=1e-9)
    assert basis_stability(second, first) == pytest.approx(cosines.mean().item(), abs=1e-9)


def test_invariances(shape: tuple[int, int], generator: torch.Generator) -> None:
    first, second = gaussian(shape, generator), gaussian(shape, generator)
    left, right = orthogonal(shape[0], generator), orthogonal(shape[1], generator)
    wanted = basis_stability(first, second)
    assert basis_stability(first.T, second.T) == pytest.approx(wanted, abs=1e-12)
    assert basis_stability(left @ first @ right, left @ second @ right) == pytest.approx(wanted, abs=1e-11)
    # other signs and another order of the singular vectors make the same weight, and the same basis
    u, sigma, vh = torch.linalg.svd(first, full_matrices=False)
    signs = torch.where(torch.arange(len(sigma)) % 2 == 0, -1.0, 1.0).double()
    order = torch.randperm(len(sigma), generator=generator)
    again = ((u * signs)[:, order] * sigma[order]) @ (signs[:, None] * vh)[order]
    assert basis_stability(again, second) == pytest.approx(wanted, abs=1e-11)
    assert basis_stability(again, first) == pytest.approx(1.0, abs=1e-12)


def test_mixing_leaves_the_basis(shape: tuple[int, int], generator: torch.Generator) -> None:
    q = decompose_weight(gaussian(shape, generator)).basis
    mixed = []
    for _ in range(2):
        part = gaussian((q.shape[1], q.shape[1]), generator)
        mixed.append(q @ (part @ part.T + torch.eye(len(part))))
    assert basis_stability(*mixed) == pytest.approx(1.0, abs=1e-10)
    assert mixing_similarity(*mixed, "polar") < 0.95


@every_shape
def test_the_parts_multiply_to_the_weight(shape: tuple[int, ...], generator: torch.Generator) -> None:
    weight = gaussian(shape, generator)
    found = decompose_weight(weight)
    upright = weight.flatten(1) if shape[0] >= weight[0].numel() else weight.flatten(1).T
    torch.testing.assert_close(found.basis @ found.stretch, upright)
    torch.testing.assert_close(found.mixing.T @ found.mixing, upright.T @ upright)
    torch.testing.assert_close(found.mixing, found.mixing.triu())
    assert bool((found.mixing.diagonal() > 0).all())
    torch.testing.assert_close(found.stretch, found.stretch.T)


@every_shape
@pytest.mark.parametrize("kind", KINDS)
def test_similarity_is_one_for_equals_and_has_a_floor(
    shape: tuple[int, ...], kind: str, generator: torch.Generator
) -> None:
    first, second = gaussian(shape, generator), gaussian(shape, generator)
    assert mixing_similarity(first, first, kind) == pytest.approx(1.0, abs=1e-12)
    assert 0.4 < mixing_similarity(first, second, kind) < 0.95
    assert mixing_similarity(first, second, kind) == mixing_similarity(second, first, kind)
    assert 0 <= mixing_similarity(first, 1e6 * second, kind) < 1e-3


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (48, 96)], ids=str)
def test_independent_pairs(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = [basis_stability(gaussian(shape, generator), gaussian(shape, generator)) for _ in range(200)]
    found, size = torch.tensor(values, dtype=torch.float64), shape[0] * shape[1]
    assert abs(found.mean()) <= 4 / (200 * size) ** 0.5
    assert found.std() == pytest.approx(size**-0.5, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_weights_are_masked(dtype: torch.dtype, generator: torch.Generator) -> None:
    low = (gaussian((64, 8), generator) @ gaussian((8, 64), generator)).to(dtype)
    noisy = low + 1e-12 * gaussian((64, 64), generator, dtype)
    with pytest.warns(RankDeficientWarning, match="rank deficient, sigma_min / sigma_max"):
        assert torch.tensor(basis_stability(low, noisy)).isnan()
    with pytest.warns(RankDeficientWarning):
        assert torch.tensor(mixing_similarity(low, noisy, "qr")).isnan()
    assert mixing_similarity(low, noisy, "polar") == pytest.approx(1.0, abs=1e-6)
    with pytest.warns(RankDeficientWarning):
        assert torch.tensor(basis_stability(torch.zeros(4, 4), torch.eye(4))).isnan()
    assert mixing_similarity(torch.zeros(4, 4), torch.zeros(4, 4), "polar") == 1.0


def test_refusals(generator: torch.Generator) -> None:
    good = gaussian((4, 3), generator)
    for bad, said in (
        (gaussian((3, 4), generator), r"shape of `previous`, \(4, 3\), got \(3, 4\)"),
        (good * float("nan"), "`current` must be a finite matrix or kernel, got NaN"),
    ):
        with pytest.raises(ValueError, match=said):
            basis_stability(good, bad)
    with pytest.raises(ValueError, match=r"`previous` must be a finite matrix or kernel, got shape \(4,\)"):
        basis_stability(good[:, 0], good[:, 0])
    with pytest.raises(ValueError, match="`kind` must be 'qr' or 'polar', got 'euclid'"):
        mixing_similarity(good, good, "euclid")


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.qkv = nn.Linear(8, 24, bias=False)
        self.attention = nn.MultiheadAttention(8, 2)
        self.apart = nn.MultiheadAttention(8, 2, kdim=5, vdim=6)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)


def test_weights_by_name() -> None:
    weights = find_weights(Mixed())
    parts = ["apart.q_proj", "apart.k_proj", "apart.v_proj"]
    assert sorted(weights) == sorted(
        ["conv", "qkv", "attention.in_proj", "attention.out_proj", *parts, "apart.out_proj", "head"]
    )
    assert weights["attention.in_proj"].shape == (24, 8)
    assert list(find_weights(Mixed(), [".*"], ["head", r"a.*"])) == ["conv", "qkv"]
    with pytest.raises(ValueError, match="`include` must match layers of the model, got 'blocks'"):
        find_weights(Mixed(), ["blocks"])


def test_monitor_says_what_the_functions_say(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    model, monitor = Mixed(), BasisMonitor(every=2, exclude=["head"], progress=False)
    assert {row["masked"] for row in monitor.check(model)} == {"nothing to compare with yet"}
    before = {name: weight.detach().clone() for name, weight in find_weights(model).items()}
    assert monitor.step(model) == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    state = torch.get_rng_state()
    rows = {row["layer"]: row for row in monitor.step(model)}
    assert torch.equal(state, torch.get_rng_state())
    assert sorted(rows) == sorted(before.keys() - {"head"})
    for name, row in rows.items():
        weight = find_weights(model)[name]
        assert row["stability"] == pytest.approx(basis_stability(before[name], weight), abs=1e-5)
        assert row["r_similarity"] == pytest.approx(mixing_similarity(before[name], weight, "qr"), abs=1e-5)
        assert row["p_similarity"] == pytest.approx(mixing_similarity(before[name], weight, "polar"), abs=1e-5)
        assert row["step"] == 2
        assert row["masked"] == ""
        assert 0 < row["smallest_over_largest"] < 1
    assert len(monitor.history) == 2 * len(rows)


def test_monitor_masks_rank_deficient_layers_with_a_reason() -> None:
    layer = nn.Linear(6, 6, bias=False)
    monitor = BasisMonitor(1, progress=False)
    monitor.check(layer_in(layer))
    with torch.no_grad():
        layer.weight[3] = layer.weight[2]
    (row,) = monitor.step(layer_in(layer))
    assert torch.tensor([row["stability"], row["r_similarity"]]).isnan().all()
    assert row["masked"].startswith("rank deficient")
    assert row["effective_rank"] < 6
    assert 0 < row["p_similarity"] < 1


def layer_in(layer: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layer": layer})


def test_monitor_refuses_what_it_cannot_compare() -> None:
    monitor = BasisMonitor(1, progress=False)
    monitor.check(layer_in(nn.Linear(6, 4)))
    with pytest.raises(ValueError, match=r"layer 'layer' had a basis of shape \(6, 4\), got \(6, 5\)"):
        monitor.step(layer_in(nn.Linear(6, 5)))
    bad = nn.Linear(6, 4)
    nn.init.constant_(bad.weight, float("nan"))
    with pytest.raises(ValueError, match="layer 'layer', got NaN or infinity"):
        monitor.check(layer_in(bad))
    with pytest.raises(ValueError, match="`every` must be >= 1, got 0"):
        BasisMonitor(0)


def test_monitor_goes_on_from_its_state(tmp_path: Path) -> None:
    def turned(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    torch.manual_seed(0)
    model, whole = layer_in(nn.Linear(6, 4)), BasisMonitor(1, progress=False)
    whole.check(model)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = BasisMonitor(1, progress=False)
    state: dict[str, Any] = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state)
    turned(model)
    assert resumed.step(model) == whole.step(model)
    assert str(resumed.history) == str(whole.history)
