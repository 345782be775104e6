"""Blocks, their stages and what they are called with, in models of several families; and one block alone."""

from collections.abc import Iterable
from typing import Any

import pytest
import timm
import torch
from families import LAYERS, made
from torch import Tensor, nn

from lowrank.nn.batches import Batch, run_model
from lowrank.nn.block_calls import TracedBlock, capture_calls, first_tensor, run_block, trace_blocks, without_cache
from lowrank.nn.targets import BLOCKS, find_linears

CPU = torch.device("cpu")
STAGES = {
    "bert": ("query key value", "output.dense", "intermediate.dense", "output.dense"),
    "llama": ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"),
    "opt": ("q_proj k_proj v_proj", "out_proj", "fc1", "fc2"),
    "gpt2": ("c_attn", "c_proj", "c_fc", "c_proj"),
    "vit": ("attn.qkv", "attn.proj", "fc1", "fc2"),
}


@torch.no_grad()
def traced(model: nn.Module, batches: Iterable[Batch], layers: Iterable[str] = BLOCKS) -> list[TracedBlock]:
    with without_cache(model):
        return trace_blocks(model, batches, find_linears(model, layers))


@pytest.mark.parametrize("family", STAGES)
def test_stages_follow_the_order_of_calls(family: str) -> None:
    model, batches, _ = made(family)
    blocks = traced(model, batches)
    assert len(blocks) == 2
    for block in blocks:
        for stage, expected in zip(block.stages, STAGES[family], strict=True):
            for name, end in zip(stage, expected.split(), strict=True):
                assert name.startswith(f"{block.name}.")
                assert name.endswith(end)
    assert [block.follows for block in blocks] == [False, True]


def test_blocks_with_arguments_of_their_own_do_not_follow() -> None:
    """The first block of T5 finds the position bias that the others are given; the decoder reads the encoder."""
    model, batches, _ = made("t5")
    blocks = traced(model, batches)
    assert [block.name for block in blocks] == [f"{part}.block.{k}" for part in ("encoder", "decoder") for k in (0, 1)]
    assert not any(block.follows for block in blocks)
    cross = [stage for stage in blocks[2].stages if "EncDecAttention" in stage[0]]
    assert [len(stage) for stage in cross] == [1, 2, 1]  # q of the decoder's states, k and v of the encoder's


def test_a_block_behind_one_without_targets_does_not_follow() -> None:
    model = timm.create_model("test_vit", img_size=32, embed_dim=24).eval()
    blocks = traced(model, [torch.randn(2, 3, 32, 32)], [r"blocks\.[0134]\..*"])
    assert [block.follows for block in blocks] == [False, True, False, True]


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
@torch.no_grad()
def test_a_block_alone_does_what_it_does_in_the_model(family: str) -> None:
    model, batches, _ = made(family)
    name = traced(model, batches)[1].name
    block, outputs = model.get_submodule(name), []
    handle = block.register_forward_hook(lambda *args: outputs.append(first_tensor(args[-1])))
    with without_cache(model):
        run_model(model, batches[0])
        handle.remove()
        call = capture_calls([block], lambda: run_model(model, batches[0]))[0]
    before = first_tensor(call).clone()
    for _ in range(2):
        assert torch.equal(run_block(block, call, CPU), outputs[0])
    assert torch.equal(first_tensor(call), before)
    assert torch.equal(first_tensor(call.with_hidden(2 * before)), 2 * before)


@torch.no_grad()
def test_a_pass_stops_where_it_is_told_and_the_cache_is_off_in_between() -> None:
    model, batches, _ = made("llama")
    later: list[Any] = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: later.append(1))
    with without_cache(model):
        norm, mlp = model.model.layers[0].post_attention_layernorm, model.model.layers[0].mlp
        first, call = capture_calls([norm, mlp], lambda: run_model(model, batches[0]))
        assert run_model(model, batches[0]).past_key_values is None
    assert later == [1]  # of the whole pass alone
    assert torch.equal(norm(first_tensor(first)), first_tensor(call))
    assert run_model(model, batches[0]).past_key_values is not None
    with pytest.raises(ValueError, match="`batches` must all reach the same layers"):
        capture_calls([mlp, norm], lambda: run_model(model, batches[0]))


class Turning(nn.Module):
    """A block that calls its layers in an order that the data decide, in place on its input, or one of them twice."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(3, 3), nn.Linear(3, 3), twice

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.a, self.b) if x[0, 0] > 0 else (self.b, self.a)
        x += second(first(x))
        return self.a(x) if self.twice else x


def turning(twice: bool = False) -> nn.Module:
    return nn.Sequential(nn.Sequential(Turning(twice), Turning()), nn.Linear(3, 3))


def test_another_order_another_count_and_layers_outside_blocks_are_refused() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match="run in the same order, got another order .* block '0.0' of batch 1"):
        traced(turning(), [ones, -10 * ones], [r"0\.0\..*"])
    with pytest.raises(ValueError, match=r"call each targeted layer .* once in a pass, got 2 calls of '0.0.a'"):
        traced(turning(twice=True), [ones], [r"0\.0\..*"])
    with pytest.raises(ValueError, match="got 0 calls of"):
        traced(Silent(), [ones], [r"parts\.0\..*"])
    with pytest.raises(ValueError, match="`layers` must lie in numbered blocks, .* got '0', which does not"):
        traced(*made("plain")[:2], LAYERS)
    with pytest.raises(ValueError, match="`batches` must hold at least one batch, got none"):
        traced(turning(), [], [r"0\.0\..*"])


class Silent(nn.Module):
    """A model that never calls its block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Turning()])

    def forward(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def test_a_block_may_work_in_place_on_its_input() -> None:
    block, call = Turning(), None
    call = capture_calls([block], lambda: block(torch.ones(2, 3)))[0]
    first = run_block(block, call, CPU)
    assert torch.equal(run_block(block, call, CPU), first)
    assert torch.equal(first_tensor(call), torch.ones(2, 3))
