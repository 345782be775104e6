"""Spectra of weight changes: an SVD as the reference, noise, and the forms that checkpoints have."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weight_changes import Tensors, spectrum_of

from lowrank.io.weights import INDEX, hash_source
from lowrank.lora.deltas import delta_factors, delta_spectra, noise_edge
from lowrank.lora.rank_config import RankConfig
from lowrank.lora.rank_rule import RankRule
from lowrank.lora.ranks import rank_for_delta


@pytest.mark.parametrize("shape", [(24, 40), (32, 32), (40, 24), (2500, 12), (12, 2500), (8, 5, 3, 3)], ids=str)
def test_spectra_are_those_of_an_svd(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    base, delta = torch.randn(shape), 1e-3 * torch.randn(shape)
    tuned = base + delta
    spectrum = spectrum_of(tuned - base, base)
    exact = torch.linalg.svdvals((tuned.double() - base.double()).flatten(1))
    torch.testing.assert_close(spectrum.sigma, exact, rtol=1e-6, atol=1e-9)
    assert spectrum.total == pytest.approx(float(exact.square().sum()), rel=1e-12)
    assert spectrum.weight_norm == pytest.approx(float(base.double().norm()), rel=1e-12)
    assert spectrum.shape == (shape[0], math.prod(shape[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_equal_their_upcast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = torch.randn(24, 16).to(dtype)
    tuned = (base.float() + 1e-2 * torch.randn(24, 16)).to(dtype)
    one, two = ({"blocks.0.q.weight": w} for w in (base, tuned))
    narrow = delta_spectra(Tensors(one), Tensors(two), progress=False)["blocks.0.q"]
    wide = delta_spectra(*(Tensors({n: w.float() for n, w in s.items()}) for s in (one, two)), progress=False)[
        "blocks.0.q"
    ]
    assert torch.equal(narrow.sigma, wide.sigma)
    assert narrow.total == wide.total
    tiny = spectrum_of(torch.full((8, 8), 1e-5, dtype=torch.float16))  # squares to 0 in fp16
    assert tiny.total > 0
    assert rank_for_delta(tiny.sigma, 0.9, 1) == 1


def test_a_zero_delta_is_dropped() -> None:
    zero, other = spectrum_of(torch.zeros(6, 4)), spectrum_of(torch.randn(6, 2) @ torch.randn(2, 4))
    assert zero.status == "zero"
    assert zero.energy(0) == 1.0
    assert not any(isinstance(value, float) and math.isnan(value) for value in zero.row.values())
    config = RankConfig.from_spectra({"layers.0.q": zero, "layers.1.q": other}, RankRule(min_rank=1))
    assert list(config.module_ranks) == ["layers.1.q"]
    assert config.module_ranks["layers.1.q"] == rank_for_delta(other.sigma, 0.9, 1)  # a zero counts in no mean
    with pytest.raises(ValueError, match="`spectra` must have a layer that changed, got none"):
        RankConfig.from_spectra({"a": zero})


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 200)], ids=str)
def test_noise_is_told_from_signal(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    flagged = 0
    for _ in range(100):
        noise = 0.3 * torch.randn(shape, generator=generator)
        flagged += spectrum_of(noise).status == "noise"
    assert flagged >= 98
    spike = torch.randn(shape[0], 1, generator=generator) @ torch.randn(1, shape[1], generator=generator)
    spiked = spectrum_of(noise + spike)
    assert spiked.status == "signal"
    assert spiked.signal_rank == 1
    config = RankConfig.from_spectra({"layers.0.q": spectrum_of(noise), "layers.0.v": spiked}, RankRule(smoothing=0))
    assert config.module_ranks["layers.0.q"] == 4  # not what 90 % of the energy of noise would take
    assert config.modules["layers.0.q"]["raw_rank"] > 20
    assert noise_edge(shape) == pytest.approx(noise_edge(shape[::-1]))


def llama(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, nn.Module, Path, Path]:
    """Two models in memory and in folders, single files."""
    base, tuned = llama(), llama()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.dim() == 2:
                left, right = torch.randn(parameter.shape[0], 3), torch.randn(3, parameter.shape[1])
                parameter += (0.1 if "mlp" in name else 0.01) * left @ right
    for model, folder in ((base, tmp_path / "base"), (tuned, tmp_path / "tuned")):
        model.save_pretrained(folder)
    return base, tuned, tmp_path / "base", tmp_path / "tuned"


def test_every_form_of_a_checkpoint_gives_the_same(pair: Any, tmp_path: Path) -> None:
    base, tuned, base_folder, tuned_folder = pair
    tuned.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    expected = delta_spectra(base, tuned, progress=False)
    assert len(expected) == 14
    assert list(expected) == sorted(expected)
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in expected)
    for other in (tuned_folder, str(tuned_folder), tuned_folder / "model.safetensors", tmp_path / "shards"):
        spectra = delta_spectra(base_folder, other, progress=False)
        assert list(spectra) == list(expected)
        for name, spectrum in spectra.items():
            assert torch.equal(spectrum.sigma, expected[name].sigma)
    assert hash_source(base_folder) == hash_source(str(base_folder)) != hash_source(tuned_folder)
    base.save_pretrained(tmp_path / "again")  # the same bytes at another time and place
    assert hash_source(tmp_path / "again") == hash_source(base_folder)
    assert hash_source(base) == hash_source(copy.deepcopy(base)) != hash_source(tuned)


def test_warm_start_factors_multiply_to_the_delta(pair: Any) -> None:
    base, tuned, *_ = pair
    names = list(delta_spectra(base, tuned, progress=False))
    factors = delta_factors(base, tuned, dict.fromkeys(names, 3) | {names[0]: 0}, progress=False)
    assert list(factors) == names[1:]
    for name, (left, right) in factors.items():
        delta = tuned.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(left @ right, delta, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), atol=1e-5, rtol=1e-4)
    twin = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "aXb": nn.Linear(4, 4)})
    assert list(delta_factors(twin, copy.deepcopy(twin), {"a.b": 1}, progress=False)) == [
        "a.b"
    ]  # the dot is no pattern
    with pytest.raises(ValueError, match="`ranks` must name weights of both checkpoints, got 'lost'"):
        delta_factors(base, tuned, {names[0]: 2, "lost": 3}, progress=False)


def test_bad_checkpoints_are_named(pair: Any, tmp_path: Path) -> None:
    base, tuned, base_folder, tuned_folder = pair
    tuned.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"`tuned` must hold every shard of its index, .* without '{shard.name}'"
    ):
        delta_spectra(base_folder, tmp_path / "shards", progress=False)
    with pytest.raises(
        FileNotFoundError, match=r"`base` must be a folder with model.safetensors or .*, got .* with neither"
    ):
        delta_spectra(tmp_path, tuned_folder, progress=False)
    with pytest.raises(FileNotFoundError, match="`base` must be a folder, a safetensors file or a Hub name"):
        delta_spectra(tmp_path / "no" / "such", tuned_folder, progress=False)
    (tmp_path / "torn.safetensors").write_bytes((tuned_folder / "model.safetensors").read_bytes()[:-64])
    with pytest.raises(ValueError, match="`tuned` must be a whole safetensors file"):
        delta_spectra(base_folder, tmp_path / "torn.safetensors", progress=False)
    config = json.loads((tuned_folder / "config.json").read_text())
    (tuned_folder / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(ValueError, match="`tuned` must have the architecture of `base`, llama, got mistral"):
        delta_spectra(base_folder, tuned_folder, progress=False)
    name = "model.layers.1.mlp.up_proj"
    for change, message in (
        (torch.zeros(25, 16), rf"`tuned` must have the shapes of `base`: '{name}' has \(25, 16\), `base` \(24, 16\)"),
        (torch.full((24, 16), float("nan")), f"`tuned` must have finite weights, got NaN or infinity in '{name}'"),
    ):
        with pytest.raises(ValueError, match=message):
            delta_spectra(base, Tensors(tuned.state_dict() | {f"{name}.weight": change}), progress=False)
    with pytest.raises(
        ValueError, match="`base` and `tuned` must have weights in common that `layers` names, got none"
    ):
        delta_spectra(base, Tensors({"encoder.0.weight": torch.zeros(2, 2)}), progress=False)


def test_an_index_of_another_layout_is_read(tmp_path: Path) -> None:
    """Shards as other tools write them: any names, any order."""
    torch.manual_seed(0)
    state = {f"layers.{i}.q.weight": torch.randn(6, 4) for i in range(3)}
    for i, (name, tensor) in enumerate(state.items()):
        save_file({name: tensor}, tmp_path / f"part{i}.safetensors")
    index = {"weight_map": {name: f"part{i}.safetensors" for i, name in enumerate(state)}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    spectra = delta_spectra(Tensors({n: torch.zeros_like(t) for n, t in state.items()}), tmp_path, progress=False)
    for name, spectrum in spectra.items():
        torch.testing.assert_close(spectrum.sigma, torch.linalg.svdvals(state[f"{name}.weight"].double()))
