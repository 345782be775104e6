"""Pruning: exact counts, masks that equal their definition, invariances, real small models, and errors that change nothing."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.on_demand import OnDemand
from lowrank.compression.pruning import PRUNING_METHODS, magnitude, pattern_mask, prune, pruning_mask, wanda
from lowrank.factorization.moments import LayerStatistics, centre_moments, output_norm
from lowrank.factorization.running_moments import statistics_of_rows
from lowrank.nn.targets import find_linears

RATIOS = [0, 1e-9, 0.001, 0.01, 0.1, 1 / 3, 0.29, 0.5, 0.5005, 0.7, 0.99, 0.999]
ROWS = {"layer", "ratio", "pruned", "weights", "sparsity", "share_of_model"}


def problem(shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A weight, and inputs whose scales differ by up to a thousand."""
    out, inputs = shape
    scales = torch.logspace(-1.5, 1.5, inputs, dtype=torch.float64)[torch.randperm(inputs, generator=generator)]
    rows = torch.randn(400, inputs, generator=generator, dtype=torch.float64) * scales
    return torch.randn(out, inputs, generator=generator, dtype=torch.float64), rows


def scores_by_hand(weight: Tensor, rows: Tensor | None) -> list[list[float]]:
    """|W_ij| ||X_j|| / sqrt(N), one number at a time."""
    lengths = (
        [1.0] * weight.shape[1] if rows is None else [rows[:, j].square().mean().sqrt() for j in range(weight.shape[1])]
    )
    return [[abs(float(w)) * float(s) for w, s in zip(row, lengths, strict=True)] for row in weight]


