"""Retargeted compression: closer to the dense model than without, resumable, and refusals that change nothing."""

import copy
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, made, outputs, ranks_of, relative
from torch import Tensor, nn

import lowrank.compression.retarget as module_under_test
from lowrank import (
    Configuration,
    OnDemand,
    Retargeting,
    collect_statistics,
    compress,
    fold,
    load_compressed,
    replace_layers,
    save_compressed,
)
from lowrank.compression.retarget import retarget_layers
from lowrank.compression.streams import Streams, replaced
from lowrank.factorization.methods import METHODS
from lowrank.factorization.storages import STORAGES
from lowrank.io.hashing import hash_model
from lowrank.nn.batches import Batch, as_double
from lowrank.nn.block_calls import first_tensor
from lowrank.nn.low_rank import FACTORED_LAYERS


class Tanh(nn.Module):
    """A block: two layers around a tanh, added to the stream."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Stack(nn.Module):
    """Blocks in a row."""

    def __init__(self, blocks: int = 5, kind: Callable[..., nn.Module] = Tanh, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(kind(8, 12, **options) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def stack(blocks: int = 5, kind: Callable[..., nn.Module] = Tanh, **options: Any) -> tuple[Any, list[Tensor]]:
    """A model in float64 and batches whose inputs have means."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Stack(blocks, kind, **options).double().eval()
        return model, [torch.randn(4, 25, 8).double() + 0.5 for _ in range(4)]


