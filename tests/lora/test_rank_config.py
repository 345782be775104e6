"""Rank configs: the file, what peft makes of it, and files that do not fit."""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from weight_changes import spectrum_of

from lowrank.lora.deltas import DeltaSpectrum, delta_spectra
from lowrank.lora.rank_config import RankConfig
from lowrank.lora.rank_rule import RankRule
from lowrank.lora.ranks import ranks_for_budget


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
    spectra = {}
    for name, (out, inputs) in shapes.items():
        scales = 2.0 ** -torch.arange(
            ranks[name]
        )  # singular values that fall, so that no change of full rank looks like noise
        spectra[name] = spectrum_of(torch.randn(out, ranks[name]) * scales @ torch.randn(ranks[name], inputs))
    rule = RankRule(threshold=1.0, min_rank=1, smoothing=0.0, **options)
    return RankConfig.from_spectra(spectra, rule, model="towers", hashes={"base": "a", "tuned": "b"})


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
    expected = wrapped(x)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(Towers(), tmp_path / "adapter")
    again.base_model.model.load_state_dict(wrapped.base_model.model.state_dict())
    torch.testing.assert_close(again(x), expected)
    assert (
        peft.LoraConfig.from_pretrained(tmp_path / "adapter").rank_pattern == loaded.lora_config(Towers()).rank_pattern
    )


def test_the_file_has_the_published_keys_and_more(tmp_path: Path) -> None:
    config = towers_config()
    config.save(tmp_path / "c.json")
    record = json.loads((tmp_path / "c.json").read_text())
    assert {
        "layer_ranks",
        "compression_ratio",
        "analysis_metadata",
        "module_ranks",
        "versions",
        "hashes",
        "format",
    } <= record.keys()
    assert record["layer_ranks"] == {"q_proj": 3, "v_proj": 7} == config.layer_ranks
    assert {"svd_threshold", "min_rank", "max_rank", "smoothing_factor"} <= record["analysis_metadata"].keys()
    stored = sum(
        r * (record["modules"][n]["out"] + record["modules"][n]["in"]) for n, r in record["module_ranks"].items()
    )
    assert record["parameters"] == stored
    assert record["compression_ratio"] == pytest.approx(
        stored / sum(m["out"] * m["in"] for m in record["modules"].values())
    )
    for name, row in record["modules"].items():
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
    config = RankConfig.from_spectra(spectra, RankRule(min_rank=2, max_rank=5))
    wrapped = peft.get_peft_model(base, config.lora_config(base, fan_in_fan_out=True))
    assert wrapped.get_nb_trainable_parameters()[0] == config.parameters
    conv = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)))
    other = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)))
    spectra = delta_spectra(conv, other, [".*"], progress=False)
    config = RankConfig.from_spectra(spectra, RankRule(min_rank=2, max_rank=5))
    wrapped = peft.get_peft_model(conv, config.lora_config(conv))
    assert wrapped.get_nb_trainable_parameters()[0] == config.parameters


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config, path = towers_config(), tmp_path / "c.json"
    config.save(path)
    record = json.loads(path.read_text())
    cases = [
        ("{", "`path` must be whole JSON"),
        (
            json.dumps(record | {"format": "lowrank.rank_config/0"}),
            r"must have format 'lowrank.rank_config/1', got 'lowrank.rank_config/0'",
        ),
        (json.dumps({"layer_ranks": {"q_proj": 32}}), "must have format 'lowrank.rank_config/1', got None"),
        (json.dumps([1]), r"must have format 'lowrank.rank_config/1', got \[1\]"),
        (json.dumps({k: v for k, v in record.items() if k != "modules"}), "`path` must have the key 'modules'"),
        (
            json.dumps(record | {"module_ranks": {"q_proj": 2.5}}),
            "`path` must be a valid integer at 'module_ranks.q_proj', got 2.5",
        ),
        (
            json.dumps(record | {"module_ranks": {"q_proj": 40}}),
            r"`path` must have ranks in \[1, 12\] for 'q_proj', got 40",
        ),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
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
    for ranks, message in (
        ({"layers.0.q": 8}, r"in \[0, 7\] for 'layers.0.q', got 8"),
        ({"lost": 1}, r"in \[0, 0\] for 'lost'"),
    ):
        with pytest.raises(ValueError, match=f"`ranks` must be {message}"):
            RankConfig.from_ranks(spectra, ranks, {})


def test_rule_options_are_checked() -> None:
    for message, options in [
        (r"`threshold` must be in \(0, 1\], got 1.1", {"threshold": 1.1}),
        (r"`min_rank` must be in \[1, `max_rank`\] for `max_rank` 4, got 8", {"min_rank": 8, "max_rank": 4}),
        (r"`smoothing` must be in \[0, 1\], got 1.5", {"smoothing": 1.5}),
        ("`parameters` must be None or >= 1, got 0", {"parameters": 0}),
    ]:
        with pytest.raises(ValueError, match=message):
            RankRule(**options)


def test_a_config_without_any_rank_says_so_and_is_a_file_all_the_same(tmp_path: Path) -> None:
    sigma = torch.tensor([2.0, 1.0]).double()
    spectra = {"layers.0.q": DeltaSpectrum((8, 6), sigma, 5.0, 1.0)}
    config = RankConfig.from_spectra(spectra, RankRule(parameters=5))
    with pytest.raises(
        ValueError, match="`module_ranks` must give a module a rank of at least 1, which costs 14 param"
    ):
        config.lora_config(nn.Linear(6, 8))
    for empty in (config, RankConfig({}, {}, {})):
        empty.save(tmp_path / "ranks.json")
        assert RankConfig.load(tmp_path / "ranks.json").module_ranks == {}
        assert empty.compression_ratio == 0.0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rank", [np.int8(2), np.int64(2), 2.0, np.float32(2)])
def test_ranks_of_any_type_are_saved_as_integers(rank: Any, tmp_path: Path) -> None:
    spectra = {"q": DeltaSpectrum((8, 6), torch.ones(6).double(), 6.0, 1.0)}
    RankConfig.from_ranks(spectra, {"q": rank}, {}).save(tmp_path / "ranks.json")
    assert RankConfig.load(tmp_path / "ranks.json").module_ranks == {"q": 2}
    with pytest.raises(ValueError, match=r"`ranks\['q'\]` must be a whole number >= 0, got 2.5"):
        RankConfig.from_ranks(spectra, {"q": 2.5}, {})


@pytest.mark.parametrize("number", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("option", ["scaling", "lora_alpha"])
def test_a_scaling_that_switches_the_adapter_off_is_refused(option: str, number: float) -> None:
    with pytest.raises(ValueError, match=f"`{option}` must be None or finite and > 0, got {number}"):
        towers_config().lora_config(Towers(), **{option: number})
