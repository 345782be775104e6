"""Models to be timed and what is said of their times: sizes are exact, rows follow from the times, no time is judged."""

from statistics import median
from typing import Any

import pytest
import torch
from pi3_models import TINY, images, model
from torch import Tensor, nn

from lowrank.factorization.rank_allocation import kept_parameters, rank_for_keep
from lowrank.nn.low_rank import LowRankLinear
from lowrank.nn.profiling import count_flops, weight_bytes
from lowrank.nn.targets import find_linears
from lowrank.pi3.flops import pi3_macs
from lowrank.pi3.model import Pi3Config
from lowrank.pi3.speed import TARGETS, build_forward, compare_speed, published_ranks, random_pi3, time_first_pass

CONFIG = Pi3Config(**TINY)
GROUPS = list(TARGETS)
SHAPE = (2, 3, 3, 8, 12)


def parameters(made: nn.Module) -> int:
    return sum(parameter.numel() for parameter in made.parameters())


def factored(made: nn.Module) -> dict[str, int]:
    return {name: layer.rank for name, layer in made.named_modules() if isinstance(layer, LowRankLinear)}


# --- which layers, at which ranks -------------------------------------------------------------------------------------


def test_each_group_of_layers_holds_the_one_before_and_none_the_output_heads() -> None:
    groups = [set(find_linears(model(), TARGETS[name])) for name in GROUPS]
    assert GROUPS == ["decoder", "decoder + encoder", "all linears"]
    assert groups[0] < groups[1] < groups[2]
    decoders = 3 * (4 * CONFIG.head_depth + 2)
    assert [len(group) for group in groups] == [16, 16 + 4, 16 + 4 + decoders]
    everything = set(find_linears(model(), [".*"]))
    assert everything - groups[2] == {name for name in everything if "_head." in name} != set()


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("targets", GROUPS)
def test_ranks_are_the_largest_within_the_share_of_each_layer(targets: str, keep: float, storage: str) -> None:
    made = model()
    linears = find_linears(made, TARGETS[targets])
    ranks = published_ranks(made, targets, keep, storage)
    assert list(ranks) == list(linears)
    for name, layer in linears.items():
        shape = tuple(layer.weight.shape)
        assert kept_parameters(shape, ranks[name], storage) <= keep * layer.weight.numel()
        assert kept_parameters(shape, ranks[name] + 1, storage) > keep * layer.weight.numel()


@pytest.mark.parametrize(
    ("targets", "keep", "words"),
    [
        ("encoder", 0.5, r"`targets` must be one of \['decoder', 'decoder \+ encoder', 'all linears'\], got 'encoder'"),
        ("decoder", 0.0, r"`keep` must be in \(0, 1\], got 0.0"),
        ("decoder", 1.1, r"`keep` must be in \(0, 1\], got 1.1"),
        ("decoder", 0.01, "`keep` must allow rank 1"),
    ],
)
def test_refused_groups_and_shares(targets: str, keep: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        published_ranks(model(), targets, keep)


# --- models of random weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.2, 0.6])
@pytest.mark.parametrize("targets", GROUPS)
def test_a_random_model_has_the_sizes_of_a_compressed_one(targets: str, keep: float) -> None:
    dense = model()
    ranks = published_ranks(dense, targets, keep)
    made, saved = random_pi3(CONFIG, ranks)
    assert factored(made) == ranks
    assert parameters(made) == parameters(dense) - sum(saved.values())
    assert saved == {
        name: layer.weight.numel() - ranks[name] * sum(layer.weight.shape)
        for name, layer in find_linears(dense, list(ranks)).items()
    }
    assert not any(module.training for module in made.modules())
    shots = images(*SHAPE)
    with torch.no_grad():
        found = made(shots)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in dense(shots).items()
    }
    assert all(bool(value.isfinite().all()) for value in found.values())
    macs = [2 * sum(pi3_macs(CONFIG, 3, 8, 12, saved=own).values()) for own in (None, saved)]
    assert count_flops(lambda: dense(shots)) - count_flops(lambda: made(shots)) == 2 * (macs[0] - macs[1])


def test_a_random_model_without_ranks_is_dense() -> None:
    for ranks in (None, {}):
        made, saved = random_pi3(CONFIG, ranks)
        assert saved == {}
        assert list(made.state_dict()) == list(model().state_dict())
        with torch.no_grad():
            assert all(bool(value.isfinite().all()) for value in made(images(*SHAPE)).values())


def test_layers_whose_factors_are_not_smaller_stay_dense() -> None:
    """Of a square layer of 32 a rank of 16 costs as much as the weight, one of 15 less."""
    ranks = {"decoder.0.attn.proj": 16, "decoder.1.attn.proj": 15, "decoder.2.attn.proj": 32}
    made, saved = random_pi3(CONFIG, ranks)
    assert factored(made) == {"decoder.1.attn.proj": 15}
    assert saved == {"decoder.1.attn.proj": 32 * 32 - 15 * 64}
    made, saved = random_pi3(CONFIG, published_ranks(model(), "all linears", 1.0))
    assert (factored(made), saved) == ({}, {})
    assert parameters(made) == parameters(model())


