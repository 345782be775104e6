"""Experts that a model keeps as stacks of matrices: told where they are left out, refused by name, kept exactly."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import ZOO, of_zoo
from torch import nn

from lowrank.compression.checkpoint import load_compressed, save_compressed
from lowrank.compression.compress import compress
from lowrank.compression.pruning import prune
from lowrank.io.weights import LeftOutWarning, check_weight, match_stacks
from lowrank.lora.deltas import delta_spectra
from lowrank.nn.targets import find_linears, find_stacks
from lowrank.selection.layer_sizes import layer_sizes
from lowrank.selection.scores import Scores
from lowrank.selection.scoring import ScoringConfig, layer_scores

SIZES: dict[str, Any] = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def qwen() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8))


class Stacked(nn.Module):
    """Experts as one parameter called weight, beside a convolution, whose kernel has three dimensions too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Conv1d(16, 16, 3, padding=1), nn.Module()])
        self.blocks[2].weight = nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x).mT).mT @ self.blocks[2].weight.sum(0)


MIXTURES: dict[str, Callable[[], nn.Module]] = {"mixtral": mixtral, "qwen": qwen, "gpt-oss": gpt_oss}
EXPERTS = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]


def made(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = MIXTURES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # all that a new model leaves as it is in memory
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 60, (8, 20), generator=generator)} for _ in range(2)]


@pytest.mark.parametrize("family", MIXTURES)
def test_compress_says_what_it_leaves_out(family) -> None:
    model = made(family)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    targeted = sum(layer.weight.numel() for layer in find_linears(model).values())
    share = targeted / sum(p.numel() for p in model.parameters())
    with pytest.warns(LeftOutWarning, match=rf"cover {share:.1%} .*: 4 stacks of matrices .*'{EXPERTS[0]}'"):
        result = compress(model, batches(), 0.6, method="whitened", progress=False)
    assert result.share_of_model == pytest.approx(share)
    assert [name for name in result.left_out if ".0." in name] == EXPERTS
    assert len(result.left_out) == 4
    assert f"in scope: {share:.1%}" in str(result)
    assert f"left out: {EXPERTS[0]}: {result.left_out[EXPERTS[0]]}" in str(result)
    assert all(torch.equal(model.state_dict()[name], dense[name]) for name in result.left_out)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_come_back_from_a_file_exactly(family, tmp_path) -> None:
    model, batch = made(family), batches()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # layers that are named leave nothing out
        compress(model, ranks={"model.layers.0.self_attn.q_proj": 4}, method="svd", progress=False)
    save_compressed(model, tmp_path / "saved")
    loaded = load_compressed(tmp_path / "saved")
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_request_for_experts_is_refused_by_name(family) -> None:
    model = made(family)
    for entry in (r".*experts.*", EXPERTS[0], "model.layers.0.mlp.experts"):
        for ask in (find_linears, layer_sizes, lambda m, e: prune(m, 0.5, "magnitude", layers=e)):
            with pytest.raises(ValueError, match=rf"`layers` must match .*{EXPERTS[0]}'"):
                ask(model, [r".*self_attn.*", entry])
        with pytest.raises(ValueError, match=rf"{EXPERTS[0]}', a stack of matrices of shape"):
            compress(model, keep=0.5, method="svd", layers=[entry], progress=False)


@pytest.mark.parametrize("family", MIXTURES)
def test_sizes_scores_and_pruning_say_what_share_they_cover(family, tmp_path) -> None:
    model = made(family)
    count = sum(p.numel() for p in model.parameters())
    with pytest.warns(LeftOutWarning, match="4 stacks"):
        sizes = layer_sizes(model)
    covered = sum(out * inputs for out, inputs in sizes.values())
    assert sizes.share_of_model == pytest.approx(covered / count)
    assert [name for name in sizes.left_out if ".0." in name] == EXPERTS
    config = ScoringConfig(missing="median")
    with pytest.warns(LeftOutWarning, match=f"cover {covered / count:.1%}"):
        scores = layer_scores(model, config=config, progress=False)
    assert scores.settings["share_of_model"] == pytest.approx(covered / count)
    assert scores.settings["left_out"] == list(sizes.left_out)
    scores.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json").settings == scores.settings
    with pytest.warns(LeftOutWarning, match=f"cover {covered / count:.1%}"):
        rows = prune(model, 0.5, "magnitude")
    assert sum(row["share_of_model"] for row in rows) == pytest.approx(covered / count)