def more(family: str, count: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [as_double(FAMILIES[family][1](generator)) for _ in range(count)]


def squeeze(model: nn.Module, batches: Any, retarget: Any = True, keep: float = 0.5, **options: Any) -> Any:
    return compress(model, batches, keep, progress=False, retarget=retarget, **options)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_each_layer_is_the_least_squares_optimum_on_the_inputs_that_it_has(bias: bool, residual: bool) -> None:
    """The last layer is the best of its rank among regressions of dense outputs on the inputs that are left to it."""
    model, batches = stack(2, bias=bias)
    dense, seen = copy.deepcopy(model), {}
    ranks = {"blocks.0.up": 4, "blocks.0.down": 4, "blocks.1.up": 4, "blocks.1.down": 4}
    options = Retargeting(ridges=(1e-12,), blends=(1.0,), residual=residual)
    configuration = Configuration("whitened", centre=bias, retarget=options)
    rows = retarget_layers(model, ranks, configuration, collect_statistics(model, batches, ranks), batches)
    for name, which in (("dense", dense), ("now", model)):
        for part in ("up", "down"):
            hook = lambda _, args, key=(name, part): seen.setdefault(key, []).append(args[0])  # noqa: E731
            getattr(which.blocks[1], part).register_forward_pre_hook(hook)
        outputs(which, batches)
    (s, x), (own, now) = (
        [torch.cat(seen[name, part]).flatten(0, 1) for part in ("up", "down")] for name in ("dense", "now")
    )
    wanted = nn.functional.linear(x, dense.blocks[1].down.weight.detach()) + (s - own if residual else 0)
    centred = lambda t: t - t.mean(0) if bias else t  # noqa: E731
    free = torch.linalg.lstsq(centred(now), centred(wanted)).solution.T
    u = torch.linalg.svd(free @ centred(now).T, full_matrices=False).U[:, :4]
    expected = u @ u.T @ free  # weights may differ where the inputs say nothing
    assert relative(centred(now) @ model.blocks[1].down.dense().T, centred(now) @ expected.T) <= 1e-5
    if bias:  # the mean is restored exactly: that of the layer's output, or that of the hidden states behind it
        assert relative(model.blocks[1].down(now).mean(0), wanted.mean(0) + dense.blocks[1].down.bias) <= 1e-10
    assert [row["layer"] for row in rows] == list(ranks)
    assert all(row["predicted_error"] == pytest.approx(row["measured_error"], abs=1e-9) for row in rows)
    assert [(row["ridge"], row["blend"]) for row in rows] == [(None, None)] + [(1e-12, 1.0)] * 3
    assert [row["residual"] for row in rows] == [False, residual, False, residual]


@pytest.mark.parametrize("storage", STORAGES)
def test_with_nothing_compressed_in_front_it_is_plain_compression(storage: str) -> None:
    model, batches, statistics = made("llama")
    plain = copy.deepcopy(model)
    first = {name: 4 for name in ranks_of(model) if "layers.0.self_attn.q" in name or "layers.0.self_attn.v" in name}
    how = Configuration("two_sided", storage)
    rows = replace_layers(plain, first, how, statistics)
    found = retarget_layers(model, first, Configuration("two_sided", storage, retarget=True), statistics, batches)
    assert hash_model(model) == hash_model(plain)
    assert found == [row | {"ridge": None, "blend": None, "residual": False} for row in rows]


def test_repairing_hidden_states_comes_closer_still() -> None:
    errors = []
    for residual in (False, True):
        model, batches = stack(6)
        dense = copy.deepcopy(model)
        squeeze(model, batches, Retargeting(residual=residual), keep=0.5, method="whitened")
        new = [torch.randn(8, 25, 8, generator=torch.Generator().manual_seed(9)).double() + 0.5]
        errors.append(relative(outputs(model, new), outputs(dense, new)))
    assert errors[1] < 0.8 * errors[0]


def test_a_blend_of_zero_keeps_the_weights_as_targets() -> None:
    model, batches = stack(2)
    plain, ranks = copy.deepcopy(model), ranks_of(model)
    statistics = collect_statistics(model, batches, ranks)
    retarget_layers(model, ranks, Configuration("svd", retarget=Retargeting(blends=(0.0,))), statistics, batches)
    replace_layers(plain, ranks, "svd", statistics)
    for name in ranks:
        assert relative(model.get_submodule(name).dense(), plain.get_submodule(name).dense()) <= 1e-12


@pytest.mark.parametrize("family", ["bert", "llama", "opt", "gpt2", "t5", "vit"])
def test_it_comes_closer_to_the_dense_model_on_new_data(family: str) -> None:
    model, _, _ = made(family, torch.float64)
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    batches, new = more(family, 16, 5), more(family, 4, 6)
    options = dict(layers=LAYERS, keep=0.3, method="whitened")
    result = squeeze(model, batches, **options)
    squeeze(plain, batches, None, **options)
    for data in (batches, new):
        wanted = outputs(dense, data)
        assert relative(outputs(model, data), wanted) < relative(outputs(plain, data), wanted)
    assert {row["ridge"] for row in result.layers} - {None} <= set(Retargeting().ridges)
    assert any(row["blend"] == 1.0 for row in result.layers)
    assert "retargeted" in str(result)


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_storage_and_centring_runs(method: str, storage: str, centre: bool) -> None:
    model, batches, statistics = made("bert", torch.float64)
    ranks = ranks_of(model, 0.5, storage)
    configuration = Configuration(method, storage, centre, retarget=True)
    rows = retarget_layers(model, ranks, configuration, statistics, batches)
    for row in rows:
        assert type(model.get_submodule(row["layer"])) is FACTORED_LAYERS[storage]
        assert row["predicted_error"] == pytest.approx(row["measured_error"], abs=1e-9)
    assert torch.isfinite(outputs(model, batches)).all()


@pytest.mark.parametrize("allocation", ["uniform", "spectrum"])
def test_ranks_are_those_of_the_dense_model(allocation: str) -> None:
    model, batches, statistics = made("llama")
    plain = copy.deepcopy(model)
    options = dict(statistics=statistics, allocation=allocation)
    result = squeeze(model, batches, **options)
    assert result.ranks == squeeze(plain, batches, None, **options).ranks
    assert result.keep_targeted <= 0.5
    assert result.configuration.retarget == Retargeting()


def test_padding_does_not_count() -> None:
    model, batches, statistics = made("bert")
    other = copy.deepcopy(model)
    changed = [
        batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 1)} for batch in batches
    ]
    for which, data in ((model, batches), (other, changed)):
        squeeze(which, data, statistics=statistics)
    for name in ranks_of(made("bert")[0]):
        assert relative(model.get_submodule(name).dense(), other.get_submodule(name).dense()) <= 1e-4


@pytest.mark.usefixtures("unchecked")  # a check of the argument afterwards would collect from the compressed model
def test_without_statistics_and_with_statistics_on_demand() -> None:
    model, batches, statistics = made("llama")
    demanded, plain = copy.deepcopy(model), copy.deepcopy(model)
    squeeze(plain, batches, method="svd")
    assert torch.isfinite(outputs(plain, batches)).all()
    squeeze(model, batches, method="whitened", statistics=statistics)
    ranks = {name: model.get_submodule(name).rank for name in ranks_of(demanded)}
    how = Configuration("whitened", "pivoted", retarget=True)
    retarget_layers(demanded, ranks, how, OnDemand(demanded, batches), batches)
    assert hash_model(demanded) == hash_model(model)


def test_layers_that_would_not_shrink_stay_and_are_measured_no_further() -> None:
    model, batches = stack(3)
    ranks = ranks_of(model) | {"blocks.1.up": 8, "blocks.1.down": 8}
    kept = model.blocks[1].up.weight
    rows = {
        row["layer"]: row
        for row in retarget_layers(
            model, ranks, Configuration(retarget=True), collect_statistics(model, batches, ranks), batches
        )
    }
    assert model.blocks[1].up.weight is kept
    assert (rows["blocks.1.up"]["storage"], rows["blocks.1.up"]["ridge"]) == ("dense", None)
    assert rows["blocks.2.up"]["ridge"] is not None


