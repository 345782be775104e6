"""The cost of a PREHAB step beside one of plain fine-tuning: `make bench`. The table goes to outputs/bench/prehab.csv.

Runs take turns in one process; a step is the mean over whole periods of `refresh` steps, decompositions included.
"""

import copy
import time
from statistics import mean, median

import torch
from shared import recorder
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lowrank.calibration.collect import collect_statistics
from lowrank.nn.batches import Batch
from lowrank.training.loop import Recipe, fit
from lowrank.training.penalties import PENALTIES
from lowrank.training.prehab import PrehabConfig, prehab
from lowrank.training.refine import model_loss, repeat_batches

row, table = recorder("prehab")
ROUNDS, PERIOD = 2, 10
BATCH, TOKENS = 32, 48  # as batches of SST-2's training split come, padded to their longest: 34 to 66, mean 48


def minilm() -> nn.Module:
    """The architecture of all-MiniLM-L6-v2 with two classes."""
    sizes = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertForSequenceClassification(BertConfig(**sizes))


def test_a_step_against_plain_fine_tuning(benchmark) -> None:
    torch.manual_seed(0)
    model = minilm()
    batches = [
        {"input_ids": torch.randint(0, 30000, (BATCH, TOKENS)), "labels": torch.randint(0, 2, (BATCH,))}
        for _ in range(4)
    ]
    statistics = collect_statistics(model, batches)
    recipe = Recipe(steps=2 * PERIOD + 1, batch_size=BATCH, learning_rate=1e-5)
    stamps: list[float] = []

    def loss(wrapped: nn.Module, batch: Batch) -> Tensor:
        stamps.append(time.perf_counter())
        return model_loss(wrapped, batch)

    def step(name: str) -> float:
        stamps.clear()
        own, options = copy.deepcopy(model), dict(loss=loss, progress=False)
        if name == "plain":
            fit(own, repeat_batches(batches), recipe, **options)  # pyright: ignore
        else:
            penalty = dict(penalty=name, strength=1.0) if name in PENALTIES else dict(strength=0.0)
            config = PrehabConfig(steps=recipe.steps, refresh=PERIOD, **penalty)
            prehab(own, statistics, batches, config, recipe=recipe, **options)
        return mean(later - earlier for earlier, later in zip(stamps[PERIOD:], stamps[PERIOD + 1 :], strict=False))

    taken: dict[str, list[float]] = {name: [] for name in ("plain", "no penalty", *PENALTIES)}
    for _ in range(ROUNDS):
        for name, times in taken.items():
            times.append(step(name))
    plain = median(taken.pop("plain"))
    for name, times in taken.items():
        case = f"all-MiniLM-L6-v2, {BATCH} x {TOKENS} tokens"
        row(f"PREHAB step, {name}, over one of plain fine-tuning", case, "time ratio", median(times) / plain)
    benchmark.pedantic(lambda: None, rounds=1)
