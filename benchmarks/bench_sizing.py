"""What each stage of a compression costs against the size of the model: `make bench`. The table goes to outputs/bench/sizing.csv.

Seconds are a coefficient times an amount of work that the shapes of the layers give; bytes are exact. The coefficients are of
small Llamas with random weights, each in a process of its own, on one core. `predicted` rows are the largest of them from the
others alone; `extrapolated` ones the published shapes of 7B and 70B from all.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import llama
from shared import peak_megabytes, recorder

from lowrank.calibration.collect import collect_statistics
from lowrank.compression.checkpoint import load_compressed, save_compressed
from lowrank.compression.replace import replace_layers
from lowrank.factorization.rank_allocation import allocate_ranks
from lowrank.nn.targets import find_linears

COLUMNS = ("kind", "model", "stage", "work", "work_of", "seconds", "ns_per_work", "bytes", "peak_mb")
row, table = recorder("sizing", *COLUMNS)
HIDDEN, LAYERS, VOCABULARY, KEEP = (256, 512, 768, 1024), 2, 1000, 0.5
BATCH, BATCHES = (4, 128), 8  # samples x tokens
LARGE = {  # hidden, intermediate, width of keys, layers: the published shapes, in bfloat16, with 256 samples of 2048 tokens
    "Llama 7B": (4096, 11008, 4096, 32),
    "Llama 70B": (8192, 28672, 1024, 80),
}
LARGE_TOKENS = 256 * 2048

Costs = dict[str, tuple[str, int, int]]  # stage -> what its time is proportional to, how much of it, bytes held


def costs(hidden: int, intermediate: int, keys: int, layers: int, tokens: int, width: int) -> Costs:
    """The stages of a compression of the layers in the blocks; `width`: bytes of a stored weight."""
    h, f = hidden, intermediate
    shapes = [(h, h), (keys, h), (keys, h), (h, h), (f, h), (f, h), (h, f)]
    inputs = [h, h, h, f]  # of q, k and v; of o; of gate and up; of down
    weights = layers * sum(m * n for m, n in shapes)
    squares = sum(n * n for n in inputs)
    widest = max(m * n for m, n in shapes)
    forward, grams = ("tokens x weights", tokens * weights), ("tokens x sum of n^2", tokens * layers * squares)
    eigen = "sum of min(m, n)^3", layers * sum(min(shape) ** 3 for shape in shapes)
    rest = "sum of m n (m + n)", layers * sum(m * n * (m + n) for m, n in shapes)
    stored = "bytes", round(KEEP * weights * width)
    return {
        "forward pass": (*forward, weights * width),
        "second moments": (*grams, 8 * (layers * squares + f * f)),
        "eigendecompositions": (*eigen, 40 * widest),
        "the rest of compress": (*rest, 40 * widest),
        "save": (*stored, stored[1]),
        "load": (*stored, stored[1]),
        "forward passes, one per block": (forward[0], layers * forward[1], weights * width),
        "second moments, block by block": (*grams, 8 * (squares + f * f)),
    }


def measure(hidden: int, answer: Any) -> None:
    """Puts stage -> its seconds of CPU time, the faster of two runs, and the most megabytes beyond what was held before."""
    torch.set_num_threads(1)
    stages(HIDDEN[0])  # loads all code
    runs = [stages(hidden) for _ in range(2)]
    answer.put({name: (min(run[name][0] for run in runs), max(run[name][1] for run in runs)) for name in runs[0]})


def stages(hidden: int) -> dict[str, tuple[float, float]]:
    torch.manual_seed(0)
    model = llama(hidden, LAYERS, VOCABULARY).eval()
    batches = [{"input_ids": torch.randint(0, VOCABULARY, BATCH)} for _ in range(BATCHES)]
    shapes = {name: tuple(layer.weight.shape) for name, layer in find_linears(model).items()}
    symmetric = [torch.randn(min(shape), min(shape), dtype=torch.float64) for shape in shapes.values()]
    symmetric = [matrix + matrix.T for matrix in symmetric]
    found: dict[str, tuple[float, float]] = {}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        with peak_megabytes() as peak:
            start = time.process_time()
            result = call()
            found[stage] = time.process_time() - start, peak()
        return result

    with torch.no_grad():
        timed("forward pass", lambda: [model(**batch) for batch in batches])
    statistics = timed("second moments", lambda: collect_statistics(model, batches))
    timed("eigendecompositions", lambda: [torch.linalg.eigh(matrix) for matrix in symmetric])
    timed("the rest of compress", lambda: replace_layers(model, allocate_ranks(shapes, KEEP), "whitened", statistics))
    with tempfile.TemporaryDirectory() as folder:
        timed("save", lambda: save_compressed(model, folder))
        timed("load", lambda: load_compressed(folder))
    return found


def fitted(points: list[tuple[float, int]]) -> float:
    """Seconds per unit of work: a line through the origin, on which the largest weighs most."""
    return sum(seconds for seconds, _ in points) / sum(work for _, work in points)


def write(kind: str, model: str, stage: str, cost: tuple[str, int, int], seconds: float, peak: float | None) -> None:
    row(kind, model, stage, cost[1], cost[0], seconds, 1e9 * seconds / cost[1], cost[2], peak)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a part of a process needs Linux")
def test_costs_against_the_size_of_the_model(benchmark) -> None:
    context = multiprocessing.get_context("spawn")
    points: dict[str, list[tuple[float, int]]] = {}
    for hidden in HIDDEN:
        answer = context.Queue()
        process = context.Process(target=measure, args=(hidden, answer))
        process.start()
        found = answer.get(timeout=600)
        process.join()
        cost = costs(hidden, 11 * hidden // 4, hidden // 4, LAYERS, BATCH[0] * BATCH[1] * BATCHES, 4)
        parts = {"second moments": "forward pass", "the rest of compress": "eigendecompositions"}  # measured with these
        took = {
            stage: seconds - found.get(parts.get(stage, ""), (0.0, 0.0))[0] for stage, (seconds, _) in found.items()
        }
        for stage, seconds in took.items():
            points.setdefault(stage, []).append((seconds, cost[stage][1]))
            write("measured", f"Llama {hidden}, {LAYERS} layers", stage, cost[stage], seconds, found[stage][1])
    for stage, measured in points.items():
        seconds = fitted(measured[:-1]) * measured[-1][1]
        write("predicted", f"Llama {HIDDEN[-1]}, {LAYERS} layers", stage, cost[stage], seconds, None)
    for name, shape in LARGE.items():
        for stage, own in costs(*shape, tokens=LARGE_TOKENS, width=2).items():
            of = {"forward passes, one per block": "forward pass", "second moments, block by block": "second moments"}
            write("extrapolated", name, stage, own, fitted(points[of.get(stage, stage)]) * own[1], None)
    benchmark.pedantic(lambda: None, rounds=1)
