"""Costs of π³ by formula against operations counted by torch, the published sizes, and ceilings of what compression gains."""

from typing import Any

import pytest
import torch
from pi3_models import images, model

from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import replace_layers
from lowrank.nn.profiling import count_flops
from lowrank.nn.targets import find_linears
from lowrank.pi3.flops import ATTENTION_PARTS, LINEAR_PARTS, find_part, pi3_macs, saved_parameters
from lowrank.pi3.model import Pi3, Pi3Config
from lowrank.pi3.speed import TARGETS, published_ranks, random_pi3

GIGA, TERA = 1e9, 1e12
SHAPES = [(1, 1, 16, 24), (2, 3, 24, 16), (1, 4, 8, 32), (3, 2, 8, 8)]  # scenes, views, height, width
CHANGES: list[dict[str, Any]] = [
    {},
    {"head_dim": 48, "head_depth": 3, "head_heads": 4},
    {"point_out": 20, "camera_out": 7},
    {"encoder_registers": 0, "decoder_registers": 0},
    {"encoder_registers": 5, "decoder_registers": 1, "encoder_depth": 3},
    {"patch_size": 8, "decoder_depth": 2},
    {"mlp_ratio": 2, "encoder_dim": 48, "decoder_dim": 48},
]


def counted(made: Pi3, scenes: int, views: int, height: int, width: int) -> float:
    shots = images(scenes, views, 3, height, width)
    return count_flops(lambda: made(shots)) / 2


def rotations(scenes: int, views: int) -> int:
    """What the formula leaves out: two products of 3 x 3 for the rotation of each view."""
    return scenes * views * 2 * 27


# --- against operations as torch counts them --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: ",".join(changes) or "tiny")
def test_the_formula_counts_what_is_computed(changes: dict[str, Any], shape: tuple[int, int, int, int]) -> None:
    made, (scenes, views, height, width) = model(**changes), shape
    total = scenes * sum(pi3_macs(made.config, views, height, width).values())
    found = counted(made, *shape)
    assert total == pytest.approx(found, rel=1e-2)
    assert found - total == rotations(*shape[:2])


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("targets", TARGETS)
def test_a_compressed_model_computes_less_by_what_it_saves(targets: str, keep: float, storage: str) -> None:
    made, shape = model(encoder_registers=5), (2, 2, 16, 12)
    saved = saved_parameters(replace_layers(made, published_ranks(made, targets, keep), Configuration("svd", storage)))
    assert sum(saved.values()) > 0
    total = 2 * sum(pi3_macs(made.config, 2, 16, 12, saved=saved).values())
    assert counted(made, *shape) - total == rotations(*shape[:2])


def test_layers_that_stay_dense_save_nothing() -> None:
    made = model()
    rows = replace_layers(made, {"decoder.0.attn.proj": 32, "decoder.1.attn.proj": 5}, "svd")
    assert saved_parameters(rows) == {"decoder.0.attn.proj": 0, "decoder.1.attn.proj": 32 * 32 - 5 * 64}


def test_savings_count_in_the_part_of_their_layer_for_each_of_its_tokens() -> None:
    config = model(encoder_registers=5).config
    layers = {"encoder.blocks.0.mlp.fc1": 0, "decoder.3.attn.qkv": 1, "camera_decoder.linear_out": 2}
    dense = pi3_macs(config, 2, 8, 12)
    for layer, index in layers.items():
        less = pi3_macs(config, 2, 8, 12, saved={layer: 100})
        tokens = 2 * (6 + (1 + config.encoder_registers if index == 0 else config.decoder_registers))
        assert dense[LINEAR_PARTS[index]] - less[LINEAR_PARTS[index]] == 100 * tokens
        assert {name for name in dense if dense[name] != less[name]} == {LINEAR_PARTS[index]}


@pytest.mark.parametrize("index", range(3))
def test_each_group_of_layers_adds_one_part(index: int) -> None:
    names = find_linears(model(), list(TARGETS.values())[index])
    assert {find_part(name) for name in names} == set(
        ("decoder linears", "encoder linears", LINEAR_PARTS[2])[: index + 1]
    )


# --- the published size -----------------------------------------------------------------------------------------------


def test_parts_of_a_video_at_the_published_size() -> None:
    parts = {name: macs / GIGA for name, macs in pi3_macs(Pi3Config(), 11, 490, 518).items()}
    assert parts.pop("points") * GIGA == pytest.approx(11 * 490 * 518 * 9)
    assert parts == pytest.approx(
        {
            "patch embedding": 8.6,
            "encoder linears": 4318.5,
            "encoder attention": 913.7,
            "decoder linears": 6477.7,
            "frame attention": 685.3,
            "global attention": 7538.3,
            "head decoder linears": 2826.5,
            "head attention": 571.1,
            "heads": 33.9,
        },
        abs=0.1,
    )
    assert sum(parts.values()) == pytest.approx(23373, abs=1)
    assert sum(parts[name] for name in ATTENTION_PARTS) / sum(parts.values()) == pytest.approx(0.415, abs=1e-3)


