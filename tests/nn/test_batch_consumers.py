"""Everything that runs a model on batches takes them in any form, and gives what plain tensors give."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import REPLACED, ZOO, of_zoo, sum_of_samples
from torch import Tensor, nn
from transformers import BatchEncoding

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.divergence import mean_divergence
from lowrank.calibration.hooks import collect_inputs
from lowrank.calibration.output_error import output_errors
from lowrank.calibration.predictive_loss import predictive_loss
from lowrank.compression.compress import compress
from lowrank.compression.configuration import Retargeting
from lowrank.nn.batches import Batch, compute_logits, get_labels
from lowrank.nn.dry_run import find_irreplaceable
from lowrank.nn.targets import find_linears
from lowrank.tasks.evaluation import evaluate
from lowrank.training.loop import Hooks, Recipe, fit
from lowrank.training.oialr import OIALR, OIALRConfig
from lowrank.training.prehab import PrehabConfig, prehab
from lowrank.training.refine import model_loss, refine_factors, repeat_batches, tune_factors


class Net(nn.Module):
    """Two blocks and a head; it takes whatever stands beside the inputs and uses none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, **rest: Any) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@dataclass
class Sample:
    x: Tensor
    labels: Tensor
    attention_mask: None = None
    paths: list[str] = field(default_factory=lambda: ["a.png"])


EXTRAS: dict[str, Any] = {"attention_mask": None, "use_cache": False, "max_length_q": 12, "path": ["a.png"] * 4}
NESTED = {"sizes": np.ones(4), "targets": [{"boxes": torch.zeros(1, 4)}], "empty": torch.zeros(0), "more": {"a": None}}
FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "extras": lambda x, y: {"use_cache": True, "x": x, "labels": y} | EXTRAS,
    "nested": lambda x, y: {"x": x, "labels": y} | NESTED,
    "encoding": lambda x, y: BatchEncoding({"x": x, "labels": y} | EXTRAS),
    "dataclass": Sample,
    "triple": lambda x, y: [x, y, ["a.png"], None],
}


def batches(form: str | None) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    drawn = [(torch.randn(n, 6, generator=generator), torch.arange(n) % 3) for n in (16, 20, 20, 7)]
    if form is None:
        return drawn
    empty = (drawn[0][0][:0], drawn[0][1][:0])
    return [FORMS[form](*parts) for parts in (drawn[0], empty, *drawn[1:], empty)]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(compute_logits(model, batch), get_labels(batch), reduction="sum")


def compressed(data: list[Any], **choices: Any) -> tuple[Net, Any]:
    model = net()
    return model, compress(model, data, 0.8, progress=False, **choices)


def factors(data: list[Any], train: Callable[..., Any]) -> Any:
    model, _ = compressed(batches(None), method="svd")
    return [row["loss"] for row in train(model, data, recipe=Recipe(6, learning_rate=1e-3), progress=False)]


def trained(data: list[Any]) -> Any:
    model = net()
    method, recipe = OIALR(model, OIALRConfig(delay=2, frequency=2)), Recipe(6)
    hooks = Hooks(after_step=method.step)
    return [row["loss"] for row in fit(model, repeat_batches(data), recipe, model_loss, hooks=hooks, progress=False)]


def prepared(data: list[Any]) -> Any:
    model = net()
    statistics = collect_statistics(model, batches(None))
    return [row["loss"] for row in prehab(model, statistics, data, PrehabConfig(steps=4), progress=False).history]


def moments(data: list[Any], loss: Any) -> Any:
    found = collect_statistics(net(), data, loss=loss)
    return {f"{name}.{key}": value for name, layer in found.items() for key, value in layer.moments().items()}


def retargeted(data: list[Any], folder: Path) -> Any:
    model, result = compressed(data, retarget=Retargeting(folder=folder), method="whitened")
    again, _ = compressed(data, retarget=Retargeting(folder=folder), method="whitened")  # from the blocks that are done
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    return [row["measured_error"] for row in result.layers]


def zero(model: Net) -> dict[str, list[Tensor]]:
    return {"blocks.0.0": [torch.zeros_like(model.blocks[0][0].weight)]}