def test_modes_gradients_and_the_cache_are_as_before(tmp_path: Path) -> None:
    model, batches, statistics = made("llama")
    name = "model.layers.1.mlp.up_proj"
    model.get_submodule(name).train().requires_grad_(False)
    result = squeeze(model, batches, statistics=statistics)
    assert model.get_submodule(name).training
    assert not any(p.requires_grad for p in model.get_submodule(name).parameters())
    assert not model.get_submodule("model.layers.1.mlp.down_proj").training
    assert model.config.use_cache
    save_compressed(model, tmp_path / "small")
    again = load_compressed(tmp_path / "small")
    assert torch.equal(outputs(again, batches), outputs(model, batches))
    assert again.lowrank_record["layers"][name]["ridge"] == {r["layer"]: r for r in result.layers}[name]["ridge"]
    assert fold(model) is model


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_blocks_run_alone_and_only_one_input_of_each_stream_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = stack(5)
    calls: dict[int, int] = {}
    for place, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, place=place: calls.update({place: calls.get(place, 0) + 1}))
    before: list[weakref.ref[Tensor]] = []
    move = Streams.move_to

    def watched(self: Streams, block: Any) -> None:
        move(self, block)
        assert not any(old() is not None for old in before)
        before[:] = [weakref.ref(first_tensor(call)) for call in (*self.dense, *self.compressed)]
        assert len(before) == 2 * len(batches)

    monkeypatch.setattr(Streams, "move_to", watched)
    ranks = ranks_of(model)
    statistics = collect_statistics(model, batches, ranks)
    calls.clear()
    retarget_layers(model, ranks, Configuration(retarget=True), statistics, batches)
    # For each batch one pass to find the order, and in each stream one for each of two stages and one on to the next block; the
    # first stage is not measured, but the first block is reached once more in each stream. And once a look at what is added.
    assert [count - 1 for count in calls.values()] == [
        len(batches) * count for count in (1 + 6, 1 + 6, 1 + 6, 1 + 6, 1 + 4)
    ]


# --- a run that is stopped --------------------------------------------------------------------------------------------


def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Stop after so many layers; the list returned names those that are made."""
    build, names = module_under_test.build_replacement, []

    def stop(name: str, *args: Any) -> Any:
        if len(names) == after:
            raise KeyboardInterrupt
        names.append(name)
        return build(name, *args)

    monkeypatch.setattr(module_under_test, "build_replacement", stop)
    return names


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_stopped_run_goes_on_and_gives_the_same_bits(
    family: str, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches, statistics = made(family)
    through, state = copy.deepcopy(model), hash_model(model)
    options = dict(statistics=statistics, storage=storage)
    expected = squeeze(through, batches, **options)
    place = Retargeting(folder=tmp_path / "blocks")
    with monkeypatch.context() as patch:
        stopping(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            squeeze(model, batches, place, **options)
    assert hash_model(model) == state
    assert len(list((tmp_path / "blocks").glob("*.safetensors"))) == 1
    names = stopping(monkeypatch, 10**6)
    result = squeeze(model, batches, place, **options)
    assert len(names) == len(result.layers) - 7 + (family != "llama")  # the first block was read
    assert result.layers == expected.layers
    assert hash_model(model) == hash_model(through)
    names.clear()
    last = made(family)[0]
    squeeze(last, batches, place, **options)
    assert names == []
    assert hash_model(last) == hash_model(through)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    model, batches, statistics = made("llama")
    ranks, place = ranks_of(model), Retargeting(folder=tmp_path / "blocks")

    def again(which: nn.Module, data: Any = batches, how: Any = place, method: str = "whitened", **other: Any) -> None:
        use = ranks | other
        retarget_layers(which, use, Configuration(method, retarget=how), statistics, data)

    again(copy.deepcopy(model))
    state = hash_model(model)
    others: list[tuple[str, dict[str, Any]]] = [
        ("batches", dict(data=batches[::-1])),
        ("ranks", {next(iter(ranks)): 3}),
        ("configuration", dict(method="two_sided")),
        ("configuration", dict(how=Retargeting(ridges=(0.5,), folder=place.folder))),
    ]
    for named, changes in others:
        with pytest.raises(ValueError, match=f"`folder` must hold blocks of this run: not with other {named}, got"):
            again(model, **changes)
    statistics |= collect_statistics(model, batches[:1])
    with pytest.raises(ValueError, match="not with other statistics"):
        again(model)
    other = made("llama")[0]
    other.model.layers[0].mlp.up_proj.weight.data += 1e-3
    with pytest.raises(ValueError, match="not with other model, statistics"):
        again(other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="`folder` must be new, empty or that of a run which was stopped"):
        again(model, how=Retargeting(folder=tmp_path / "mine"))
    statistics |= made("llama")[2]
    file = tmp_path / "blocks" / "model.layers.0.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="`folder` must be a whole safetensors file"):
        again(model)
    assert hash_model(model) == state


# --- bad input changes nothing ----------------------------------------------------------------------------------------


def is_factored(layer: nn.Module) -> bool:
    """Tell a compressed layer by its rank: no trial before the compression can see what a model does with that."""
    return hasattr(layer, "rank")


class Fragile(Tanh):
    """A block whose output is NaN once its first layer is compressed."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * torch.nan if is_factored(self.up) else y


