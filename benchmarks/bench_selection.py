"""What scores and assignments cost, in CPU time: `make bench`. The table goes to outputs/bench/selection.csv.

Exponents of the linears of BERT-base against WeightWatcher's, at the same values; assignments over the 224 layers of a 7B Llama.
"""

import contextlib
import io
import logging
import os
import time

import numpy as np
import pytest
import torch
from recipes import bert
from shared import ratio, recorder, spread

from lowrank.nn.profiling import time_in_turns
from lowrank.selection.assignment import assign_layers
from lowrank.selection.esd import eigenvalues
from lowrank.selection.scoring import ScoringConfig, layer_scores

row, table = recorder("selection")
SIZES = [4096 * 4096] * 4 + [4096 * 11008] * 3  # of a block of a 7B Llama
SMALLEST = 1e-5  # WeightWatcher leaves smaller eigenvalues out


def test_exponents(benchmark) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    with contextlib.redirect_stdout(io.StringIO()):
        import weightwatcher  # noqa: PLC0415
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model = bert(768, 12).encoder
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.div_(torch.rand(weight.shape, generator=generator).clamp_min(1e-3).sqrt())  # a heavy tail
    found: dict[str, dict[str, float]] = {}

    def ours() -> None:
        scores = layer_scores(model, "alpha", ScoringConfig(smallest=SMALLEST), progress=False)
        found["ours"] = {row["name"]: row["raw_metric"] for row in scores.layers}

    def theirs() -> None:
        about = weightwatcher.WeightWatcher(model=model).analyze()
        found["theirs"] = dict(zip(about.longname, about.alpha, strict=True))

    def least() -> None:
        for name in found["ours"]:
            eigenvalues(model.get_submodule(name).weight)

    calls = {"ours": ours, "theirs": theirs, "least": least}
    times = time_in_turns(calls, repeats=7, warmup=1, clock=time.process_time)
    logging.disable(logging.NOTSET)
    assert found["ours"] == pytest.approx(found["theirs"], rel=1e-9)
    case = f"{len(found['ours'])} linears of BERT-base"
    row("exponents: WeightWatcher over ours", case, "CPU time ratio", *ratio(times["theirs"], times["ours"]))
    row("the same if all took no time but eigenvalues", case, "CPU time ratio", *ratio(times["theirs"], times["least"]))
    row("exponents: ours", case, "s of CPU time", *spread(times["ours"]))
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize(
    ("order", "verifiers", "kinds"),
    [
        ("fixed", 8, 8),
        ("free", 3, 3),
        ("free", 8, 8),
        ("free", 12, 12),
        ("free", 14, 14),
        ("free", 20, 2),
        ("free", 20, 20),
    ],
)
def test_assignment(benchmark, order: str, verifiers: int, kinds: int) -> None:
    generator = np.random.default_rng(0)
    costs = SIZES * 32
    values = generator.random(len(costs)).tolist()
    shares = generator.uniform(0.3, 1.7, kinds)[np.arange(verifiers) % kinds]
    budgets = [int(budget) for budget in 0.25 * sum(costs) * shares / shares.sum()]
    case = f"{len(costs)} layers, {verifiers} verifiers of {kinds} budgets, {order} order"
    slow = kinds > 14
    given: dict[str, float] = {"seconds": 30} if slow else {}
    found = assign_layers(values, costs, budgets, order, **given)
    run = lambda: assign_layers(values, costs, budgets, order, **given)  # noqa: E731
    rounds = dict(repeats=1, warmup=0) if slow else dict(repeats=31, warmup=1)
    times = time_in_turns({"run": run}, **rounds, clock=time.process_time)["run"]
    row("assignment", case, "ms of CPU time", *spread([1000 * seconds for seconds in times]))
    row("assignment", case, "certified gap, %", 100 * found.gap)
    assert found.optimal or slow
    benchmark.pedantic(lambda: None, rounds=1)
