"""`compress` in one call: within budget in every family, better than plain SVD, and refusals that change nothing."""

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, REPLACED, SMALL, ZOO, cast, made, of_zoo, outputs, relative
from torch import nn

from lowrank import CompressionResult, Configuration, collect_statistics, compress, replace_layers
from lowrank.calibration.predictive_loss import predictive_loss
from lowrank.io.hashing import hash_model
from lowrank.nn.nests import list_tensors
from lowrank.nn.profiling import weight_bytes
from lowrank.nn.targets import find_linears


def compressed(family: str, **options: Any) -> tuple[nn.Module, nn.Module, list[Any], CompressionResult]:
    model, batches, _ = made(family)
    dense = copy.deepcopy(model)
    result = compress(model, batches, layers=LAYERS, progress=False, **{"keep": 0.6} | options)
    return model, dense, batches, result


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_compressed_within_the_budget(family: str) -> None:
    model, dense, batches, result = compressed(family)
    assert torch.isfinite(outputs(model, batches)).all()
    assert 0.5 < result.keep_targeted <= 0.6
    targeted = find_linears(dense, LAYERS)
    assert list(result.ranks) == list(targeted)
    assert result.before.targeted == sum(layer.weight.numel() for layer in targeted.values())
    assert result.before.model == sum(p.numel() for p in dense.parameters())
    assert result.after.model == sum(p.numel() for p in model.parameters())
    assert result.before.model - result.after.model == result.before.targeted - result.after.targeted
    assert (result.before.bytes, result.after.bytes) == (weight_bytes(dense), weight_bytes(model))
    for row in result.layers:
        assert row["measured_error"] == pytest.approx(row["predicted_error"], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("family", SMALL)
def test_the_default_changes_outputs_less_than_plain_svd(family: str) -> None:
    changes = []
    for options in ({}, {"method": "svd"}):
        model, dense, batches, _ = compressed(family, keep=0.4, **options)
        after, before = outputs(model, batches), outputs(dense, batches)
        if family in ("bert", "llama", "opt", "gpt2", "t5", "vit"):
            after, before = after.log_softmax(-1), before.log_softmax(-1)
            changes.append(float((before.exp() * (before - after)).sum(-1).mean()))
        else:
            changes.append(float((before - after).square().mean()))
    assert changes[0] < changes[1]


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.filterwarnings("ignore::lowrank.io.weights.LeftOutWarning")
def test_low_precision_costs_no_more_after_compression_than_before(family: str) -> None:
    """Also with pivots, whose other outputs are computed from the kept ones."""
    dense, batches = of_zoo(family)
    low, wanted = cast(batches, torch.bfloat16), outputs(dense, batches)
    before = relative(outputs(copy.deepcopy(dense).bfloat16(), low), wanted)
    for storage in ("factors", "pivoted"):
        options: dict[str, Any] = dict(keep=0.6, method="whitened", storage=storage, progress=False)
        exact, rounded = copy.deepcopy(dense), copy.deepcopy(dense).bfloat16()
        compress(exact, batches, **options)
        compress(rounded, low, **options)
        assert relative(outputs(rounded, low), outputs(exact, batches)) < 5 * before


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.filterwarnings("ignore::lowrank.io.weights.LeftOutWarning")
def test_a_nan_is_named_and_changes_nothing(family: str) -> None:
    model, batches = of_zoo(family)
    names = list(find_linears(model, REPLACED[family]))
    spoilt = names[len(names) // 2]
    weight = model.get_submodule(spoilt).weight.data
    kept, weight[0, -1] = weight[0, -1].item(), torch.nan
    options: tuple[dict[str, Any], ...] = ({"batches": batches}, {"method": "svd"})
    for given in options:
        assert_refused(model, f"NaN or infinity in layer '{spoilt}'", **given)
    weight[0, -1] = kept
    batches = copy.deepcopy(batches)
    if numbers := [tensor for tensor in list_tensors(batches) if tensor.is_floating_point()]:
        numbers[0][0].fill_(torch.nan)
    else:  # numbers of tokens are finite, but what they stand for may not be
        next(m for m in model.modules() if isinstance(m, nn.Embedding)).weight.data[1:].fill_(torch.nan)
    assert_refused(model, rf"`batches` must .*({'|'.join(names)})", batches=batches)


def assert_refused(model: nn.Module, words: str, **options: Any) -> None:
    before, modules = hash_model(model), dict(model.named_modules())
    with pytest.raises(ValueError, match=words):
        compress(model, keep=0.5, progress=False, **options)
    assert hash_model(model) == before
    assert dict(model.named_modules()) == modules


def test_the_result_prints_as_a_table_with_totals() -> None:
    _, _, _, result = compressed("llama")
    lines = str(result).splitlines()
    assert lines[0].split()[:6] == ["layer", "out", "in", "rank", "storage", "keep"]
    assert [line.split()[0] for line in lines[1 : 1 + len(result.layers)]] == list(result.ranks)
    assert repr(result) == str(result)
    for size, before, after in (
        ("14 targeted layers", result.before.targeted, result.after.targeted),
        ("whole model", result.before.model, result.after.model),
        ("whole model", result.before.bytes, result.after.bytes),
    ):
        assert any(line.startswith(f"{size}: {before:,} -> {after:,} ({after / before:.1%})") for line in lines)


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({}, Configuration("two_sided", "pivoted", True, "spectrum")),
        ({"method": "whitened"}, Configuration("whitened", "pivoted", True, "uniform")),
        ({"method": "svd"}, Configuration("svd", "pivoted", False, "uniform")),
        ({"storage": "factors", "centre": False}, Configuration("two_sided", "factors", False, "spectrum")),
        ({"method": "whitened", "allocation": "spectrum"}, Configuration("whitened", "pivoted", True, "spectrum")),
        ({"allocation": "uniform"}, Configuration("two_sided", "pivoted", True, "uniform")),
    ],
)
def test_each_choice_can_be_overridden(choices: dict[str, Any], expected: Configuration) -> None:
    *_, result = compressed("bert", **choices)
    assert result.configuration == expected
    assert {row["storage"] for row in result.layers} - {"dense"} == {expected.storage}
    assert result.keep_targeted <= 0.6


