"""Names and patterns of layers: what they select, in which order, and what is refused."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.io.weights import match_modules
from lowrank.nn.targets import (
    HEADS_AND_EMBEDDINGS,
    depth_and_kind,
    find_linears,
    find_shared_weights,
    find_weights,
    select_names,
    split_block,
)

NAMES = ["embed", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]


def test_names_are_selected_in_their_order_without_those_excluded() -> None:
    assert select_names(NAMES, [".*"]) == NAMES
    assert select_names(NAMES, ["head", r".*\.up"]) == ["blocks.0.up", "blocks.1.up", "head"]
    assert select_names(NAMES, [".*"], HEADS_AND_EMBEDDINGS) == NAMES[1:-1]
    assert select_names(NAMES, [r"blocks\..*"], ["blocks.0.up", "nowhere"]) == NAMES[2:-1]


def test_entries_that_select_nothing_and_single_strings_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="`include` must match layers of the model, got 'up'; it has: embed, blocks.0.up"
    ):
        select_names(NAMES, ["head", "up"])
    with pytest.raises(ValueError, match="`include` must match layers of the model, got ''; it has: embed"):
        select_names(NAMES, ["head", ""])
    for name, empty in (("include", lambda: select_names(NAMES, [])), ("layers", lambda: find_linears(net, ()))):
        with pytest.raises(ValueError, match=f"`{name}` must hold at least one name or pattern, got ."):
            empty()
    for include, exclude, name in (("head", [], "include"), (["head"], "head", "exclude")):
        with pytest.raises(
            ValueError, match=f"`{name}` must be a list of names or patterns, got the single string 'head'"
        ):
            select_names(NAMES, include, exclude)
    with pytest.raises(ValueError, match=r"`layers` must be Iterable\[str\], got the single string '0'"):
        find_linears(net, "0")
    with pytest.raises(ValueError, match="got 'x'; it has: none at all"):
        find_linears(nn.Sequential(nn.ReLU()), ["x"])


def test_weights_of_attention_have_names_of_their_own() -> None:
    model = nn.ModuleDict(
        {
            "packed": nn.MultiheadAttention(8, 2),
            "apart": nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
            "conv": nn.Conv2d(3, 4, 2),
            "norm": nn.LayerNorm(8),
        }
    )
    shapes = {name: tuple(weight.shape) for name, weight in find_weights(model).items()}
    assert shapes == {
        "packed.in_proj": (24, 8),
        "packed.out_proj": (8, 8),
        "apart.q_proj": (8, 8),
        "apart.k_proj": (8, 4),
        "apart.v_proj": (8, 6),
        "apart.out_proj": (8, 8),
        "conv": (4, 3, 2, 2),
    }
    assert list(find_weights(model, [r".*_proj"], [r"packed\..*"])) == [name for name in shapes if "apart" in name]


def test_shared_weights_are_found_under_all_their_names() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert find_shared_weights(model, layers) == {"1": ["0.weight", "1.weight"]}
    model[1].weight = nn.Parameter(torch.ones(5, 3))
    assert find_shared_weights(model, layers) == {}


@pytest.mark.parametrize(
    ("name", "block", "place", "depth"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3", "mlp.up_proj", 3),
        ("stages.1.blocks.2.mlp.fc1", "stages.1.blocks.2", "mlp.fc1", 1),
        ("model.layers.3.experts.7.up", "model.layers.3", "experts.7.up", 3),
        ("0.up", "0", "up", 0),
        ("head", "", "head", -1),
        ("blocks.11", "", "blocks.11", -1),
    ],
)
def test_a_name_is_split_into_block_and_place(name: str, block: str, place: str, depth: int) -> None:
    assert split_block(name) == (block, place)
    assert depth_and_kind(name) == (depth, place)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("entry", ["*", "blocks.(", "+", "[", "a**", 3, None])
def test_what_is_no_pattern_is_named(entry: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    for argument, call in (
        ("layers", lambda: find_linears(model, [entry])),
        ("include", lambda: select_names(["a"], [entry])),
        ("exclude", lambda: select_names(["a"], ["a"], [entry])),
        ("layers", lambda: match_modules({"a.weight": (2, 2)}, [entry])),
    ):
        said = rf"`{argument}(\[0\])?` must (hold names or regular expressions|be str), got {re.escape(repr(entry))}"
        with pytest.raises(ValueError, match=said):
            call()
