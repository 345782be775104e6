"""The page of costs: shapes are those of the models, lines add up, and several GPUs share what grows with the tokens."""

import re

import pandas as pd
import pytest
import torch
import transformers

from lowrank.nn.targets import find_linears
from lowrank.report.scaling_tables import ASSUMED_RATES, GPUS, SHAPES, _compress_seconds, several_gpus

NARROW = dict(hidden_size=384, num_attention_heads=12)
MODELS = {
    "wikitext2-gemma270m": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
        )
    ),
    "cifar10-dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**NARROW, num_hidden_layers=12)),
    "sst2-minilm": lambda: transformers.BertModel(
        transformers.BertConfig(**NARROW, num_hidden_layers=6, intermediate_size=1536)
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_architecture(name: str) -> None:
    with torch.device("meta"):
        layers = find_linears(MODELS[name]())
    assert sorted(SHAPES[name]) == sorted(tuple(layer.weight.shape) for layer in layers.values())


def test_seconds_are_the_sum_of_the_lines() -> None:
    lines = {"eigendecompositions": 2.0, "the rest of compress": 3.0, "forward pass": 100.0}
    wanted = 1e-9 * (2 * (10**3 + 5**3) + 3 * (10 * 20 * 30 + 5 * 5 * 10))
    assert _compress_seconds([(20, 10), (5, 5)], lines) == pytest.approx(wanted)


def test_times_are_operations_over_the_rates_of_all_gpus() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in several_gpus().splitlines()]
    table = pd.DataFrame(lines[2:], columns=lines[0])
    assert len(table) == 2 * len(ASSUMED_RATES)
    for _, row in table.iterrows():
        operations = float(re.sub(r"[^\d]", "", row.operations.split("×")[0])) * 1e15
        for count in GPUS:
            number, unit = row[f"{count} GPU{'s' * (count > 1)}"].split()
            seconds = float(number.replace(",", "")) * {"s": 1, "h": 3600}[unit]
            assert seconds == pytest.approx(operations / ASSUMED_RATES[row.stage] / count, rel=0.1, abs=0.5)
