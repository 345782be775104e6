"""Sweeps: every model within its budget, and divergence as the spectrum predicts it."""

from dataclasses import replace

import pytest
import torch

from lowrank.compression.allocation import RULES
from lowrank.compression.allocator import TRUSTED
from lowrank.compression.configuration import Configuration
from lowrank.factorization.methods import METHODS
from lowrank.tasks.baseline import load_calibration
from lowrank.tasks.registry import load_task
from lowrank.tasks.sweep import Sweep, SweepConfig, best_combination
from lowrank.tasks.training import train
from lowrank.training.loop import Recipe

SAMPLES = 256


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Sweep:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        task = load_task("digits", width=16, depth=2, dropout=0.0)
        torch.manual_seed(0)
        model = task.make_model()
        train(model, task, Recipe(300, 32, 5e-3), progress=False)
        drawn = dict(samples=SAMPLES, batch_size=64, seed=0)
        moments = load_calibration(task, model, gradients="sampled", **drawn)
        labelled = load_calibration(task, model, gradients="labels", **drawn)
    return Sweep(model, task, moments, SweepConfig(SAMPLES, probe_keep=0.4, probe_samples=SAMPLES), labelled)


def test_a_run_has_a_row_for_each_configuration_and_budget_and_stays_within_it(sweep: Sweep) -> None:
    configurations = {method: Configuration(method) for method in METHODS} | best_combination(sweep.biased)
    rows = sweep.run(configurations, [0.6, 0.3])
    assert [(row["way"], row["keep"]) for row in rows] == [
        (name, keep) for name in configurations for keep in (0.6, 0.3)
    ]
    assert all(0.9 * row["keep"] <= row["keep_targeted"] <= row["keep"] for row in rows)
    assert all(row["added_loss"] == pytest.approx(row["loss"] - sweep.dense["loss"]) for row in rows)


def test_what_was_measured_once_is_not_measured_again(sweep: Sweep, monkeypatch) -> None:
    configuration = Configuration("svd", "pivoted")
    row, losses = sweep.measure(configuration, 0.45)
    smaller = sweep.compressed(configuration, sweep.ranks(configuration, 0.45))
    quality, again = sweep.quality_by_sample(smaller)
    assert row == {"keep": 0.45, "seconds": row["seconds"]} | quality
    assert losses.tolist() == again.tolist()
    assert quality["loss"] == pytest.approx(losses.mean())
    monkeypatch.setattr(type(sweep), "compressed", None)
    assert sweep.measure(configuration, 0.45) is sweep.measure(configuration, 0.45)
    (found,) = sweep.run({"again": configuration}, [0.45])
    assert found == {"way": "again"} | row
    other = replace(sweep, config=replace(sweep.config, split="train"))
    with pytest.raises(TypeError):
        other.measure(configuration, 0.45)  # another split has to be measured


def test_a_budget_below_the_first_block_has_no_row_for_the_rule_that_keeps_it_dense(sweep: Sweep) -> None:
    rule = Configuration(allocation="first_dense")
    (row,) = sweep.run({"first": rule}, [0.6, 0.5])  # one block of two
    assert row["keep"] == 0.6
    assert all(rank == min(sweep.shapes[name]) for name, rank in sweep.ranks(rule, 0.6).items() if "blocks.0" in name)


def test_the_dense_model_is_not_touched_and_full_rank_gives_its_quality(sweep: Sweep) -> None:
    whole = sweep.compressed(Configuration("two_sided"), sweep.ranks(Configuration("two_sided"), 1.0))
    assert sweep.quality(whole) == sweep.quality(sweep.model)
    assert sweep.task.evaluate(sweep.model, batch_size=64) == sweep.dense


def test_the_test_split_is_measured_once_the_choices_are_frozen(sweep: Sweep) -> None:
    config = SweepConfig(SAMPLES, split="test")
    closed = Sweep(sweep.model, sweep.task, sweep.statistics, config, sweep.labelled)
    for read in (lambda: closed.dense, lambda: closed.quality(sweep.model)):
        with pytest.raises(ValueError, match="`frozen` must be 16 hex digits"):
            read()
    opened = sweep.task.open_test("0123456789abcdef")
    found = Sweep(sweep.model, opened, sweep.statistics, config, sweep.labelled)
    assert found.dense == opened.evaluate(sweep.model, "test") != sweep.dense
    (row,) = found.run({"whitened": Configuration()}, [0.5])
    smaller = found.compressed(Configuration(), found.ranks(Configuration(), 0.5))
    assert row["loss"] == opened.evaluate(smaller, "test")["loss"]
    assert row["added_loss"] == row["loss"] - found.dense["loss"]


def test_decomposing_once_or_anew_gives_the_same_models(sweep: Sweep) -> None:
    anew = Sweep(sweep.model, sweep.task, sweep.statistics, SweepConfig(SAMPLES, in_memory=False), sweep.labelled)
    for one in (Configuration(), Configuration("fwsvd"), Configuration("two_sided", "pivoted", centre=True)):
        ranks = sweep.ranks(one, 0.4)
        once, again = (side.quality(side.compressed(one, ranks)) for side in (sweep, anew))
        assert once["loss"] == pytest.approx(again["loss"], rel=1e-4)


def test_the_spectrum_predicts_the_divergence_of_small_truncations(sweep: Sweep) -> None:
    rows = sweep.alone
    assert [row["layer"] for row in rows] == list(sweep.shapes)
    ratios = torch.tensor([row["measured"] / row["predicted"] for row in rows])
    assert 0.1 < ratios.median() < 10  # per target, on both sides
    logs = torch.tensor([[row["measured"], row["predicted"]] for row in rows]).log()
    assert torch.corrcoef(logs.T)[0, 1] > 0.8
    scales = torch.tensor(list(sweep.allocator.scales.values()))
    assert scales.max() / scales.min() <= TRUSTED**2 * (1 + 1e-9)


def test_allocations_spend_the_same_budget_in_other_layers(sweep: Sweep) -> None:
    ranks = {
        allocation: sweep.ranks(Configuration("two_sided", allocation=allocation), 0.4)
        for allocation in ("uniform", "relative", "spectrum")
    }
    assert len({tuple(by_layer.values()) for by_layer in ranks.values()}) == 3
    with pytest.raises(ValueError, match="`allocation` must be one of .* got 'best'"):
        Configuration("svd", allocation="best")


def test_centring_is_left_out_where_there_is_no_bias() -> None:
    assert len(best_combination(biased=True)) == len(best_combination(biased=False)) + 1
    assert not any(one.centre for one in best_combination(biased=False).values())


def test_ranks_are_chosen_on_training_samples_that_the_statistics_have_not_seen(sweep: Sweep) -> None:
    both = torch.cat([images for images, _ in sweep.task.batches("train", 64, samples=2 * SAMPLES, seed=0)])
    assert torch.equal(torch.cat([images for images, _ in sweep.allocator.probes]), both[SAMPLES:])


def test_every_rule_spends_the_budget_and_records_what_it_tried(sweep: Sweep) -> None:
    for rule in RULES:
        configuration = Configuration("two_sided", "pivoted", sweep.biased, rule, multiple=2)
        ranks = sweep.ranks(configuration, 0.8)
        assert 0.75 < sweep.quality(sweep.compressed(configuration, ranks))["keep_targeted"] <= 0.8
    assert {row["allocation"] for row in sweep.allocator.trials} == {"depth", "linear"}
