"""LoRA ranks from deltas: reference ranks, the rules' properties, streaming of checkpoints, the file, and peft's own count."""

import copy
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank.io.weights import INDEX, source_identity
from lowrank.lora.deltas import DeltaSpectrum, delta_factors, delta_spectra, noise_edge
from lowrank.lora.rank_config import RankConfig
from lowrank.lora.ranks import (
    layer_type,
    power_of_two,
    random_ranks,
    rank_for_delta,
    ranks_for_budget,
    smooth_ranks,
    uniform_ranks,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "lora_ranks"


def spectrum_of(delta: Tensor, weight: Tensor | None = None) -> DeltaSpectrum:
    base = {"blocks.0.weight": torch.zeros_like(delta) if weight is None else weight}
    tuned = {"blocks.0.weight": base["blocks.0.weight"] + delta}
    return delta_spectra(Tensors(base), Tensors(tuned), [".*"], progress=False)["blocks.0"]


class Tensors(nn.Module):
    """A model that is nothing but its state."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = state

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.state


# --- the rule ---


def test_reference_ranks() -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())["spectra"]["q_geometric_64x64"]["thresholds"]
    file = load_file(GOLDEN / "delta_q_geometric_64x64.safetensors")
    found = spectrum_of(file["delta"])
    torch.testing.assert_close(found.sigma.float(), file["sigma"], rtol=1e-4, atol=1e-6)
    for values in (found.sigma, file["sigma"]):
        for threshold, wanted in expected.items():
            assert rank_for_delta(values, float(threshold), 1, 1000) == wanted["r_raw"]
            assert found.energy(wanted["r_raw"]) == pytest.approx(wanted["energy_at_r"], abs=1e-5)
            for bounds, final in wanted["final"].items():
                low, high = map(int, bounds.split("-"))
                rank = rank_for_delta(values, float(threshold), low, high)
                assert rank == final["clip_only"]
                assert power_of_two(rank, low, high) == final["reference_pow2"]
            not_squared = rank_for_delta(values.sqrt(), float(threshold), 1, 1000)
            assert not_squared == wanted["r_if_sigma_not_squared"] != wanted["r_raw"]


def test_reference_smoothing() -> None:
    for case in json.loads((GOLDEN / "expected.json").read_text())["groups"]:
        names = [f"layers.{i}.q_proj" for i in range(len(case["before"]))]
        groups = dict.fromkeys(names, "q_proj")
        after = smooth_ranks(dict(zip(names, case["before"], strict=True)), groups, case["smoothing"])
        assert list(after.values()) == case["after"]
        parameters = sum(rank * sum(shape) for rank, shape in zip(after.values(), case["shapes"], strict=True))
        assert parameters == case["lora_params"]


@pytest.mark.parametrize(
    ("factor", "wanted"), [(0.25, [14, 17, 23, 59, 107]), (0.8, [36, 36, 38, 48, 60]), (1, [44] * 5)]
)
def test_smoothing_by_hand(factor: float, wanted: list[int]) -> None:
    ranks = dict(zip("abcde", [4, 8, 16, 64, 128], strict=True))
    assert list(smooth_ranks(ranks, dict.fromkeys(ranks, "q"), factor).values()) == wanted
    assert smooth_ranks(ranks, dict.fromkeys(ranks, "q"), 0) == ranks


def test_smoothing_keeps_to_groups_bounds_and_means() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ranks = {
            f"layers.{i}.{kind}": int(torch.randint(4, 129, (), generator=generator)) for i in range(6) for kind in "qv"
        }
        groups = {name: layer_type(name) for name in ranks}
        for factor in (0.1, 0.5, 0.8, 1.0):
            smooth = smooth_ranks(ranks, groups, factor)
            for kind in "qv":
                before, after = ([r[n] for n in ranks if groups[n] == kind] for r in (ranks, smooth))
                assert min(before) <= min(after)
                assert max(after) <= max(before)
                assert sum(before) / 6 - 1 <= sum(after) / 6 <= sum(before) / 6
    assert smooth_ranks({"a": 0, "b": 8, "c": 16}, dict.fromkeys("abc", "q"), 1) == {"a": 0, "b": 12, "c": 12}


def test_the_threshold_rule_has_its_properties() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 40), (32, 32), (40, 24)):
        sigma = torch.linalg.svdvals(torch.randn(shape, generator=generator))
        thresholds = torch.linspace(0.01, 1, 60).tolist()
        ranks = [rank_for_delta(sigma, threshold, 1, 1000) for threshold in thresholds]
        assert ranks == sorted(ranks)
        assert ranks[-1] == min(shape)
        for scale in (1e-30, 1e-6, 1e6):
            assert [rank_for_delta(scale * sigma.double(), t, 1, 1000) for t in thresholds] == ranks
        # the largest values with the exact total never disagree with all of them
        total = float(sigma.double().square().sum())
        for top in (5, 10, 20):
            found = [rank_for_delta(sigma[:top], t, 1, top, total=total) for t in thresholds]
            assert found == [min(rank, top) for rank in ranks]
        low = torch.randn(shape[0], 7, generator=generator) @ torch.randn(7, shape[1], generator=generator)
        assert rank_for_delta(torch.linalg.svdvals(low), 1.0, 1, 1000) == 7
        assert rank_for_delta(spectrum_of(low).sigma, 1.0, 1, 1000) == 7


def test_bounds_and_edges() -> None:
    assert rank_for_delta([3.0, 1.0], 0.9, 1, 128) == 1  # exactly reached
    assert rank_for_delta([3.0, 1.0], 0.91, 1, 128) == 2
    assert rank_for_delta([3.0, 1.0], 0.5, 4, 128) == 2  # no more than there are
    assert rank_for_delta([1.0] * 200, 0.9, 4, 128) == 128
    assert rank_for_delta([0.0, 0.0], 0.9) == 0
    assert rank_for_delta([1e-30, 1e-31], 0.999, 1, 8) == 2
    assert [power_of_two(r) for r in (0, 4, 16, 17, 22, 23, 45, 46, 90, 91, 181)] == [
        0,
        4,
        16,
        16,
        16,
        32,
        32,
        64,
        64,
        128,
        128,
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([1.0], 0.0), r"`threshold` must be in \(0, 1\], got 0.0"),
        (([1.0], 1.1), r"`threshold` must be in \(0, 1\], got 1.1"),
        (([1.0], 0.9, 8, 4), r"`min_rank` must be in \[1, `max_rank`\], got 8"),
        (([1.0], 0.9, 0, 4), r"`min_rank` must be in \[1, `max_rank`\], got 0"),
        (([float("nan")], 0.9), "`singular_values` must be finite"),
        (([-1.0], 0.9), "`singular_values` must be finite"),
        (([], 0.9), "`singular_values` must be finite and >= 0, at least one"),
        (([2.0], 0.9, 1, 4, 1.0), "`total` must be at least the energy of the values, 4.0, got 1.0"),
    ],
    ids=str,
)
def test_rule_refusals(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rank_for_delta(*arguments)


def test_smoothing_refusals() -> None:
    with pytest.raises(ValueError, match=r"`factor` must be in \[0, 1\], got 1.5"):
        smooth_ranks({"a": 4}, {"a": "q"}, 1.5)
    with pytest.raises(ValueError, match="`groups` must name a group for every layer, got none for 'a'"):
        smooth_ranks({"a": 4}, {}, 0.5)


# --- spectra ---


@pytest.mark.parametrize("shape", [(24, 40), (32, 32), (40, 24), (2500, 12), (12, 2500), (8, 5, 3, 3)], ids=str)
def test_spectra_are_those_of_an_svd(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    base, delta = torch.randn(shape), 1e-3 * torch.randn(shape)
    tuned = base + delta
    found = spectrum_of(tuned - base, base)
    exact = torch.linalg.svdvals((tuned.double() - base.double()).flatten(1))
    torch.testing.assert_close(found.sigma, exact, rtol=1e-6, atol=1e-9)
    assert found.total == pytest.approx(float(exact.square().sum()), rel=1e-12)
    assert found.weight_norm == pytest.approx(float(base.double().norm()), rel=1e-12)
    assert found.shape == (shape[0], math.prod(shape[1:]))


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
    config = RankConfig.from_spectra({"layers.0.q": zero, "layers.1.q": other}, min_rank=1)
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
    found = spectrum_of(noise + spike)
    assert found.status == "signal"
    assert found.signal_rank == 1
    config = RankConfig.from_spectra({"layers.0.q": spectrum_of(noise), "layers.0.v": found}, smoothing=0)
    assert config.module_ranks["layers.0.q"] == 4  # not what 90 % of the energy of noise would take
    assert config.modules["layers.0.q"]["raw_rank"] > 20
    assert noise_edge(shape) == pytest.approx(noise_edge(shape[::-1]))


# --- the budget ---


def test_a_budget_is_spent_on_the_largest_energies() -> None:
    torch.manual_seed(0)
    spectra = {f"layers.{i}.q": spectrum_of((i + 0.5) * torch.randn(20, 20)) for i in range(5)}
    for budget in (40, 400, 1234, 3000):
        ranks = ranks_for_budget(spectra, budget)
        spent = sum(40 * rank for rank in ranks.values())
        assert budget - 40 < spent <= budget
        kept = sum(float(s.sigma[: ranks[n]].square().sum()) for n, s in spectra.items())
        best = sum(
            sorted((v for s in spectra.values() for v in s.sigma.square().tolist()), reverse=True)[: spent // 40]
        )
        assert kept == pytest.approx(best)  # equal shapes: exactly the globally largest
    assert sum(ranks_for_budget(spectra, 10**6).values()) == 100
    assert max(ranks_for_budget(spectra, 10**6, max_rank=7).values()) == 7
    assert min(ranks_for_budget(spectra, 5 * 3 * 40 + 40, min_rank=3).values()) == 3
    with pytest.raises(ValueError, match="`parameters` must be at least 600 for `min_rank` 3, got 599"):
        ranks_for_budget(spectra, 599, min_rank=3)
    zero = spectra | {"layers.9.q": spectrum_of(torch.zeros(20, 20))}
    assert ranks_for_budget(zero, 400)["layers.9.q"] == 0


def test_costs_weigh_where_shapes_differ() -> None:
    small, large = (
        DeltaSpectrum((4, 4), torch.tensor([1.0]), 1.0, 1.0),
        DeltaSpectrum((40, 40), torch.tensor([2.0]), 4.0, 1.0),
    )
    assert ranks_for_budget({"large": large, "small": small}, 80) == {"large": 0, "small": 1}
    assert ranks_for_budget({"large": large, "small": small}, 88) == {"large": 1, "small": 1}
    assert uniform_ranks({"a": (4, 4), "b": (40, 40)}, 200) == {"a": 3, "b": 2}


def test_controls_use_up_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (4, 4), "b": (40, 40), "c": (24, 40), "d": (40, 24)}
    whole = sum(min(shape) * sum(shape) for shape in shapes.values())
    seen = set()
    for budget in (300, 1000, 3000, whole, 2 * whole):
        for _ in range(5):
            ranks = random_ranks(shapes, budget, generator)
            seen.add(tuple(ranks.values()))
            left = budget - sum(rank * sum(shapes[name]) for name, rank in ranks.items())
            assert all(0 <= rank <= min(shapes[name]) for name, rank in ranks.items())
            assert left >= 0
            assert left < 64 or all(left < sum(shapes[n]) or r == min(shapes[n]) for n, r in ranks.items())
        uniform = uniform_ranks(shapes, budget)
        free = [rank for name, rank in uniform.items() if rank < min(shapes[name])]
        assert not free or max(free) - min(free) <= 1
    assert len(seen) > 15
    assert list(ranks.values()) == [4, 40, 24, 24]
    again = random_ranks(shapes, 1000, torch.Generator().manual_seed(1))
    assert again == random_ranks(shapes, 1000, torch.Generator().manual_seed(1))


# --- checkpoints ---


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
    wanted = delta_spectra(base, tuned, progress=False)
    assert len(wanted) == 14
    assert list(wanted) == sorted(wanted)
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in wanted)
    for other in (tuned_folder, str(tuned_folder), tuned_folder / "model.safetensors", tmp_path / "shards"):
        found = delta_spectra(base_folder, other, progress=False)
        assert list(found) == list(wanted)
        for name, spectrum in found.items():
            assert torch.equal(spectrum.sigma, wanted[name].sigma)
    assert source_identity(base_folder) == source_identity(str(base_folder)) != source_identity(tuned_folder)
    base.save_pretrained(tmp_path / "again")  # the same bytes at another time and place
    assert source_identity(tmp_path / "again") == source_identity(base_folder)
    assert source_identity(base) == source_identity(copy.deepcopy(base)) != source_identity(tuned)


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
    with pytest.raises(ValueError, match="`tuned` must hold whole safetensors files"):
        delta_spectra(base_folder, tmp_path / "torn.safetensors", progress=False)
    config = json.loads((tuned_folder / "config.json").read_text())
    (tuned_folder / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(ValueError, match="`tuned` must have the architecture of `base`, llama, got mistral"):
        delta_spectra(base_folder, tuned_folder, progress=False)
    name = "model.layers.1.mlp.up_proj"
    for change, said in (
        (torch.zeros(25, 16), rf"`tuned` must have the shapes of `base`: '{name}' has \(25, 16\), `base` \(24, 16\)"),
        (torch.full((24, 16), float("nan")), f"`tuned` must have finite weights, got NaN or infinity in '{name}'"),
    ):
        with pytest.raises(ValueError, match=said):
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
    found = delta_spectra(Tensors({n: torch.zeros_like(t) for n, t in state.items()}), tmp_path, progress=False)
    for name, spectrum in found.items():
        torch.testing.assert_close(spectrum.sigma, torch.linalg.svdvals(state[f"{name}.weight"].double()))


# --- the file and peft ---


class Towers(nn.Module):
    """Two towers with layers 1 and 11, whose names end alike, and a module at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.decoder = nn.Module()
        for tower in (self.encoder, self.decoder):
            tower.layers = nn.ModuleList(
                nn.ModuleDict({"q_proj": nn.Linear(12, 10), "v_proj": nn.Linear(12, 8)}) for _ in range(12)
            )
        self.q_proj = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        for tower in (self.encoder, self.decoder):
            for layer in tower.layers:
                x = x + nn.functional.pad(layer["q_proj"](x), (0, 2)) + nn.functional.pad(layer["v_proj"](x), (0, 4))
        return self.q_proj(x)


def towers_config(**options: Any) -> RankConfig:
    torch.manual_seed(0)
    names = [f"{t}.layers.{i}.{k}" for t in ("encoder", "decoder") for i in (1, 11) for k in ("q_proj", "v_proj")]
    names.remove("decoder.layers.1.v_proj")
    shapes = {name: (10 if name.endswith("q_proj") else 8, 12) for name in names} | {"q_proj": (12, 12)}
    ranks = dict(zip(shapes, [2, 5, 3, 7, 4, 6, 8, 1], strict=True))
    spectra = {n: spectrum_of(torch.randn(s[0], ranks[n]) @ torch.randn(ranks[n], s[1])) for n, s in shapes.items()}
    return RankConfig.from_spectra(spectra, threshold=1.0, min_rank=1, smoothing=0.0, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"scaling": 2.5}, {"lora_alpha": 16}, {"lora_alpha": 16, "use_rslora": True}],
    ids=str,
)
def test_peft_gets_exact_ranks_and_scalings(options: dict[str, Any], tmp_path: Path) -> None:
    config = towers_config()
    config.save(tmp_path / "lora_rank_config.json")
    loaded = RankConfig.load(tmp_path / "lora_rank_config.json")
    assert loaded == config
    model = Towers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = peft.get_peft_model(model, loaded.lora_config(model, **options))
    layers = {n: m for n, m in wrapped.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert sorted(layers) == sorted(config.module_ranks)
    assert len(set(config.module_ranks.values())) > 4
    for name, layer in layers.items():
        assert layer.r["default"] == config.module_ranks[name]
        rank = config.module_ranks[name]
        by_alpha = 16 / (rank**0.5 if "use_rslora" in options else rank)
        wanted_scaling = by_alpha if "lora_alpha" in options else options.get("scaling", 1.0)
        assert layer.scaling["default"] == pytest.approx(wanted_scaling)
    trainable, _ = wrapped.get_nb_trainable_parameters()
    assert trainable == config.parameters
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    x = torch.randn(3, 12)
    wanted = wrapped(x)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(Towers(), tmp_path / "adapter")
    again.base_model.model.load_state_dict(wrapped.base_model.model.state_dict())
    torch.testing.assert_close(again(x), wanted)
    assert (
        peft.LoraConfig.from_pretrained(tmp_path / "adapter").rank_pattern == loaded.lora_config(Towers()).rank_pattern
    )


def test_the_file_says_what_the_seed_said_and_more(tmp_path: Path) -> None:
    config = towers_config(model="towers", hashes={"base": "a", "tuned": "b"})
    config.save(tmp_path / "c.json")
    about = json.loads((tmp_path / "c.json").read_text())
    assert {
        "layer_ranks",
        "compression_ratio",
        "analysis_metadata",
        "module_ranks",
        "versions",
        "hashes",
        "format",
    } <= about.keys()
    assert about["layer_ranks"] == {"q_proj": 3, "v_proj": 7} == config.layer_ranks
    assert {"svd_threshold", "min_rank", "max_rank", "smoothing_factor"} <= about["analysis_metadata"].keys()
    stored = sum(r * (about["modules"][n]["out"] + about["modules"][n]["in"]) for n, r in about["module_ranks"].items())
    assert about["parameters"] == stored
    assert about["compression_ratio"] == pytest.approx(
        stored / sum(m["out"] * m["in"] for m in about["modules"].values())
    )
    for name, row in about["modules"].items():
        assert row["energy"] == pytest.approx(1.0), name
        assert row["relative_error"] == pytest.approx(math.sqrt(max(0.0, 1 - row["energy"])))
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_one_rank_per_type() -> None:
    config = towers_config(per="type")
    assert {config.module_ranks[n] for n in config.module_ranks if n.endswith("v_proj")} == {7}
    assert {config.module_ranks[n] for n in config.module_ranks if n.endswith("q_proj")} == {3}
    towers = towers_config(per="type", group=lambda name: name.partition(".")[0]).module_ranks
    assert {towers[n] for n in towers if n.startswith("encoder")} == {4}
    assert {towers[n] for n in towers if n.startswith("decoder")} == {6}
    with pytest.raises(ValueError, match="`per` must be 'module' or 'type', got 'layer'"):
        towers_config(per="layer")


def test_a_budget_config_counts_as_peft_does() -> None:
    config, model = towers_config(parameters=400), Towers()
    assert config.parameters <= 400
    wrapped = peft.get_peft_model(model, config.lora_config(model))
    assert wrapped.get_nb_trainable_parameters()[0] == config.parameters
    assert config.analysis_metadata["rule"] == "budget"


def test_conv1d_and_convolutions_are_counted_right() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=12, n_layer=1, n_head=2))
    tuned = GPT2LMHeadModel(base.config)
    spectra = delta_spectra(base, tuned, progress=False)
    config = RankConfig.from_spectra(spectra, min_rank=2, max_rank=5)
    wrapped = peft.get_peft_model(base, config.lora_config(base, fan_in_fan_out=True))
    assert wrapped.get_nb_trainable_parameters()[0] == config.parameters
    conv = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)))
    other = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)))
    config = RankConfig.from_spectra(delta_spectra(conv, other, [".*"], progress=False), min_rank=2, max_rank=5)
    wrapped = peft.get_peft_model(conv, config.lora_config(conv))
    assert wrapped.get_nb_trainable_parameters()[0] == config.parameters


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config, path = towers_config(), tmp_path / "c.json"
    config.save(path)
    about = json.loads(path.read_text())
    cases = [
        ("{", "`path` must be whole JSON"),
        (
            json.dumps(about | {"format": "lowrank.rank_config/0"}),
            r"must have format 'lowrank.rank_config/1', got 'lowrank.lora.rank_config/0'",
        ),
        (json.dumps({"layer_ranks": {"q_proj": 32}}), "must have format 'lowrank.rank_config/1', got None"),
        (json.dumps([1]), r"must have format 'lowrank.rank_config/1', got \[1\]"),
        (json.dumps({k: v for k, v in about.items() if k != "modules"}), "`path` must have the key 'modules'"),
        (
            json.dumps(about | {"module_ranks": {"q_proj": 2.5}}),
            r"`path` must have ranks in \[1, 12\] for 'q_proj', got 2.5",
        ),
        (
            json.dumps(about | {"module_ranks": {"q_proj": 40}}),
            r"`path` must have ranks in \[1, 12\] for 'q_proj', got 40",
        ),
    ]
    for text, said in cases:
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            RankConfig.load(path)
    with pytest.raises(FileNotFoundError, match="`path` must be a file written by RankConfig.save"):
        RankConfig.load(tmp_path / "none.json")
    other = Towers()
    other.encoder.layers[11]["v_proj"] = nn.Linear(12, 9)
    with pytest.raises(ValueError, match=r"'encoder.layers.11.v_proj' should be \(8, 12\), got \(9, 12\)"):
        config.lora_config(other)
    with pytest.raises(ValueError, match=r"should be \(10, 12\), got none"):
        config.lora_config(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="`peft_options` must leave 'r' to the ranks of this file"):
        config.lora_config(Towers(), r=4)


