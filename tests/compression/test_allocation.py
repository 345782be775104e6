"""Rules for ranks: closed forms of depth, every rule within its budget, and choices that equal a search by hand."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, LAYERS, made
from torch import nn

from lowrank import Configuration, collect_statistics, compress, replace_layers
from lowrank.calibration.divergence import mean_divergence, predictive_divergence
from lowrank.calibration.predictive_loss import predictive_loss
from lowrank.compression.allocation import DEPTH_TERMS, HELD_OUT, RULES, STEEPNESS, choose_ranks, hold_out
from lowrank.compression.allocator import AllocationConfig, Allocator
from lowrank.compression.configuration import ALLOCATIONS
from lowrank.compression.depth import block_positions, depth_weights, spectrum_for_share
from lowrank.factorization.rank_allocation import allocate_ranks, kept_parameters
from lowrank.factorization.storages import STORAGES
from lowrank.io.hashing import hash_model
from lowrank.nn.batches import Batch, as_double
from lowrank.nn.targets import find_linears

DEEP = [name for name in ALLOCATIONS if name in ("depth", "first_dense", "linear")]


def calibration(family: str, count: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [FAMILIES[family][1](generator) for _ in range(count)]


def allocator_of(family: str, **options: Any) -> Allocator:
    model, _, _ = made(family)
    probes, batches = hold_out(calibration(family))
    statistics = collect_statistics(model, batches, LAYERS, loss=predictive_loss())
    return Allocator(model, LAYERS, statistics, probes, **options)


def shares(ranks: dict[str, int], shapes: dict[str, Any], storage: str) -> dict[str, float]:
    sizes = {name: shapes[name][0] * shapes[name][1] for name in ranks}
    return {name: kept_parameters(shapes[name], rank, storage) / sizes[name] for name, rank in ranks.items()}


# --- what depth says --------------------------------------------------------------------------------------------------


def test_the_depth_term_is_the_sum_over_later_blocks_scaled_to_one() -> None:
    for blocks, alpha, gamma in [(1, 0.7, 3.0), (4, 0.0, 2.0), (5, 1.0, 7.0), (12, 2.5, 0.5)]:
        sums = [sum((k + 1) ** -alpha for k in range(b, blocks)) for b in range(blocks)]
        weights = depth_weights(blocks, alpha, gamma)
        assert weights == pytest.approx([1 + gamma * value / sums[0] for value in sums], rel=1e-12)
        assert weights[0] == 1 + gamma
        assert (np.diff(weights) < 0).all()
    assert depth_weights(4, 0.0, 4.0) == pytest.approx([5.0, 4.0, 3.0, 2.0])
    assert (depth_weights(7, 3.0, 0.0) == 1.0).all()


def test_blocks_are_counted_in_the_order_of_the_model() -> None:
    names = ["encoder.layer.0.q", "encoder.layer.0.k", "encoder.layer.2.q", "decoder.layer.0.q", "decoder.layer.0.v"]
    assert list(block_positions(names).values()) == [0, 0, 1, 2, 2]
    assert list(block_positions(["stages.0.blocks.0.fc", "stages.0.blocks.1.fc", "stages.1.blocks.0.fc"]).values()) == [
        0,
        1,
        2,
    ]
    with pytest.raises(ValueError, match="`layers` must be inside numbered blocks .*, got 'head.fc'"):
        block_positions(["blocks.0.fc", "head.fc"])


@pytest.mark.parametrize("storage", STORAGES)
def test_targets_that_differ_give_shares_that_differ_as_much(storage: str, shape: tuple[int, int]) -> None:
    out, inputs = (4 * side for side in shape)
    shapes = {str(i): (out, inputs) for i in range(5)}
    for step in (0.0, 0.05, -0.1):
        targets = {name: 1 + 4 * abs(step) + step * (i - 2) for i, name in enumerate(shapes)}
        spectra = {name: spectrum_for_share((out, inputs), storage, target) for name, target in targets.items()}
        kept = list(shares(allocate_ranks(shapes, 0.4, spectra, storage=storage, floor=0.0), shapes, storage).values())
        rank = (out + inputs) / (out * inputs)  # the most that one rank costs
        assert np.diff(kept) == pytest.approx(np.full(4, step), abs=1.01 * rank)
        assert np.mean(kept) == pytest.approx(0.4, abs=rank)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: depth_weights(0, 1.0, 1.0), "`blocks` must be at least 1, got 0"),
        (lambda: depth_weights(2, -1.0, 1.0), "`alpha` must be finite and >= 0, got -1.0"),
        (lambda: depth_weights(2, 1.0, float("nan")), "`gamma` must be finite and >= 0, got nan"),
        (lambda: spectrum_for_share((4, 4), "factors", 0.5), "`target` must be at least 1, got 0.5"),
        (lambda: Configuration(multiple=0), "`multiple` must be at least 1, got 0"),
    ],
)
def test_bad_numbers_are_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# --- the rules --------------------------------------------------------------------------------------------------------


def test_every_allocation_has_a_rule_and_the_search_covers_the_published_range() -> None:
    assert tuple(RULES) == ALLOCATIONS
    assert DEPTH_TERMS[0] == (0.0, 0.0)
    assert len(set(DEPTH_TERMS)) == 10
    assert {max(column) for column in zip(*DEPTH_TERMS, strict=True)} == {3.0, 7.0}
    assert STEEPNESS[0] == 0.0


@pytest.mark.parametrize("family", ["llama", "vit"])
@pytest.mark.parametrize("rule", RULES)
def test_compress_spends_the_budget_by_every_rule(rule: str, family: str) -> None:
    model, _, _ = made(family)
    batches = calibration(family, 9)
    options: dict[str, Any] = dict(allocation=rule, layers=LAYERS, progress=False)
    result = compress(model, iter(batches), 0.7, **options)
    assert result.configuration.allocation == rule
    assert (len(result.trials) > 1) == (rule in ("depth", "linear"))
    assert 0.65 < result.keep_targeted <= 0.7
    again, _, _ = made(family)
    multiples = compress(again, batches, 0.7, multiple=4, **options)
    assert 0.5 < multiples.keep_targeted <= 0.7
    assert f"ranks: {rule} in multiples of 4\n" in str(multiples)
    for row in multiples.layers:
        assert row["storage"] == "dense" or row["rank"] % 4 == 0


@pytest.mark.parametrize("rule", RULES)
def test_compress_and_an_allocator_choose_the_same_ranks(rule: str) -> None:
    model, _, _ = made("bert")
    configuration = Configuration("two_sided", "pivoted", True, rule)
    before = hash_model(model)
    batches = calibration("bert")
    left = hold_out(batches)[1] if RULES[rule].measures else batches
    statistics = collect_statistics(model, left, LAYERS, loss=predictive_loss())
    for in_memory in (True, False):
        config = AllocationConfig(in_memory=in_memory)
        known = Allocator(model, LAYERS, statistics, hold_out(batches)[0], config=config)
        ranks = choose_ranks(known, configuration, 0.6)
        assert hash_model(model) == before
        assert known.spectra("two_sided", True) is known.spectra("two_sided", True)  # decomposed once
        assert compress(copy.deepcopy(model), batches, 0.6, allocation=rule, layers=LAYERS).ranks == ranks


@pytest.mark.parametrize("rule", ["depth", "linear"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_choice_is_the_candidate_nearest_to_the_dense_model(family: str, rule: str) -> None:
    known = allocator_of(family)
    configuration = Configuration("two_sided", "pivoted", known.biased, rule)
    chosen = choose_ranks(known, configuration, 0.4)
    positions, spectra = block_positions(known.shapes), known.spectra("two_sided", known.biased)
    found = {}
    for row in known.trials:
        options: dict[str, Any] = dict(storage="pivoted", floor=0.1)
        if rule == "depth":
            by_block = depth_weights(2, row["alpha"], row["gamma"])
            options |= dict(spectra=spectra, weights={name: by_block[at] for name, at in positions.items()})
        else:
            line = {name: 1.5 + 0.4 * row["steepness"] * (1 - 2 * at) for name, at in positions.items()}
            made_up = {n: spectrum_for_share(shape, "pivoted", line[n]) for n, shape in known.shapes.items()}
            options |= dict(spectra=made_up)
        ranks = allocate_ranks(known.shapes, 0.4, **options)
        smaller = copy.deepcopy(known.model)
        replace_layers(smaller, ranks, configuration, known.statistics)
        probes = [as_double(batch) for batch in known.probes]
        divergence = mean_divergence(smaller.double(), copy.deepcopy(known.model).double(), probes)
        assert row["divergence"] == pytest.approx(divergence, rel=1e-4)
        found[divergence] = ranks
    assert len({tuple(ranks.values()) for ranks in found.values()}) == len(known.trials) > 1  # each measured once
    assert chosen == found[min(found)]
    assert choose_ranks(known, configuration, 0.4) == chosen
    assert len(found) == len(known.trials)  # nor again


def test_candidates_that_agree_are_not_measured() -> None:
    known = allocator_of("llama")
    full = {name: min(shape) for name, shape in known.shapes.items()}
    for rule in ("depth", "linear"):
        assert choose_ranks(known, Configuration(allocation=rule), 1.0) == full
    assert known.trials == []


def test_the_first_block_stays_dense_and_the_rest_is_uniform() -> None:
    known = allocator_of("llama")
    for storage in STORAGES:
        ranks = choose_ranks(known, Configuration("whitened", storage, allocation="first_dense"), 0.75)
        kept = shares(ranks, known.shapes, storage)
        positions = block_positions(known.shapes)
        assert all(kept[name] == 1.0 for name, at in positions.items() if at == 0)
        assert all(0.3 < kept[name] < 0.7 for name, at in positions.items() if at == 1)
    with pytest.raises(ValueError, match="`keep` must allow the least rank of every layer, got 0.5"):
        choose_ranks(known, Configuration(allocation="first_dense"), 0.5)


def test_measured_scales_lie_within_what_is_trusted() -> None:
    known = allocator_of("bert")
    scales = np.array(list(known.scales.values()))
    assert scales.max() / scales.min() <= 4 * (1 + 1e-9)
    assert list(known.scales) == [row["layer"] for row in known.alone] == list(known.shapes)


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_whole_batches_are_held_out_and_nothing_is_lost() -> None:
    batches = [torch.full((size, 2), float(i)) for i, size in enumerate((20, 20, 20, 4))]
    held, rest = hold_out(batch for batch in batches)
    assert [int(batch[0, 0]) for batch in held] == [0, 1]
    assert [int(batch[0, 0]) for batch in rest] == [2, 3]
    assert sum(len(batch) for batch in held) >= HELD_OUT
    for few in ([], batches[:1], batches[:2]):
        with pytest.raises(ValueError, match=r"`batches` must hold more than the first 32 samples.*got '\d+ in"):
            hold_out(few)


@pytest.mark.parametrize("rule", DEEP)
@pytest.mark.usefixtures("unchecked")
def test_a_model_without_blocks_is_refused_and_stays_as_it_is(rule: str) -> None:
    model, _, _ = made("plain")
    before = hash_model(model)
    with pytest.raises(ValueError, match="`layers` must be inside numbered blocks .*, got '0'"):
        compress(model, calibration("plain"), 0.6, allocation=rule, layers=LAYERS, progress=False)
    assert hash_model(model) == before


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.measures])
@pytest.mark.usefixtures("unchecked")
def test_rules_that_measure_need_samples_of_their_own(rule: str) -> None:
    model, batches, statistics = made("bert")
    before = hash_model(model)
    with pytest.raises(ValueError, match=f"`batches` must be given for allocation '{rule}'"):
        compress(model, keep=0.6, statistics=statistics, layers=LAYERS, allocation=rule)
    with pytest.raises(ValueError, match="`batches` must hold more than the first 32"):
        compress(model, batches, 0.6, layers=LAYERS, allocation=rule)
    with pytest.raises(ValueError, match=f"`probes` must hold batches for allocation '{rule}'"):
        choose_ranks(Allocator(model, LAYERS, statistics), Configuration(allocation=rule), 0.6)
    assert hash_model(model) == before


def test_an_error_while_measuring_leaves_the_model_as_it_is() -> None:
    calls = []

    def failing(teacher: nn.Module):
        compare = predictive_divergence(teacher)

        def measure(model: nn.Module, batch: Batch) -> torch.Tensor:
            calls.append(batch)
            if len(calls) > 4:
                raise RuntimeError("out of memory")
            return compare(model, batch)

        return measure

    known = allocator_of("bert", divergence=failing)
    known.model.train()
    before, layers = hash_model(known.model), find_linears(known.model, LAYERS)
    with pytest.raises(RuntimeError, match="out of memory"):
        choose_ranks(known, Configuration("two_sided", allocation="depth"), 0.5)
    assert hash_model(known.model) == before
    assert find_linears(known.model, LAYERS) == layers
    assert known.model.training