@pytest.mark.parametrize("family", ZOO)
def test_every_family_is_told_what_share_is_covered(family) -> None:
    model, _ = of_zoo(family)
    whole = sum(p.numel() for p in model.parameters())
    kernels = (nn.Linear, nn.Conv2d)
    weights = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, kernels)}
    linears = {name: layer.weight.numel() for name, layer in find_linears(model).items()}
    stacks = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name}
    assert bool(stacks) == (family == "Mixtral")
    assert list(find_stacks(model)) == list(stacks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sizes = layer_sizes(model)
        scores = layer_scores(model, config=ScoringConfig(missing="median"), progress=False)
        rows = prune(model, 0.5, "magnitude")
    assert sizes.share_of_model == pytest.approx(sum(weights[name] for name in sizes) / whole)
    assert scores.settings["share_of_model"] == sizes.share_of_model
    assert sum(row["share_of_model"] for row in rows) == pytest.approx(sum(linears.values()) / whole)
    assert linears.keys() <= sizes.keys()
    assert list(sizes.left_out) == scores.settings["left_out"] == list(stacks)
    told = [str(one.message) for one in caught if one.category is LeftOutWarning]
    assert len(told) == (3 if stacks else 0)
    assert all(next(iter(stacks)) in text for text in told)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_file_counts_as_its_names_say(family, tmp_path) -> None:
    """Some families save one matrix per expert and stack them when they load."""
    model = made(family)
    model.save_pretrained(tmp_path / "whole")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tmp_path / "whole" / "model.safetensors").read_bytes())
    asked = [r".*self_attn\.[qkvo]_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)
        stacked = bool(layer_sizes(tmp_path / "whole").left_out)
    if not stacked:
        asked.append(r".*\.experts\..*")
    assert layer_sizes(alone, asked) == layer_sizes(tmp_path / "whole", asked)
    assert len(layer_sizes(tmp_path / "whole", asked)) == 8 + (0 if stacked else 2 * 4 * 3)
    if stacked:
        with pytest.raises(ValueError, match=r"got none for \['.*experts.*'\], but stacks of matrices"):
            layer_sizes(tmp_path / "whole", [r".*experts.*"])
    else:
        with pytest.warns(LeftOutWarning, match="which only one of them has"):
            delta_spectra(tmp_path / "whole", model, progress=False)


def test_a_kernel_is_no_stack_and_a_parameter_called_weight_is() -> None:
    model = Stacked()
    assert find_stacks(model) == {"blocks.2.weight": (3, 16, 16)}
    with pytest.warns(LeftOutWarning, match=r"'blocks.2.weight' of shape \(3, 16, 16\)"):
        assert list(layer_sizes(model, [r"blocks\..*"])) == ["blocks.0", "blocks.1"]


def test_what_counts_as_a_stack() -> None:
    shapes = {
        "a.0.w": (4, 8, 6),
        "a.0.token": (1, 1, 6),
        "a.0.scale": (8, 1, 3),
        "a.0.m": (8, 6),
        "a.0.k": (4, 3, 2, 2),
    }
    assert match_stacks(shapes, [r"a\.0.*"]) == {"a.0.w": (4, 8, 6)}
    assert match_stacks(shapes, ["a.0"]) == {"a.0.w": (4, 8, 6)}
    assert match_stacks(shapes, ["a.0.m", "b"]) == {}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool])
def test_packed_weights_are_refused_by_layer_and_dtype(dtype, tmp_path) -> None:
    weight = torch.randint(0, 2, (16, 8)).to(dtype)
    with pytest.raises(ValueError, match=rf"`model` must have weights in .*layer 'fc'.*got '{dtype}'"):
        check_weight(weight, "fc", "model")
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    file = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    for ask in (
        lambda: compress(model, ranks={"0": 2}, method="svd", progress=False),
        lambda: prune(model, 0.5, "magnitude", layers=["0"]),
        lambda: layer_scores(model, layers=["0"], progress=False),
        lambda: delta_spectra(file, model, ["0", "1"], progress=False),
    ):
        with pytest.raises(ValueError, match=rf"layer '0'.*got '{dtype}'"):
            ask()


def test_a_weight_without_elements_is_named() -> None:
    with pytest.raises(ValueError, match=r"not empty \(layer 'fc'\), got \(0, 8\)"):
        check_weight(torch.empty(0, 8), "fc", "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 0))
    with pytest.raises(ValueError, match=r"not empty \(layer '1'\)"):
        layer_scores(model, layers=[r"\d"], config=ScoringConfig(missing="median"), progress=False)