# views, height, width, 10^12 operations, ceilings of decoder / and encoder / all linears at 0.2, 0.5, 0.8
CEILINGS = [
    (1, 224, 224, 0.52, [(1.57, 1.29, 1.10), (2.54, 1.61, 1.18), (4.30, 1.92, 1.24)]),
    (1, 224, 504, 1.21, [(1.53, 1.28, 1.09), (2.37, 1.57, 1.17), (3.72, 1.84, 1.22)]),
    (2, 518, 490, 6.26, [(1.43, 1.23, 1.08), (2.01, 1.46, 1.14), (2.74, 1.66, 1.19)]),
    (11, 518, 490, 46.75, [(1.28, 1.16, 1.06), (1.59, 1.30, 1.10), (1.88, 1.41, 1.13)]),
    (30, 392, 518, 139.2, [(1.19, 1.11, 1.04), (1.37, 1.20, 1.07), (1.52, 1.27, 1.09)]),
    (50, 224, 504, 121.7, [(1.21, 1.12, 1.05), (1.41, 1.22, 1.08), (1.57, 1.30, 1.10)]),
    (100, 378, 672, 1536, [(1.07, 1.04, 1.02), (1.11, 1.07, 1.03), (1.15, 1.09, 1.03)]),
]


@pytest.mark.parametrize(("views", "height", "width", "operations", "ceilings"), CEILINGS)
def test_totals_and_ceilings_of_the_published_size(
    views: int, height: int, width: int, operations: float, ceilings: list[tuple[float, ...]]
) -> None:
    parts = pi3_macs(Pi3Config(), views, height, width)
    total = sum(parts.values())
    assert 2 * total / TERA == pytest.approx(operations, abs=0.005, rel=4e-4)
    groups = (
        ("decoder linears",),
        ("decoder linears", "encoder linears"),
        (*LINEAR_PARTS, "heads"),
    )  # published: all of them
    for group, row in zip(groups, ceilings, strict=True):
        for keep, ceiling in zip((0.2, 0.5, 0.8), row, strict=True):
            left = total - (1 - keep) * sum(parts[name] for name in group)
            assert total / left == pytest.approx(ceiling, abs=0.01)


RANKS = {0.8: (614, 409, 655), 0.6: (460, 307, 491), 0.5: (384, 256, 409), 0.4: (307, 204, 327)}
RANKS |= {0.3: (230, 153, 245), 0.2: (153, 102, 163), 0.1: (76, 51, 81)}
PARAMETERS = {0.8: 867_863_836, 0.6: 777_178_396, 0.5: 731_983_132, 0.4: 686_566_684}
PARAMETERS |= {0.3: 641_223_964, 0.2: 595_881_244, 0.1: 550_538_524}
MACS = {0.8: 225.69, 0.6: 202.02, 0.5: 190.23, 0.4: 178.37, 0.3: 166.54, 0.2: 154.70, 0.1: 142.87}  # published, 10^9


@pytest.fixture(scope="module")
def dense() -> Pi3:
    """The published size, without memory."""
    with torch.device("meta"):
        return Pi3()


@pytest.mark.parametrize("keep", RANKS)
def test_ranks_parameters_and_costs_of_the_published_compressed_models(keep: float, dense: Pi3) -> None:
    ranks = published_ranks(dense, "decoder", keep)
    qkv, proj, hidden = RANKS[keep]
    assert len(ranks) == 144
    for block in range(36):
        names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        assert [ranks[f"decoder.{block}.{name}"] for name in names] == [qkv, proj, hidden, hidden]
    made, saved = random_pi3(Pi3Config(), ranks, "meta")
    assert sum(parameter.numel() for parameter in made.parameters()) == PARAMETERS[keep]
    assert sum(parameter.numel() for parameter in dense.parameters()) - sum(saved.values()) == PARAMETERS[keep]
    parts = pi3_macs(Pi3Config(), 1, 224, 224, saved=saved)
    assert sum(macs for name, macs in parts.items() if name not in ATTENTION_PARTS) / GIGA == pytest.approx(
        MACS[keep], abs=0.006
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 15}, "`height` must be a multiple of 4, got 15"),
        ({"height": 0}, "`height` must be a multiple of 4, got 0"),
        ({"width": 6}, "`width` must be a multiple of 4, got 6"),
        ({"width": -4}, "`width` must be a multiple of 4, got -4"),
        ({"views": 0}, "`views` must be >= 1, got 0"),
        ({"saved": {"point_head.proj": 5}}, "`layer` must be of one of .*, got 'point_head.proj'"),
        ({"saved": {"register_token": 5}}, "`layer` must be of one of .*, got 'register_token'"),
    ],
)
def test_refused_sizes_and_layers(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pi3_macs(model().config, **{"views": 1, "height": 8, "width": 8} | changes)