CONSUMERS: dict[str, Callable[[list[Any], Path], Any]] = {
    "statistics": lambda data, folder: moments(data, None),
    "gradients": lambda data, folder: moments(data, cross_entropy),
    "predictive gradients": lambda data, folder: moments(data, predictive_loss()),
    "inputs": lambda data, folder: collect_inputs(net(), data, ["blocks.0.0"], 50),
    "output errors": lambda data, folder: output_errors(model := net(), data, zero(model)),
    "divergence": lambda data, folder: mean_divergence(compressed(batches(None))[0], net(), data),
    "evaluation": lambda data, folder: evaluate(net(), data, "classification", ("accuracy",)),
    "compress": lambda data, folder: [row["measured_error"] for row in compressed(data)[1].layers],
    "measured ranks": lambda data, folder: [
        row["divergence"] for row in compressed(data, allocation="linear")[1].trials
    ],
    "retarget": retargeted,
    "refine": lambda data, folder: factors(data, refine_factors),
    "tune": lambda data, folder: factors(data, tune_factors),
    "OIALR": lambda data, folder: trained(data),
    "PREHAB": lambda data, folder: prepared(data),
}
QUICK = ("statistics", "gradients", "evaluation", "divergence")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CONSUMERS if name not in QUICK]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("consumer", [*QUICK, *SLOW])
def test_any_form_of_batch_gives_what_plain_tensors_give(consumer: str, form: str, tmp_path: Path) -> None:
    run = CONSUMERS[consumer]
    found, expected = run(batches(form), tmp_path / "found"), run(batches(None), tmp_path / "expected")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ZOO)
def test_every_family_takes_what_stands_beside_its_tensors(family: str) -> None:
    """None, flags, numbers, strings and arrays; a mask that is None hides nothing."""
    model, (batch, _) = of_zoo(family)
    if isinstance(batch, Tensor):
        plain, form = batch, (batch, np.arange(len(batch)), ["a.png"] * len(batch), None, 3)
    else:
        plain = {key: value for key, value in batch.items() if key != "attention_mask"}
        masks = {"attention_mask": None} if "input_ids" in batch else {}
        labels = {"id": 3, "names": ["a", None], "more": np.arange(4)}
        form = plain | masks | {"return_dict": True, "output_hidden_states": None, "labels": labels}
    found, expected = (
        collect_statistics(model, [data], REPLACED[family], loss=sum_of_samples) for data in (form, plain)
    )
    assert found.keys() == expected.keys()
    for name, layer in found.items():
        for key, value in layer.moments().items():
            assert torch.equal(value, getattr(expected[name], key)), (name, key)
    assert find_irreplaceable(model, form, find_linears(model, REPLACED[family])) == {}


@pytest.mark.parametrize("form", FORMS)
def test_data_of_empty_batches_alone_are_refused(form: str) -> None:
    data = [FORMS[form](torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))]
    with pytest.raises(ValueError, match="`batches` must"):
        collect_statistics(net(), data)
    with pytest.raises(ValueError, match="`batches` must hold at least one target"):
        evaluate(net(), data, "classification")
    with pytest.raises(ValueError, match="`batches` must hold at least one batch, got none"):
        next(repeat_batches(data)(0))
    with pytest.raises(ValueError, match="`batches` must hold samples, at step 0, got 'an empty batch'"):
        fit(net(), lambda done: data, Recipe(1), model_loss, progress=False)


@pytest.mark.parametrize(
    "batch", [5, "x", None, (), {}, (5, 6), [[1.0]], {"x": None}, np.ones((2, 6)), ["a.png"]], ids=str
)
@pytest.mark.usefixtures("unchecked")
def test_batches_without_tensors_are_refused(batch: Any) -> None:
    model = net()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    factored, _ = compressed(batches(None), method="svd")
    for run in (
        lambda: collect_statistics(model, [batch]),
        lambda: compress(model, [batch], 0.8, progress=False),
        lambda: compress(model, [batch], 0.8, retarget=True, progress=False),
        lambda: evaluate(model, [batch], "classification"),
        lambda: mean_divergence(model, model, [batch]),
        lambda: fit(model, lambda done: [batch], Recipe(1), model_loss, progress=False),
        lambda: refine_factors(factored, [batch], recipe=Recipe(2), progress=False),
    ):
        with pytest.raises(ValueError, match="`batches` must hold tensors: each .*, got "):
            run()
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
