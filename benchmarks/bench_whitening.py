"""Costs of whitening as ratios measured in one run: `make bench`. The table goes to outputs/bench/whitening.csv.

Competitors take turns, so that a machine that slows down slows them alike; a ratio is one of medians. Memory is the
peak of a process of its own.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recipes import bert, llama
from shared import peak_megabytes, ratio, recorder

from lowrank.calibration.collect import collect_statistics
from lowrank.factorization.alternatives import cholesky_inverse, compare_alternatives, projector
from lowrank.factorization.running_moments import statistics_of_rows
from lowrank.nn.batches import eval_mode
from lowrank.nn.profiling import time_in_turns

ROUNDS = 3
RATIOS = 7  # rounds of the ratios that a spread is given of
row, table = recorder("whitening")


def take_turns(*functions: Callable[[], object]) -> list[float]:
    """The median seconds of each function, called in turn."""
    times = time_in_turns(
        {str(number): function for number, function in enumerate(functions)},
        repeats=ROUNDS,
        warmup=1,
        clock=time.process_time,
    )
    return [statistics.median(seconds) for seconds in times.values()]


MODELS = {
    "BERT 384, 6 layers (MiniLM)": lambda: bert(384, 6),
    "BERT 768, 3 layers (a quarter of base)": lambda: bert(768, 3),
    "Llama 512, 4 layers": lambda: llama(512, 4),
}


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 8000, (16, 128), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("case", MODELS)
def test_statistics_against_a_forward_pass(case: str, benchmark) -> None:
    torch.manual_seed(0)
    model, data = MODELS[case](), batches(1)

    def forward() -> None:
        with eval_mode(model), torch.no_grad():
            for batch in data:
                model(**batch)

    smaller = dict(side="smaller", methods=["whitened"])
    calls = {
        "plain": forward,
        "pass with statistics on the smaller side": lambda: collect_statistics(model, data, **smaller),
        "the same, products in float64": lambda: collect_statistics(model, data, **smaller, products=torch.float64),
        "pass with statistics of the inputs": lambda: collect_statistics(model, data),
    }
    seconds = time_in_turns(calls, repeats=RATIOS, warmup=1, clock=time.process_time)
    for name in list(calls)[1:]:
        row(f"{name} over a plain forward pass", case, "CPU time ratio", *ratio(seconds[name], seconds["plain"]))
    benchmark.pedantic(lambda: collect_statistics(model, data, **smaller), rounds=1)


def _peak(count: int, collect: bool, answer) -> None:
    torch.manual_seed(0)
    model = bert(384, 2)
    data = batches(1) * count  # the tokens themselves are the same few, whatever their number
    with peak_megabytes() as peak:
        if collect:
            collect_statistics(model, data, side="smaller", methods=["whitened"])
        else:
            with eval_mode(model), torch.no_grad():
                for batch in data:
                    model(**batch)
    answer.put(peak())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a part of a process needs Linux")
def test_memory_against_tokens(benchmark) -> None:
    context = multiprocessing.get_context("spawn")

    def peak(count: int, collect: bool) -> float:
        answer = context.Queue()
        process = context.Process(target=_peak, args=(count, collect, answer))
        process.start()
        value = answer.get()
        process.join()
        return value

    for count in (1, 4, 16):
        extra = peak(count, True) - peak(count, False)
        row(
            "statistics, peak memory over a forward pass",
            f"BERT 384, 2 layers, {count * 2048:,} tokens",
            "extra MB",
            extra,
        )
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("shape", [(768, 768), (768, 3072), (3072, 768)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_projector_against_the_cholesky_recipe(shape: tuple[int, int], benchmark) -> None:
    out, inputs = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, inputs, generator=generator)
    rotation = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)).Q
    spread = torch.logspace(0, -12, inputs, dtype=torch.float64)
    rows = (torch.randn(2 * inputs, inputs, generator=generator, dtype=torch.float64) * spread) @ rotation
    moments, rank, case = statistics_of_rows(rows), min(shape) // 4, f"{out}x{inputs}, rank {min(shape) // 4}"
    ours, theirs, doubled = take_turns(
        lambda: projector(weight, rank, moments),
        lambda: cholesky_inverse(weight, rank, moments),
        lambda: _cholesky_in_double(weight, rank, moments),
    )
    row("Cholesky + inverse + SVD of W S (float32) over projector", case, "CPU time ratio", theirs / ours)
    row("the same in float64 over projector", case, "CPU time ratio", doubled / ours)
    excess = {name: over for name, over, _, _ in compare_alternatives(weight.double(), rank, moments, 1)}
    row("projector, cond(X) = 1e12", case, "error / optimum - 1", excess["projector"])
    row("Cholesky + inverse, cond(X) = 1e12", case, "error / optimum - 1", excess["cholesky + inverse"])
    benchmark.extra_info["ratio"] = theirs / ours
    benchmark.pedantic(lambda: projector(weight, rank, moments), rounds=1)


def _cholesky_in_double(weight: torch.Tensor, rank: int, moments) -> torch.Tensor:
    """The same recipe carried out in float64, with a ridge that lets it pass."""
    ridge = 1e-6 * moments.gram.diagonal().mean() * torch.eye(len(moments.gram), dtype=torch.float64)
    factor = torch.linalg.cholesky(moments.gram + ridge)
    inverse = torch.linalg.inv(factor)
    u, s, vt = torch.linalg.svd(weight.double() @ factor, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ (vt[:rank] @ inverse)
