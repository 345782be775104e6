"""Training, adapters, scores, evaluation and π³ on a device: where tensors are, and the same results as on the CPU."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import virtual_accelerator
from families import LAYERS, VOCABULARY, compressed, made, outputs
from torch import nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.divergence import mean_divergence
from lowrank.compression.compress import compress
from lowrank.lora.adapters import ADAPTER_STARTS, add_adapter, load_adapter
from lowrank.lora.deltas import delta_factors, delta_spectra
from lowrank.lora.rank_config import RankConfig
from lowrank.nn.batches import move_batch
from lowrank.nn.profiling import count_flops, generate_in_turns, time_in_turns, top_operators, weight_bytes
from lowrank.nn.targets import find_linears
from lowrank.selection.scoring import layer_scores
from lowrank.tasks.evaluation import OBJECTIVES, evaluate, perplexity
from lowrank.training.loop import Hooks, Recipe, fit
from lowrank.training.oialr import OIALR, OIALRConfig
from lowrank.training.penalties import PENALTIES
from lowrank.training.prehab import PrehabConfig, prehab
from lowrank.training.refine import model_loss, refine_factors, tune_factors
from lowrank.training.stability import BasisMonitor

QUICK = dict(batch_size=4, learning_rate=1e-3)


def labelled(family: str) -> tuple[nn.Module, list[Any]]:
    """A model of a family and batches with labels, both on the CPU."""
    model, batches, _ = made(family)
    if family in ("llama", "opt"):
        return model, [{**batch, "labels": batch["input_ids"]} for batch in batches]
    if family == "bert":
        return model, [{**batch, "labels": torch.arange(12) % 3} for batch in batches]
    return model, [(batch, torch.arange(len(batch)) % 3) for batch in batches]


def steps(batches: list[Any], count: int) -> Any:
    return lambda done: [batches[step % len(batches)] for step in range(done, count)]


def agree(found: list[dict[str, Any]], expected: list[dict[str, Any]], *keys: str) -> None:
    for key in keys:
        assert [row[key] for row in found] == pytest.approx(
            [row[key] for row in expected], rel=1e-3, abs=1e-6, nan_ok=True
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_training(trainer: torch.device, family: str, precision: str, tmp_path: Path) -> None:
    """The model may start on the CPU; a training that is resumed ends as one that is not."""
    recipe, (model, batches) = Recipe(4, **QUICK, precision=precision, checkpoint_every=2), labelled(family)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    rows = fit(first, steps(batches, 4), recipe, model_loss, progress=False)
    assert {p.device for p in first.parameters()} == {trainer}
    with pytest.raises(ValueError, match="`batches` must have"):
        fit(second, steps(batches, 2), recipe, model_loss, checkpoint=tmp_path, progress=False)
    again = fit(copy.deepcopy(model), steps(batches, 4), recipe, model_loss, checkpoint=tmp_path, progress=False)
    agree(again, rows, "loss")


@pytest.mark.parametrize(("penalty", "start"), [*((name, "device") for name in PENALTIES), ("nuclear", "cpu")])
def test_prehab(trainer: torch.device, penalty: str, start: str) -> None:
    model, batches = labelled("bert")
    model = model.to(trainer if start == "device" else "cpu")
    statistics = collect_statistics(model, batches, LAYERS)
    result = prehab(model, statistics, batches, PrehabConfig(penalty, steps=3, refresh=2), progress=False,
                    recipe=Recipe(3, **QUICK, checkpoint_every=2))  # fmt: skip
    assert len(result.history) == 3
    assert {p.device for p in model.parameters()} == {trainer}
    compress(model, batches, 0.5, layers=LAYERS, progress=False)


@pytest.mark.parametrize("start", ["cpu", "device"])
@pytest.mark.parametrize("train", [refine_factors, tune_factors])
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_refining(trainer: torch.device, storage: str, train: Any, start: str) -> None:
    model, batches = compressed("llama", storage)
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    model = model.to(trainer if start == "device" else "cpu")
    history = train(model, batches, recipe=Recipe(4, **QUICK), progress=False)
    assert len(history) == 4
    assert {tensor.device for tensor in model.state_dict().values()} == {trainer}


@pytest.mark.parametrize("start", ["cpu", "device"])
@pytest.mark.parametrize("family", ["vit", "plain"])
def test_oialr_and_stability(trainer: torch.device, family: str, start: str, tmp_path: Path) -> None:
    def train(model: nn.Module, folder: Path | None, count: int = 6) -> tuple[list[Any], OIALR, BasisMonitor]:
        method = OIALR(model, OIALRConfig(delay=2, frequency=2, sigma_cutoff=0.6, coverage=1.0))
        monitor = BasisMonitor(2, progress=False)

        def after(optimizer: Any) -> bool:
            if not method.ranks:
                monitor.step(model)
            return method.step(optimizer)

        hooks = Hooks(after_step=after, states=[method, monitor])
        rows = fit(model, steps(batches, count), Recipe(6, **QUICK, checkpoint_every=4), model_loss, hooks=hooks,
                   checkpoint=folder, progress=False)  # fmt: skip
        return rows, method, monitor

    model, batches = labelled(family)
    model = model.to(trainer if start == "device" else "cpu")
    first = copy.deepcopy(model)
    rows, method, monitor = train(first, None)
    assert method.ranks
    assert monitor.history
    assert {tensor.device for tensor in first.state_dict().values()} == {trainer}
    with pytest.raises(ValueError, match="`batches` must have"):
        train(copy.deepcopy(model), tmp_path, 4)
    second = copy.deepcopy(model)
    again, resumed, _ = train(second, tmp_path)
    agree(again, rows, "loss")
    assert resumed.ranks == method.ranks
    assert {p.device for p in method.merge().parameters()} == {trainer}


def test_stability_is_that_of_the_cpu(device: torch.device) -> None:
    model, _ = labelled("vit")
    monitors = [BasisMonitor(progress=False) for _ in range(2)]
    for monitor, place in zip(monitors, ("cpu", device), strict=True):
        copied = copy.deepcopy(model).to(place)
        monitor.check(copied)
        with torch.no_grad():
            for number, parameter in enumerate(copied.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(0.1 * noise.to(place))
        monitor.check(copied)
        assert {part.device.type for parts in monitor.previous.values() for part in parts} == {"cpu"}
    agree(monitors[1].history, monitors[0].history, "stability", "p_similarity", "effective_rank")


@pytest.mark.parametrize("family", ["llama", "created vit"])
@pytest.mark.parametrize("home", ["device", "cpu"])
def test_scores(device: torch.device, family: str, home: str) -> None:
    model, _, _ = made(family)
    expected = layer_scores(model, progress=False)
    found = layer_scores(copy.deepcopy(model).to(device if home == "device" else "cpu"), device=device, progress=False)
    agree(found.layers, expected.layers, "raw_metric", "significance_score", "norm_1", "norm_2")


@pytest.mark.parametrize("start", ADAPTER_STARTS)
def test_adapters(device: torch.device, start: str, tmp_path: Path) -> None:
    if start == "pissa" and device.type == virtual_accelerator.NAME:
        pytest.skip("peft puts a tensor of the device into a parameter of the CPU, which only backends in C++ allow")
    base, batches, _ = made("llama")
    tuned, there = copy.deepcopy(base), copy.deepcopy(base).to(device)
    with torch.no_grad():
        for layer in find_linears(tuned).values():
            layer.weight.add_(0.1 * torch.randn(layer.weight.shape))
    names = dict.fromkeys(find_linears(base), 3)
    config = RankConfig.from_ranks(delta_spectra(base, tuned, progress=False), names, {})
    data = [move_batch(batch, device) for batch in batches] if start == "eva" else []
    pair = dict(base=base, tuned=tuned) if start == "warm" else {}
    adapted = add_adapter(there, config, start=start, batches=data, **pair)
    assert {p.device for p in adapted.parameters()} == {device}
    adapted.save_pretrained(str(tmp_path))
    back = load_adapter(copy.deepcopy(base).to(device), tmp_path)
    assert {p.device for p in back.parameters()} == {device}
    if start in ("zero", "warm"):
        inputs = [move_batch(batch, device) for batch in batches]
        torch.testing.assert_close(outputs(back, inputs).cpu(), outputs(adapted, inputs).cpu())


def test_changes_of_weights(device: torch.device) -> None:
    base, _, _ = made("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for layer in find_linears(tuned).values():
            layer.weight.add_(torch.randn(layer.weight.shape))
    expected = delta_spectra(base, tuned, progress=False)
    there = [copy.deepcopy(model).to(device) for model in (base, tuned)]
    for name, spectrum in delta_spectra(*there, progress=False).items():
        assert spectrum.sigma.device.type == "cpu"
        torch.testing.assert_close(spectrum.sigma, expected[name].sigma, rtol=1e-5, atol=1e-6)
    factors = delta_factors(*there, dict.fromkeys(expected, 2), progress=False)
    assert {part.device for pair in factors.values() for part in pair} == {device}


def test_evaluation(device: torch.device) -> None:
    for family, objective in (("llama", "language_modelling"), ("bert", "classification")):
        model, batches = labelled(family)
        expected, found = (evaluate(each, batches, objective) for each in (model, copy.deepcopy(model).to(device)))
        assert found == pytest.approx(expected, rel=1e-5)
    llama, batches = labelled("llama")
    text = torch.randint(1, VOCABULARY, (70,), generator=torch.Generator().manual_seed(0))
    assert perplexity(copy.deepcopy(llama).to(device), text, 16) == pytest.approx(perplexity(llama, text, 16), rel=1e-5)
    there = copy.deepcopy(llama).to(device)
    assert mean_divergence(there, copy.deepcopy(there), batches) == pytest.approx(0, abs=1e-6)
    for objective, values in OBJECTIVES.items():
        drawn = values.sample(
            torch.randn(3, 5, VOCABULARY if objective != "regression" else 1, device=device), torch.Generator()
        )
        assert drawn.device == device


def test_costs(device: torch.device) -> None:
    model, batches = labelled("llama")
    there, prompt = copy.deepcopy(model).to(device), batches[0]["input_ids"][:2]
    run = lambda: there(input_ids=prompt.to(device))  # noqa: E731
    assert count_flops(run) == count_flops(lambda: model(input_ids=prompt)) > 0
    assert weight_bytes(there) == weight_bytes(model)
    assert len(time_in_turns({"one": run}, repeats=2, warmup=0, device=device)["one"]) == 2
    assert set(generate_in_turns({"one": there}, prompt, 3, repeats=1)["one"]) == {"prefill", "decode"}
    assert top_operators(run, device)
