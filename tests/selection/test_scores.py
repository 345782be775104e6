"""Scores of layers: sizes of real architectures, one answer for a model and its files, and files that do not fit."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from lowrank.nn.targets import split_block
from lowrank.selection import scoring
from lowrank.selection.assignment import assign_layers
from lowrank.selection.esd import SPECTRAL_METRICS, esd_metrics
from lowrank.selection.layer_sizes import layer_sizes
from lowrank.selection.scores import Scores
from lowrank.selection.scoring import ScoringConfig, layer_scores


def llama(seed: int = 0, **sizes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(seed)
    plain = dict(
        hidden_size=32, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
    )
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 64} | plain | sizes))


def test_sizes_of_real_architectures_are_read_and_not_guessed() -> None:
    with init_empty_weights():
        large = llama(
            hidden_size=8192,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            intermediate_size=28672,
            vocab_size=32000,
        )
    sizes = layer_sizes(large)
    assert len(sizes) == 560
    assert sum(math.prod(shape) for shape in sizes.values()) == 68_451_041_280
    assert sizes["model.layers.79.self_attn.k_proj"] == (1024, 8192)
    from transformers import OPTConfig, OPTForCausalLM  # noqa: PLC0415

    with init_empty_weights():
        small = OPTForCausalLM(OPTConfig())
    sizes = layer_sizes(small)
    assert len(sizes) == 72
    assert sum(math.prod(shape) for shape in sizes.values()) == 84_934_656
    assert [name.partition("layers.0.")[2] for name in list(sizes)[:6]] == [
        "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"
    ]  # fmt: skip


def test_a_model_and_its_files_have_the_same_scores(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    scores = layer_scores(model, progress=False)
    assert scores.names == [
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name
    ]
    for folder in ("whole", "shards"):
        assert layer_scores(tmp_path / folder, progress=False).layers == scores.layers
    (tmp_path / "whole" / "config.json").unlink()
    bare = layer_scores(tmp_path / "whole", progress=False)
    assert sorted(bare.names) == sorted(scores.names)
    assert bare.ratios == pytest.approx(scores.ratios)
    assert [name.split(".")[2] for name in bare.names] == [str(i // 7) for i in range(84)]


@pytest.mark.parametrize("metric", SPECTRAL_METRICS)
def test_every_metric_is_that_of_the_layer(metric: str) -> None:
    model = llama(num_hidden_layers=2)
    config = ScoringConfig(mapping="layer_wise", prunable="smaller", missing="median")
    scores = layer_scores(model, metric, config, progress=False)
    for row in scores.layers:
        weight = model.get_submodule(row["name"]).weight.detach()
        assert row["raw_metric"] == esd_metrics(weight)[metric]
        assert row["significance_score"] == 1 - row["pruning_ratio"]
        assert row["num_parameters"] == weight.numel() == math.prod(row["weight_shape"])
        assert row["norm_1"] == pytest.approx(float(weight.double().abs().sum()), rel=1e-12)
        assert row["norm_2"] == pytest.approx(float(weight.double().norm()), rel=1e-12)
        assert row["norm_inf"] == float(weight.abs().max())
    pruned = sum(row["pruning_ratio"] * row["num_parameters"] for row in scores.layers)
    assert pruned == pytest.approx(0.7 * sum(scores.costs))
    order = sorted(scores.layers, key=lambda row: row["raw_metric"])
    ratios = [row["pruning_ratio"] for row in order]
    assert ratios == sorted(ratios, reverse=True)


def test_the_file_has_the_published_keys_and_comes_back(tmp_path: Path) -> None:
    model = llama()
    scores = layer_scores(model, name="small", progress=False)
    scores.save(tmp_path / "small_scores.json")
    record = json.loads((tmp_path / "small_scores.json").read_text())
    published = (
        "model_name metric_name sparsity_ratio epsilon mapping_type significance_method total_parameters num_blocks"
    )
    assert {
        *published.split(),
        "num_prunable_layers",
        "layers_per_block",
        "layers",
        "blocks",
        "metadata",
    } <= record.keys()
    assert record["num_blocks"] == 12
    assert record["layers_per_block"] == 7
    assert record["total_parameters"] == sum(scores.costs)
    assert record["blocks"][3]["start_layer_index"] == 21
    assert record["blocks"][3]["end_layer_index"] == 27
    row = {"index", "name", "num_parameters", "significance_score", "pruning_ratio", "weight_shape"}
    assert all(row <= layer.keys() for layer in record["layers"])
    for block in range(12):
        assert len({layer["pruning_ratio"] for layer in record["layers"][7 * block : 7 * block + 7]}) == 1
    assert record["metadata"]["significance_scores_min"] == min(scores.values)
    loaded = Scores.load(tmp_path / "small_scores.json", model)
    assert loaded == scores
    assert assign_layers(loaded.values, loaded.costs, [20000, 40000]).optimal
    assert [p.name for p in tmp_path.iterdir()] == ["small_scores.json"]


def test_a_failed_fit_keeps_its_row() -> None:
    model = llama(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(
        ValueError, match="alpha_peak in every layer, got status 'zero' for 'model.layers.1.mlp.up_proj'"
    ):
        layer_scores(model, progress=False)
    scores = layer_scores(model, config=ScoringConfig(missing="median"), progress=False)
    assert len(scores.layers) == 14
    lost = next(row for row in scores.layers if row["status"] != "ok")
    assert (lost["name"], lost["raw_metric"], lost["status"]) == ("model.layers.1.mlp.up_proj", None, "zero")
    assert all(math.isfinite(value) for value in scores.values)


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3", "mlp.up_proj"),
        ("blocks.11.attn.qkv", "blocks.11", "attn.qkv"),
        ("0.weight", "0", "weight"),
        ("stages.1.blocks.2.mlp.fc1", "stages.1.blocks.2", "mlp.fc1"),
        ("encoder.stages.3.layers.0.pwconv1", "encoder.stages.3.layers.0", "pwconv1"),
        ("model.layers.3.mlp.experts.7.w1", "model.layers.3", "mlp.experts.7.w1"),
        ("encoder.block.4.layer.1.DenseReluDense.wi", "encoder.block.4", "layer.1.DenseReluDense.wi"),
        ("lm_head", "", "lm_head"),
    ],
)
def test_blocks_are_found_however_models_number_them(name: str, block: str, kind: str) -> None:
    assert split_block(name) == (block, kind)


def test_an_accelerator_gets_matrices_of_one_size_and_a_cpu_one_at_a_time() -> None:
    sizes = {
        f"layers.{i}.{kind}": shape
        for i in range(300)
        for kind, shape in (("up", (4096, 1024)), ("down", (1024, 4096)))
    }
    sizes |= {f"layers.{i}.q": (2048, 4096) for i in range(40)}
    groups = list(scoring._batch_layers(sizes, "cuda"))
    assert sorted(name for names in groups for name in names) == sorted(sizes)
    for names in groups:
        sides = {min(sizes[name]) for name in names}
        assert len(sides) == 1
        assert len(names) * 8 * sides.pop() ** 2 <= scoring._BATCH_BYTES
    assert len(groups) == 5 + 2
    assert [len(names) for names in scoring._batch_layers(sizes, "cpu")] == [1] * 640


def test_the_number_that_is_decomposed_at_once_changes_nothing(monkeypatch) -> None:
    model = llama(num_hidden_layers=3)
    one = layer_scores(model, progress=False)
    monkeypatch.setattr(scoring, "_batch_layers", lambda sizes, device: [list(reversed(sizes))])
    assert layer_scores(model, progress=False) == one


def test_convolutions_and_conv1d_are_layers() -> None:
    import timm  # noqa: PLC0415
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=3)
    sizes = layer_sizes(convnext)
    assert sizes["stages.1.blocks.0.conv_dw"] == (16, 1, 7, 7)
    assert sizes["stages.1.blocks.0.mlp.fc1"] == (64, 16, 1, 1)  # this one has its linears as 1 x 1 convolutions
    assert not any("norm" in name for name in sizes)
    rows = layer_scores(convnext, config=ScoringConfig(missing="median"), progress=False).layers
    assert {f"stages.{stage}.blocks.0" for stage in range(4)} < {row["block"] for row in rows}
    for row in rows:
        weight = convnext.get_submodule(row["name"]).weight.detach().double()
        norms = (float(weight.abs().max()), float(weight.abs().sum()), float(weight.norm()))
        assert (row["norm_inf"], row["norm_1"], row["norm_2"]) == pytest.approx(norms, rel=1e-12)
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))
    assert len(layer_sizes(gpt)) == 8


def test_refusals(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=2)
    for words, options in [
        (r"`metric` must be one of \['alpha', .* got 'beta'", {"metric": "beta"}),
        ("`prunable` must be 'larger' or 'smaller' for the metric 'norm', got None", {"metric": "norm"}),
        (r"`layers` must match weights of the model, got none for \['lost'\]", {"layers": ["lost"]}),
    ]:
        with pytest.raises(ValueError, match=words):
            layer_scores(model, progress=False, **options)
    for words, options in [
        (r"`window` must be one of \['published', 'corrected'\], got 'linear'", {"window": "linear"}),
        ("`smallest` must be >= 0 and finite, got -1", {"smallest": -1}),
        ("`prunable` must be None, 'larger' or 'smaller', got 'all'", {"prunable": "all"}),
        (r"`mapping` must be one of \['block_wise', 'layer_wise'\], got 'none'", {"mapping": "none"}),
        (r"`sparsity` must be in \[0, 1\), got 1", {"sparsity": 1}),
        (r"`epsilon` must be in \[0, 1\), got 1.5", {"epsilon": 1.5}),
        ("`missing` must be 'error' or 'median', got 'zero'", {"missing": "zero"}),
    ]:
        with pytest.raises(ValueError, match=words):
            ScoringConfig(**options)
    path = tmp_path / "scores.json"
    layer_scores(model, progress=False).save(path)
    with pytest.raises(
        ValueError, match=r"got \(32, 32\) for 'model.layers.0.self_attn.k_proj', which is \(16, 32\) in the scores"
    ):
        Scores.load(path, llama(num_hidden_layers=2, num_key_value_heads=4))
    with pytest.raises(ValueError, match="'model.layers.2.self_attn.q_proj', which is None in the scores"):
        Scores.load(path, llama(num_hidden_layers=3))
    whole = json.loads(path.read_text())
    for change, words in [
        ({"format": "lowrank.scores/0"}, "must have format 'lowrank.scores/1', got 'lowrank.scores/0'"),
        ({"format": None}, "must have format 'lowrank.scores/1', got None"),
        ({"layers": []}, r"must have at least 1 item .*at 'layers', got \[\]"),
        (
            {"layers": [whole["layers"][0] | {"num_parameters": 2.5}]},
            "a valid integer at 'layers.0.num_parameters', got 2.5",
        ),
        ({"layers": [whole["layers"][0]] * 2}, "must have one row per layer"),
        ({"layers": "all"}, "must be a valid list at 'layers', got 'all'"),
        (
            {"layers": [{**whole["layers"][0], "significance_score": None}]},
            "at 'layers.0.significance_score', got None",
        ),
        ({"layers": [{"index": 0, "name": "a"}]}, "must have the key 'block' in 'layers.0', got none"),
    ]:
        (tmp_path / "other.json").write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=words):
            Scores.load(tmp_path / "other.json")
    (tmp_path / "torn.json").write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="`path` must be whole JSON"):
        Scores.load(tmp_path / "torn.json")
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        Scores.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "config", [ScoringConfig(), ScoringConfig(mapping="layer_wise", exact=False, prunable="smaller", missing="median")]
)
def test_shares_at_another_sparsity_follow_the_same_rule(config: ScoringConfig, tmp_path: Path) -> None:
    model = nn.ModuleList(nn.ModuleList([nn.Linear(16, 24), nn.Linear(24, 32)]) for _ in range(3))
    scores, other = (
        layer_scores(model, "stable_rank" if config.prunable else "alpha_peak", one, progress=False)
        for one in (config, replace(config, sparsity=0.4))
    )
    scores.save(tmp_path / "scores.json")
    read = Scores.load(tmp_path / "scores.json")
    assert read.ratios_at(config.sparsity) == scores.ratios
    assert read.ratios_at(0.4) == other.ratios
    with pytest.raises(ValueError, match=r"`settings` must say how the scores were made, got \"none for \['prunable'"):
        Scores(read.layers).ratios_at(0.4)
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\), got 1"):
        read.ratios_at(1)