def test_it_is_the_strict_form_with_statistics_and_ranks_of_its_own() -> None:
    model, dense, batches, result = compressed("bert")
    options = {"loss": predictive_loss(), "side": "smaller", "methods": ["two_sided"]}
    statistics = collect_statistics(dense, batches, LAYERS, **options)
    rows = replace_layers(dense, result.ranks, result.configuration, statistics)
    assert rows == result.layers
    assert hash_model(dense) == hash_model(model)


def test_statistics_and_ranks_can_be_given() -> None:
    model, batches, statistics = made("bert")
    given = compress(copy.deepcopy(model), keep=0.6, statistics=statistics, layers=LAYERS, progress=False)
    assert given.configuration.method == "two_sided"
    without = {name: collect_statistics(model, batches, [name])[name] for name in statistics}
    assert (
        compress(copy.deepcopy(model), keep=0.6, statistics=without, layers=LAYERS).configuration.method == "whitened"
    )
    ranks = dict.fromkeys(list(statistics)[:2], 3)
    result = compress(model, batches, ranks=ranks, progress=False)
    assert result.ranks == ranks


def test_batches_may_be_a_generator_and_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches, _ = made("bert")
    other = copy.deepcopy(model)
    compress(model, (batch for batch in batches), keep=0.6, layers=LAYERS)
    shown = capsys.readouterr().err
    assert all(stage in shown for stage in ("statistics", "spectra", "factorize"))
    compress(other, batches, keep=0.6, layers=LAYERS, progress=False)
    assert capsys.readouterr().err == ""
    assert hash_model(model) == hash_model(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": None}, "`keep` must be given, or `ranks`, and not both, got None"),
        (
            {"ranks": {"bert.encoder.layer.0.output.dense": 2}},
            "`keep` must be given, or `ranks`, and not both, got 0.6",
        ),
        ({"keep": 0.0}, r"`keep` must be in \(0, 1\]"),
        ({"keep": float("nan")}, r"`keep` must be in \(0, 1\]"),
        ({"keep": 0.001}, "`keep` must allow"),
        ({"method": "best"}, r"`method` must be one of \['svd', .*\], got 'best'"),
        ({"storage": "sparse"}, "`storage` must be one of"),
        ({"allocation": "best"}, "`allocation` must be one of"),
        ({"allocation": "measured"}, "`batches` must hold more than the first 32 samples"),
        ({"multiple": 0}, "`multiple` must be at least 1, got 0"),
        ({"multiple": 8, "keep": 0.1}, "`keep` must allow the least rank"),
        ({"rank": 3}, r"`choices` must be among \['method', .*\], got \['rank'\]"),
        ({"layers": ["nothing"]}, "`layers` must match nn.Linear modules"),
        (
            {"keep": None, "ranks": {"bert.encoder.layer.0.output.dense": 2.0}},
            r"`ranks.* must be (int|an int in \[1, 24\].*), got 2.0",
        ),
        (
            {"keep": None, "ranks": {"bert.encoder.layer.0.output.dense": 25}},
            r"`ranks` must be an int in \[1, 24\] .* got 25",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_changes_nothing(options: dict[str, Any], message: str) -> None:
    model, batches, _ = made("bert")
    before = hash_model(model)
    with pytest.raises(ValueError, match=message):
        compress(model, batches, progress=False, **{"keep": 0.6, "layers": LAYERS} | options)
    assert hash_model(model) == before


def test_a_method_that_needs_data_asks_for_it() -> None:
    model, *_ = made("bert")
    before = hash_model(model)
    with pytest.raises(
        ValueError, match="`batches` must be given, or `statistics`, unless `method` is 'svd', got None"
    ):
        compress(model, keep=0.6, layers=LAYERS)
    with pytest.raises(ValueError, match="`statistics` must"):
        compress(model, keep=0.6, layers=LAYERS, method="whitened")
    assert hash_model(model) == before
    assert compress(model, keep=0.6, layers=LAYERS, method="svd", progress=False).keep_targeted <= 0.6


@pytest.mark.parametrize("spoil", ["another model", "not finite", "missing"])
def test_statistics_of_any_mapping_are_checked_before_anything_changes(spoil: str) -> None:
    model, _, statistics = made("bert")
    last = next(iter(statistics))  # layers are replaced from the last to the first
    if spoil == "another model":
        statistics[last] = made("plain")[2]["2"]
    elif spoil == "not finite":
        statistics[last] = copy.deepcopy(statistics[last])
        statistics[last].gram[0, 0] = torch.nan
    else:
        del statistics[last]
    before = hash_model(model)
    with pytest.raises(ValueError, match="`statistics"):
        replace_layers(model, dict.fromkeys(find_linears(model, LAYERS), 2), "whitened", UserDict(statistics))
    assert hash_model(model) == before


class Constant(nn.Module):
    """A model whose output is its one input, as logits of so many classes if `num_classes` is set."""

    def __init__(self, classes: int, categorical: bool) -> None:
        super().__init__()
        self.num_classes = classes if categorical else 0
        self.output = nn.Linear(classes, classes, bias=False)
        nn.init.eye_(self.output.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(x)


@pytest.mark.parametrize("categorical", [True, False])
def test_the_predictive_loss_has_the_fisher_information_in_its_gradients(categorical: bool) -> None:
    logits = torch.tensor([0.5, -1.0, 0.2, 1.5])
    count = 40_000
    statistics = collect_statistics(
        Constant(4, categorical), [logits.expand(count, 4).clone()], ["output"], loss=predictive_loss(3)
    )
    measured = statistics["output"].gradient_gram / count
    p = logits.double().softmax(0)
    expected = p.diag() - torch.outer(p, p) if categorical else 2 * torch.eye(4, dtype=torch.float64)
    assert torch.allclose(measured, expected, atol=0.03)


def test_the_predictive_loss_leaves_padding_out() -> None:
    model, batches, _ = made("bert")
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    hidden = copy.deepcopy(model.bert)
    batch = {"input_ids": batches[0]["input_ids"][:2, :5], "attention_mask": mask}
    with torch.no_grad():
        value = predictive_loss(0)(hidden, batch)
        expected = 0.5 * torch.randn((2, 5, 24), generator=torch.Generator().manual_seed(0)).square()[mask.bool()].sum()
    assert torch.allclose(value, expected, rtol=1e-4)