def test_bytes_do_not_depend_on_order_or_hash_seed(tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom test_rank_config import towers_config\nfrom lowrank.lora.rank_config import RankConfig\n"
        "towers_config().save(sys.argv[1])\n"
    )
    for seed in ("1", "2"):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parent, Path(__file__).parents[1]])),
        }
        subprocess.run([sys.executable, "-c", script, str(tmp_path / seed)], check=True, env=environment)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    torch.manual_seed(0)
    spectra = {f"layers.{i}.{k}": spectrum_of(torch.randn(9, 7)) for i in range(3) for k in "vq"}
    one = RankConfig.from_spectra(spectra)
    assert one == RankConfig.from_spectra(dict(reversed(spectra.items())))
    assert ranks_for_budget(spectra, 100) == ranks_for_budget(dict(reversed(spectra.items())), 100)


def test_given_ranks_have_their_figures() -> None:
    torch.manual_seed(0)
    spectra = {f"layers.{i}.q": spectrum_of(torch.randn(9, 7)) for i in range(3)}
    config = RankConfig.from_ranks(spectra, {"layers.2.q": 7, "layers.0.q": 2, "layers.1.q": 0}, {"rule": "by hand"})
    assert list(config.module_ranks.items()) == [("layers.0.q", 2), ("layers.2.q", 7)]
    assert config.modules["layers.2.q"]["energy"] == pytest.approx(1.0)
    assert config.modules["layers.0.q"]["energy"] == pytest.approx(spectra["layers.0.q"].energy(2))
    assert config.modules["layers.1.q"]["energy"] == 0.0
    assert config.parameters == 9 * 16
    for ranks, said in (
        ({"layers.0.q": 8}, r"in \[0, 7\] for 'layers.0.q', got 8"),
        ({"lost": 1}, r"in \[0, 0\] for 'lost'"),
    ):
        with pytest.raises(ValueError, match=f"`ranks` must be {said}"):
            RankConfig.from_ranks(spectra, ranks, {})
