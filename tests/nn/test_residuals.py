"""Layers that add their output to hidden states are found by values, in every family."""

from typing import Any

import pytest
import torch
from families import made
from torch import Tensor, nn

from lowrank.nn.batches import run_model
from lowrank.nn.block_calls import Call, capture_calls, without_cache
from lowrank.nn.residuals import find_residuals
from lowrank.nn.targets import find_linears

CPU = torch.device("cpu")
SOURCES = {
    "bert": ("bert.encoder.layer.1", {"attention.output.dense": "", "output.dense": "intermediate"}),
    "llama": ("model.layers.1", {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}),
    "opt": ("model.decoder.layers.1", {"self_attn.out_proj": "", "fc2": "final_layer_norm"}),
    "gpt2": ("transformer.h.1", {"attn.c_proj": "", "mlp.c_proj": "ln_2"}),
    "t5": (
        "decoder.block.1",
        {"layer.0.SelfAttention.o": "", "layer.1.EncDecAttention.o": "layer.1", "layer.2.DenseReluDense.wo": "layer.2"},
    ),
    "vit": ("blocks.1", {"attn.proj": "", "mlp.fc2": "norm2"}),
}


@torch.no_grad()
def found(block: nn.Module, call: Call) -> dict[str, str]:
    return find_residuals(block, call, find_linears(block, [".*"]), CPU)


@pytest.mark.parametrize("family", SOURCES)
@torch.no_grad()
def test_the_layers_that_write_to_hidden_states_are_found(family: str) -> None:
    model, batches, _ = made(family)
    name, expected = SOURCES[family]
    block = model.get_submodule(name)
    with without_cache(model):
        (call,) = capture_calls([block], lambda: run_model(model, batches[0]))
    assert found(block, call) == expected


class Block(nn.Module):
    """A block that adds its layer's output in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.norm, self.layer, self.way = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), way

    def forward(self, x: Tensor, scale: Any = None) -> Tensor:
        y = self.layer(self.inner(self.norm(x)).tanh())
        if self.way == "in place":
            return x.add_(y)
        ways = {"added": x + y, "flat": (x.flatten(0, 1) + y.flatten(0, 1)).view_as(x), "alone": y}
        return (ways | {"scaled": x + 0.1 * y, "wider": torch.cat([x, y], -1), "twice": x + x + y})[self.way]


@pytest.mark.parametrize("way", ["added", "flat", "alone", "scaled", "wider", "twice", "in place"])
def test_only_a_plain_sum_counts(way: str) -> None:
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = {"layer": ""} if way in ("added", "flat") else {}
    assert found(Block(way).eval(), Call((x,), {"scale": None})) == expected
    assert torch.equal(x, torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)))