def test_output_heads_stay_dense_where_all_linears_are_compressed() -> None:
    made, _ = random_pi3(CONFIG, published_ranks(model(), "all linears", 0.4))
    for head in (made.point_head, made.conf_head, made.camera_head):
        assert factored(head) == {}
        assert any(isinstance(layer, nn.Linear) for layer in head.modules())
    left = [name for name, layer in find_linears(made, [".*"]).items() if not name.endswith((".left", ".right"))]
    assert {name.partition(".")[0] for name in left} == {"point_head", "conf_head", "camera_head"}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert {value.dtype for value in made(images(*SHAPE)).values()} == {torch.float32}


def test_a_random_model_of_layers_that_are_not_there_is_refused() -> None:
    with pytest.raises(
        ValueError, match="`layers` must match nn.Linear modules of the model, got 'decoder.9.attn.qkv'"
    ):
        random_pi3(CONFIG, {"decoder.9.attn.qkv": 3})
    with pytest.raises(ValueError, match=r"`rank` must be in \[1, 32\]"):
        random_pi3(CONFIG, {"decoder.0.attn.qkv": 33})


# --- times ------------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Remembers how it was called."""

    def __init__(self, name: str, calls: list[tuple[str, Any]], width: int = 4) -> None:
        super().__init__()
        self.name, self.calls, self.layer = name, calls, nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        state = tuple(images.shape), self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        self.calls.append((self.name, state))
        return images


@pytest.mark.parametrize(("precision", "low"), [("fp32", False), ("bf16", True)])
def test_a_pass_is_without_gradients_and_in_the_precision_asked_for(precision: str, low: bool) -> None:
    calls: list[tuple[str, Any]] = []
    run = build_forward(Recorder("a", calls).eval(), torch.rand(SHAPE), precision)
    run()
    assert calls == [("a", (SHAPE, False, False, low))]


@pytest.mark.parametrize(("precision", "low"), [("fp32", False), ("bf16", True)])
def test_models_take_turns_in_the_same_form(precision: str, low: bool) -> None:
    calls: list[tuple[str, Any]] = []
    models = {name: Recorder(name, calls).train() for name in "ab"}
    rows = compare_speed(models, SHAPE, precision, repeats=3, warmup=1)
    assert [row["model"] for row in rows] == ["a", "b"]
    assert [name for name, _ in calls[:8]] == list("abababab")
    assert {state for _, state in calls} == {(SHAPE, False, False, low)}


def test_rows_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"dense": [0.4, 0.1, 0.2, 0.3, 9.0], "small": [0.1, 0.2, 0.1, 0.1, 0.2]}
    asked: list[dict[str, Any]] = []

    def timed(runs: dict[str, Any], **options: Any) -> dict[str, list[float]]:
        asked.append({"names": list(runs)} | options)
        return times

    monkeypatch.setattr("lowrank.pi3.speed.time_in_turns", timed)
    monkeypatch.setattr("lowrank.pi3.speed.peak_bytes", lambda run, device: 5_000_000)
    models = {"dense": Recorder("a", [], 8), "small": Recorder("b", [], 4).half()}
    first, second = compare_speed(models, SHAPE, repeats=5, warmup=7)
    assert asked == [{"names": ["dense", "small"], "repeats": 5, "warmup": 7, "device": torch.device("cpu")}]
    frames, close = SHAPE[0] * SHAPE[1], pytest.approx
    assert first == {
        "model": "dense", "forward_ms": close(300), "spread_ms": close(200), "frames_per_s": close(frames / 0.3),
        "speed_up": 1, "weights_mb": close(4 * 72 / 1e6), "peak_mb": close(5),
    }  # fmt: skip
    assert second == {
        "model": "small", "forward_ms": close(100), "spread_ms": close(100), "frames_per_s": close(frames / 0.1),
        "speed_up": close(3), "weights_mb": close(2 * 20 / 1e6), "peak_mb": close(5),
    }  # fmt: skip
    assert median(times["dense"]) == 0.3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dense_and_compressed_models_are_compared(precision: str) -> None:
    ranks = {name: rank_for_keep((96, 32), 0.2) for name in ("decoder.0.attn.qkv", "decoder.1.attn.qkv")}
    models = {"dense": random_pi3(CONFIG)[0], "compressed": random_pi3(CONFIG, ranks)[0]}
    rows = compare_speed(models, SHAPE, precision, repeats=3, warmup=1)
    assert [row["model"] for row in rows] == ["dense", "compressed"]
    assert rows[0]["speed_up"] == 1
    for row in rows:
        assert all(row[name] > 0 for name in ("forward_ms", "frames_per_s", "speed_up", "weights_mb", "peak_mb"))
        assert row["spread_ms"] >= 0
        assert row["frames_per_s"] == pytest.approx(SHAPE[0] * SHAPE[1] / (row["forward_ms"] / 1e3))
        assert row["speed_up"] == pytest.approx(rows[0]["forward_ms"] / row["forward_ms"])
        assert row["weights_mb"] == pytest.approx(weight_bytes(models[row["model"]]) / 1e6)
    assert rows[1]["weights_mb"] < rows[0]["weights_mb"]


def test_the_first_pass_is_timed_in_another_process() -> None:
    grad = torch.is_grad_enabled()
    seconds = time_first_pass(CONFIG, published_ranks(model(), "decoder", 0.5), (1, 2, 3, 8, 8))
    assert isinstance(seconds, float)
    assert seconds > 0
    assert torch.is_grad_enabled() is grad  # which a pass of this process would have turned off