class Routed(Tanh):
    """A block that leaves tokens out by a rule that compression of its first layer changes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).tanh()
        return x + self.down(y[:1] if is_factored(self.up) else y).sum()


class Turning(Tanh):
    """A block that takes its layers twice for some data."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x) if x[0, 0, 0] > 1e3 else x)


def test_a_fault_in_a_late_block_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, batches = stack(5)
    with torch.random.fork_rng():
        model.blocks[2] = Fragile(8, 12).double().eval()
    statistics, kinds = collect_statistics(model, batches), [type(module) for module in model.modules()]
    state = hash_model(model)
    with pytest.raises(ValueError, match="finite activations, got NaN or infinity in layer 'blocks.3.up'"):
        squeeze(model, batches, statistics=statistics)
    assert hash_model(model) == state
    assert [type(module) for module in model.modules()] == kinds
    assert not hasattr(model, "lowrank_record")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            Tanh,
            dict(batches="generator"),
            "`batches` must be a list or a loader to retarget layers, which reads them more",
        ),
        (Tanh, dict(batches=None), "`batches` must be a list or a loader to retarget layers"),
        (Tanh, dict(batches=[]), "`batches` must hold at least one batch, got none"),
        (
            Turning,
            dict(batches="odd"),
            "`model` must call each targeted layer and its block once in a pass, got 2 calls",
        ),
        (Routed, {}, "must receive the same tokens in the dense and the compressed model, got 100 and 25"),
        (Tanh, dict(retarget="yes"), r"`retarget` must be Retargeting \| bool \| None, got 'yes'"),
        (Tanh, dict(batches="single"), "hold at least two tokens in one batch"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_changes_nothing(kind: type[nn.Module], options: dict[str, Any], message: str) -> None:
    model, batches = stack(3, kind)
    statistics, state = collect_statistics(model, batches), hash_model(model)
    forms = {
        "generator": (batch for batch in batches),
        "odd": [*batches, 1e4 + batches[0]],
        "single": [batch[:1, :1] for batch in batches],
    }
    given = options.get("batches", batches)
    given = forms.get(given, given) if isinstance(given, str) else given
    with pytest.raises(ValueError, match=message):
        squeeze(model, given, options.get("retarget", True), statistics=statistics)
    assert hash_model(model) == state


def test_a_model_without_blocks_and_steps_out_of_place_are_refused() -> None:
    model, batches, statistics = made("plain")
    state = hash_model(model)
    with pytest.raises(ValueError, match="`layers` must lie in numbered blocks"):
        squeeze(model, batches, statistics=statistics, layers=LAYERS)
    ranks = dict.fromkeys(statistics, 2)
    with pytest.raises(ValueError, match="be None for layers that are replaced on their own: see `retarget_layers`"):
        replace_layers(model, ranks, Configuration(retarget=True), statistics)
    with pytest.raises(ValueError, match=r"`configuration.retarget` must be a Retargeting, got None"):
        retarget_layers(model, ranks, Configuration(), statistics, batches)
    assert hash_model(model) == state


@pytest.mark.parametrize(
    "options",
    [
        dict(ridges=()),
        dict(ridges=(0.0,)),
        dict(ridges=(float("inf"),)),
        dict(ridges=(float("nan"),)),
        dict(blends=()),
        dict(blends=(1.5,)),
        dict(blends=(-0.1,)),
        dict(held_out=0.0),
        dict(held_out=1.0),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
        Retargeting(**options)


def test_modules_are_put_back_after_an_error() -> None:
    model, _ = stack(1)
    before = model.blocks[0].up
    with pytest.raises(RuntimeError, match="stop"), replaced(model, {"blocks.0.up": nn.Identity()}):
        assert isinstance(model.blocks[0].up, nn.Identity)
        raise RuntimeError("stop")
    assert model.blocks[0].up is before


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = stack(2)
    statistics = collect_statistics(model, batches)
    for progress, which in itertools.zip_longest((True, False), (model, copy.deepcopy(model))):
        compress(which, batches, 0.5, statistics=statistics, retarget=True, progress=progress)
        shown = capsys.readouterr().err
        assert ("retarget" in shown, "order of layers" in shown) == (progress, progress)