def mask_by_hand(scores: list[list[float]], ratio: float, per: str) -> Tensor:
    """The definition, by sorting Python tuples (score, position)."""
    rows, columns = len(scores), len(scores[0])
    total = round(rows * columns * ratio)
    pruned: set[tuple[int, int]] = set()
    if per == "matrix":
        ranked = sorted((scores[i][j], i, j) for i in range(rows) for j in range(columns))
        pruned = {(i, j) for _, i, j in ranked[:total]}
    else:
        following = []
        for i in range(rows):
            ranked = sorted((scores[i][j], j) for j in range(columns))
            pruned |= {(i, j) for _, j in ranked[: total // rows]}
            following += [(ranked[total // rows][0], i, ranked[total // rows][1])] * (total // rows < columns)
        pruned |= {(i, j) for _, i, j in sorted(following)[: total % rows]}
    return torch.tensor([[(i, j) in pruned for j in range(columns)] for i in range(rows)])


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["row", "matrix"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_counts_are_exact(shape, ratio, per, generator) -> None:
    continuous = torch.rand(shape, generator=generator, dtype=torch.float64)
    for scores in (continuous, continuous.mul(3).round(), torch.zeros(shape)):  # without ties, with many, nothing else
        mask = pruning_mask(scores, ratio, per)
        assert int(mask.sum()) == round(scores.numel() * ratio)
        if per == "row":
            assert mask.sum(1).max() - mask.sum(1).min() <= 1
            assert abs(int(mask.sum(1).min()) - shape[1] * ratio) <= 1
        else:
            assert not mask.any() or scores[mask].max() <= scores[~mask].min()


@pytest.mark.parametrize("per", ["row", "matrix"])
@pytest.mark.parametrize("method", PRUNING_METHODS)
def test_masks_equal_their_definition(shape, method, per, generator) -> None:
    weight, rows = problem(shape, generator)
    scores = PRUNING_METHODS[method](weight, statistics_of_rows(rows))
    by_hand = scores_by_hand(weight, rows if method == "wanda" else None)
    for ratio in (0.05, 0.31, 0.5, 0.777, 0.95):
        assert torch.equal(pruning_mask(scores, ratio, per), mask_by_hand(by_hand, ratio, per))


@pytest.mark.parametrize("per", ["row", "matrix"])
def test_ties_go_by_position(shape, per, generator) -> None:
    scores = torch.randint(0, 4, shape, generator=generator).double()
    for ratio in RATIOS:
        assert torch.equal(pruning_mask(scores, ratio, per), mask_by_hand(scores.tolist(), ratio, per))


@pytest.mark.parametrize("per", ["row", "matrix"])
def test_masks_are_nested_in_the_ratio(shape, per, generator) -> None:
    scores = torch.rand(shape, generator=generator, dtype=torch.float64)
    masks = [pruning_mask(scores, ratio, per) for ratio in sorted(RATIOS)]
    for less, more in pairwise(masks):
        assert not (less & ~more).any()


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("method", PRUNING_METHODS)
def test_a_pattern_takes_the_lowest_of_every_group(shape, method, pattern, generator) -> None:
    weight, rows = problem(shape, generator)
    n, m = pattern
    scores = PRUNING_METHODS[method](weight, statistics_of_rows(rows))
    mask = pattern_mask(scores, pattern)
    for i in range(shape[0]):
        for start in range(0, shape[1], m):
            group = [(scores[i, j].item(), j) for j in range(start, start + m)]
            expected = {j for _, j in sorted(group)[:n]}
            assert {j for _, j in group if mask[i, j]} == expected


def test_scores_and_masks_leave_their_arguments_alone(shape, generator) -> None:
    weight, rows = problem(shape, generator)
    statistics = statistics_of_rows(rows)
    before = weight.clone(), statistics.gram.clone()
    for method in PRUNING_METHODS.values():
        scores = method(weight, statistics)
        held = scores.clone()
        pruning_mask(scores, 0.4)
        pattern_mask(scores, (1, 2))
        assert torch.equal(scores, held)
    assert torch.equal(weight, before[0])
    assert torch.equal(statistics.gram, before[1])


# --- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["row", "matrix"])
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 7.0, 1e12])
def test_scales_change_no_mask(shape, scale, per, generator) -> None:
    weight, rows = problem(shape, generator)
    statistics = statistics_of_rows(rows)
    expected = pruning_mask(wanda(weight, statistics), 0.6, per)
    summed = replace(statistics, tokens=1)  # the published sum over tokens in the place of the mean
    for moments in (replace(statistics, gram=statistics.gram * scale), statistics_of_rows(rows * scale), summed):
        assert torch.equal(pruning_mask(wanda(weight, moments), 0.6, per), expected)
    for scaled in (weight * scale, -weight):
        assert torch.equal(pruning_mask(wanda(scaled, statistics), 0.6, per), expected)
        assert torch.equal(pruning_mask(magnitude(scaled), 0.6), pruning_mask(magnitude(weight), 0.6))


@pytest.mark.parametrize("size", [1.0, 3e-7])
def test_magnitude_is_wanda_where_all_inputs_count_alike(shape, size, generator) -> None:
    weight, _ = problem(shape, generator)
    zero = torch.zeros(shape[1], dtype=torch.float64)
    alike = LayerStatistics(10 * size * torch.eye(shape[1], dtype=torch.float64), 10, zero, zero)
    for per in ("row", "matrix"):
        assert torch.equal(pruning_mask(wanda(weight, alike), 0.45, per), pruning_mask(magnitude(weight), 0.45, per))
    assert torch.equal(pattern_mask(wanda(weight, alike), (2, 4)), pattern_mask(magnitude(weight), (2, 4)))


@pytest.mark.parametrize("ratio", RATIOS)
def test_permuted_outputs_permute_the_mask(shape, ratio, generator) -> None:
    weight, rows = problem(shape, generator)
    statistics, order = statistics_of_rows(rows), torch.randperm(shape[0], generator=generator)
    for per in ("row", "matrix"):
        expected = pruning_mask(wanda(weight, statistics), ratio, per)[order]
        assert torch.equal(pruning_mask(wanda(weight[order], statistics), ratio, per), expected)


def test_permuted_inputs_permute_the_mask(shape, generator) -> None:
    weight, rows = problem(shape, generator)
    order = torch.randperm(shape[1], generator=generator)
    expected = pruning_mask(wanda(weight, statistics_of_rows(rows)), 0.37)[:, order]
    assert torch.equal(pruning_mask(wanda(weight[:, order], statistics_of_rows(rows[:, order])), 0.37), expected)


@pytest.mark.parametrize("factor", [3.0, 30.0])
def test_row_mode_does_not_compare_outputs(shape, factor, generator) -> None:
    weight, rows = problem(shape, generator)
    statistics, rows_larger = statistics_of_rows(rows), weight.clone()
    rows_larger[::2] *= factor
    even = round(shape[1] * 0.5) / shape[1]  # no rest: nothing is decided between rows
    one, two = (pruning_mask(wanda(w, statistics), even) for w in (weight, rows_larger))
    assert torch.equal(one, two)
    one, two = (pruning_mask(wanda(w, statistics), even, "matrix") for w in (weight, rows_larger))
    assert not torch.equal(one, two)


def test_dead_inputs_go_first(shape, generator) -> None:
    weight, rows = problem(shape, generator)
    rows[:, ::4] = 0
    for per in ("row", "matrix"):
        mask = pruning_mask(wanda(weight, statistics_of_rows(rows)), 0.25, per)
        assert mask[:, ::4].all()
        assert not mask[:, 1::4].any()


def test_moments_that_rounding_left_below_zero_count_as_zero(generator) -> None:
    weight, rows = problem((6, 4), generator)
    rows[:, :3] = 0.1  # constant: centred moments are zero, or rounding on either side of it
    statistics = centre_moments(statistics_of_rows(rows))
    statistics.gram.diagonal()[0] = -1e-18
    scores = wanda(weight, statistics)
    assert bool(torch.isfinite(scores).all())
    assert torch.equal(pruning_mask(scores, 0.75).sum(0), torch.tensor([6, 6, 6, 0]))


# --- what the output loses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["row", "matrix"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_wanda_loses_less_of_the_output_where_scales_differ(shape, ratio, per, generator) -> None:
    weight, rows = problem(shape, generator)
    statistics = statistics_of_rows(rows)
    error = {
        name: (rows @ (weight * pruning_mask(method(weight, statistics), ratio, per)).T).norm().item()
        for name, method in PRUNING_METHODS.items()
    }
    assert error["wanda"] < 0.7 * error["magnitude"]


def test_wanda_is_the_best_mask_where_inputs_are_uncorrelated(shape, generator) -> None:
    weight, rows = problem(shape, generator)
    full = statistics_of_rows(rows)
    statistics = replace(full, gram=full.gram.diagonal().diag())
    scores = wanda(weight, statistics)
    for per in ("row", "matrix"):
        mask = pruning_mask(scores, 0.5, per)
        best = output_norm(weight * mask, statistics)
        predicted = (scores[mask].square().sum() * statistics.tokens).sqrt().item()
        assert best == pytest.approx(predicted, rel=1e-12)
        for _ in range(20):
            other = pruning_mask(scores * torch.rand(shape, generator=generator, dtype=torch.float64), 0.5, per)
            assert best < output_norm(weight * other, statistics)


# --- models -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(inputs, outputs), nn.Linear(outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(12, 20), Block(12, 8))


def vit() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, depth=2, embed_dim=32, num_heads=2, img_size=32)
    return model, torch.randn(8, 3, 32, 32)


def convnext() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    sizes = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), conv_mlp=False)  # else pw1, pw2 are convolutions
    return timm.create_model("convnext_atto", num_classes=4, **sizes), torch.randn(8, 3, 64, 64)


def llama() -> tuple[nn.Module, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=24, **sizes))
    return model, {"input_ids": torch.randint(0, 64, (8, 16))}


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], int]] = {
    "vit": (vit, 2 * 4),
    "convnext": (convnext, 4 * 2),
    "llama": (llama, 2 * 7),
}


@pytest.mark.parametrize("per", ["row", "matrix"])
@pytest.mark.parametrize("method", PRUNING_METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_real_models_lose_what_the_masks_say_and_nothing_else(name, method, per) -> None:
    build, layers = MODELS[name]
    model, batch = build()
    before = copy.deepcopy(model.state_dict())
    statistics = collect_statistics(model, [batch])
    rows = prune(model, 0.43, method, statistics, per=per)
    linears = find_linears(model)
    assert [row["layer"] for row in rows] == list(linears)
    assert len(rows) == layers
    for row in rows:
        old = before[f"{row['layer']}.weight"]
        mask = pruning_mask(PRUNING_METHODS[method](old, statistics[row["layer"]]), 0.43, per)
        expected = torch.where(mask, torch.zeros_like(old), old)
        assert torch.equal(linears[row["layer"]].weight, expected)
        assert row.keys() == ROWS
        assert (row["ratio"], row["weights"], row["pruned"]) == (0.43, old.numel(), round(old.numel() * 0.43))
        assert abs(row["sparsity"] - 0.43) * old.numel() <= 1
    targeted = {f"{row['layer']}.weight" for row in rows}
    for key, value in model.state_dict().items():
        assert key in targeted or torch.equal(value, before[key])
    with torch.no_grad():
        output = model(**batch).logits if isinstance(batch, dict) else model(batch)
    assert bool(torch.isfinite(output).all())


@pytest.mark.parametrize("method", PRUNING_METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_real_models_take_two_to_four(name, method) -> None:
    model, batch = MODELS[name][0]()
    rows = prune(model, method=method, statistics=collect_statistics(model, [batch]), pattern=(2, 4))
    for row, layer in zip(rows, find_linears(model).values(), strict=True):
        assert ((layer.weight.detach().view(-1, 4) == 0).sum(1) == 2).all()
        assert (row["ratio"], row["pruned"], row["sparsity"]) == (0.5, row["weights"] // 2, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", PRUNING_METHODS)
def test_every_dtype_keeps_its_weights_bit_for_bit(method, dtype, generator) -> None:
    model = small().to(dtype)
    layer = model[0].up
    with torch.no_grad():
        layer.weight *= 100 if dtype == torch.float16 else 1
    before = layer.weight.detach().clone()
    rows = torch.randn(200, 12, generator=generator) * torch.logspace(-5, 4, 12)  # squares would overflow in float16
    statistics = {"0.up": statistics_of_rows(rows)}
    prune(model, {"0.up": 0.5}, method, statistics)
    mask = pruning_mask(PRUNING_METHODS[method](before.double(), statistics["0.up"]), 0.5)
    assert layer.weight.dtype == dtype
    assert layer.weight.requires_grad
    assert torch.equal(layer.weight[~mask], before[~mask])
    assert layer.weight[mask].count_nonzero() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_masks_on_cuda_are_those_on_the_cpu(shape, generator) -> None:
    weight, rows = problem(shape, generator)
    statistics = statistics_of_rows(rows)
    for method in PRUNING_METHODS.values():
        for values in (weight.float(), weight.mul(4).round().bfloat16()):  # the second with ties
            here, there = method(values, statistics), method(values.cuda(), statistics)
            for per in ("row", "matrix"):
                assert torch.equal(pruning_mask(here, 0.43, per), pruning_mask(there, 0.43, per).cpu())
            assert torch.equal(pattern_mask(here, (2, 4)), pattern_mask(there, (2, 4)).cpu())


def test_ratios_and_layers_say_which_layers(generator) -> None:
    whole = small()
    assert [row["layer"] for row in prune(whole, 0.5, "magnitude")] == ["0.up", "0.down", "1.up", "1.down"]
    model = small()
    rows = prune(model, {"1.down": 0.25, "0.up": 0}, "magnitude")
    assert [(row["layer"], row["pruned"], row["sparsity"]) for row in rows] == [("0.up", 0, 0.0), ("1.down", 24, 0.25)]
    assert torch.equal(model[0].up.weight, small()[0].up.weight)
    model = small()
    assert [row["layer"] for row in prune(model, method="magnitude", pattern=(1, 4), layers=[r".*\.up"])] == [
        "0.up",
        "1.up",
    ]
    assert [row["layer"] for row in prune(model, 0.9, "magnitude", layers=["1.down"])] == ["1.down"]


def test_pruning_again_prunes_nothing_more_and_more_prunes_on_top() -> None:
    model = small()
    prune(model, 0.5, "magnitude")
    before = copy.deepcopy(model.state_dict())
    for ratio in (0.5, 0.2):
        rows = prune(model, ratio, "magnitude")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert {row["sparsity"] for row in rows} == {0.5}  # measured
    prune(model, 0.8, "magnitude")
    once = small()
    prune(once, 0.8, "magnitude")
    assert all(torch.equal(value, once.state_dict()[key]) for key, value in model.state_dict().items())


def test_statistics_on_demand_are_those_of_the_dense_model(generator) -> None:
    batches = [torch.randn(6, 10, 12, generator=generator)]
    one, two = small(), small()
    prune(one, 0.6, "wanda", OnDemand(one, batches))
    prune(two, 0.6, "wanda", collect_statistics(two, batches))
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


# --- bad input --------------------------------------------------------------------------------------------------------


def statistics_of(model: nn.Module, width: int | None = None) -> dict[str, LayerStatistics]:
    rows = torch.randn(100, 40, generator=torch.Generator().manual_seed(1))
    return {
        name: statistics_of_rows(rows[:, : width or layer.in_features]) for name, layer in find_linears(model).items()
    }


def spoiled(model: Any, value: float) -> Any:
    with torch.no_grad():
        model[1].down.weight[2, 3] = value
    return model


def tied(model: Any) -> Any:
    model[1].up.weight = model[0].up.weight = nn.Parameter(torch.ones(20, 12))
    return model


def without(statistics: dict[str, LayerStatistics], name: str) -> dict[str, LayerStatistics]:
    return {key: value for key, value in statistics.items() if key != name}


def infinite(statistics: dict[str, LayerStatistics]) -> dict[str, LayerStatistics]:
    last = statistics["1.down"]
    return statistics | {"1.down": replace(last, gram=last.gram * float("inf"))}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: prune(m, 1, "magnitude"), r"`ratios` must be in \[0, 1\), got 1 for layer '0.up'\."),
        (lambda m: prune(m, -0.1, "magnitude"), r"in \[0, 1\), got -0.1 for layer '0.up'"),
        (lambda m: prune(m, float("nan"), "magnitude"), "got nan for layer '0.up'"),
        (lambda m: prune(m, {"0.up": 0.5, "1.down": 1.5}, "magnitude"), "got 1.5 for layer '1.down'"),
        (lambda m: prune(m, {"0.up": 0.5, "1.side": 0.5}, "magnitude"), r"got '1.side'; it has: 0.up, 0.down"),
        (lambda m: prune(m, {"0.up": 0.5, "1": 0.5}, "magnitude"), r"nn.Linear modules of the model, got '1'; it has"),
        (lambda m: prune(m, {"0.up": 0.5, "0..*": 0.5}, "magnitude"), r"whole names, not so '0\.\.\*'"),
        (lambda m: prune(m, {"0.up": 0.5}, "magnitude", layers=[".*up"]), r"whole names, not so '1\.up'"),
        (lambda m: prune(m, {}, "magnitude"), "`ratios` must name at least one layer, got {}"),
        (
            lambda m: prune(m, method="magnitude"),
            "`ratios` or `pattern` must be passed, and not both, got None and None",
        ),
        (lambda m: prune(m, 0.5, "magnitude", pattern=(2, 4)), r"and not both, got 0.5 and \(2, 4\)"),
        (lambda m: prune(m, 0.5, "sparsegpt"), r"`method` must be one of \['magnitude', 'wanda'\], got 'sparsegpt'\."),
        (
            lambda m: prune(m, 0.5, "magnitude", per="column"),
            r"`per` must be one of \('row', 'matrix'\), got 'column'\.",
        ),
        (lambda m: prune(m, 0.5), "`statistics` must have every layer for method 'wanda', got none for layer '0.up'"),
        (lambda m: prune(m, 0.5, "wanda", without(statistics_of(m), "1.down")), "got none for layer '1.down'"),
        (
            lambda m: prune(m, 0.5, "wanda", statistics_of(m) | statistics_of(m[1:], 12)),
            r"moments of 8 inputs for a weight of shape \(12, 8\), got 12\. \(layer '1.down'\)",
        ),
        (
            lambda m: prune(m, 0.5, "wanda", infinite(statistics_of(m))),
            r"`statistics` must be finite.* \(layer '1.down'\)",
        ),
        (lambda m: prune(spoiled(m, float("nan")), 0.5, "magnitude"), r"`weight` must be finite.* \(layer '1.down'\)"),
        (lambda m: prune(spoiled(m, float("inf")), 0.5, "wanda", statistics_of(m)), r"be finite.* \(layer '1.down'\)"),
        (lambda m: prune(m, method="magnitude", pattern=(0, 4)), r"`pattern` must be .* 1 <= n < m, got \(0, 4\)"),
        (lambda m: prune(m, method="magnitude", pattern=(4, 4)), r"1 <= n < m, got \(4, 4\)"),
        (lambda m: prune(m, method="magnitude", pattern=(-2, 0)), r"1 <= n < m, got \(-2, 0\)"),
        (
            lambda m: prune(m, method="magnitude", pattern=(1, 3)),
            r"`pattern` \(1, 3\) needs a multiple of 3 inputs, got 20\. \(layer '0.down'\)",
        ),
        (
            lambda m: prune(tied(m), 0.5, "magnitude"),
            r"leave out layer '0.up': its weight is shared \(0.up.weight, 1.up.weight\)",
        ),
    ],
)
def test_bad_input_is_named_and_nothing_is_changed(call, words: str) -> None:
    model = small()
    with pytest.raises(ValueError, match=words):
        call(model)  # may spoil the model itself, with no zeros
    assert all(layer.weight.count_nonzero() == layer.weight.numel() for layer in find_linears(model).values())


def test_a_transposed_layer_is_named() -> None:
    from transformers import GPT2Config, GPT2Model  # noqa: PLC0415

    model = GPT2Model(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    for ratios in (0.5, {"h.0.attn.c_attn": 0.5}):
        with pytest.raises(ValueError, match=r"'h.0.attn.c_attn', a Conv1D: call lowrank.nn.surgery.unify_linears"):
            prune(model, ratios, "magnitude")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    scores = torch.ones(4, 4)
    scores[1, 1] = value
    for mask in (lambda: pruning_mask(scores, 0.5), lambda: pattern_mask(scores, (2, 4))):
        with pytest.raises(ValueError, match="`scores` must be finite"):
            mask()
    for ratio in (-1e-9, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"`ratio` must be in \[0, 1\), got"):
            pruning_mask(torch.ones(4, 4), ratio)
