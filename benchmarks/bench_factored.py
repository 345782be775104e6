"""Costs of compressing, and what compressed layers are worth: `make bench`. The tables go to outputs/bench/, factored.csv and
layers.csv.

Ratios are of medians of calls that take turns in one process. Memory is the peak of a process of its own.
"""

import copy
import multiprocessing
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from recipes import LAYERS, bert, forward, layer_rows, llama, svd_llm_factors, svd_llm_moments
from shared import peak_megabytes, ratio, recorder
from torch import Tensor, nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.on_demand import OnDemand
from lowrank.calibration.predictive_loss import predictive_loss
from lowrank.compression.compress import compress
from lowrank.compression.replace import replace_layers
from lowrank.factorization.block_sums import outer_sum
from lowrank.factorization.gram import eigh
from lowrank.factorization.rank_allocation import allocate_ranks
from lowrank.nn.profiling import time_in_turns
from lowrank.nn.targets import find_linears

row, table = recorder("factored")
layer_row, layer_table = recorder("layers", *LAYERS)
TOKENS = 4096


MODELS = {
    "BERT 768, 2 layers": lambda: bert(768, 2),
    "Llama 1024, 1 layer": lambda: llama(1024, 1),
    "Llama 2048, 1 layer": lambda: llama(2048, 1),
}


KEEPS = (0.5, 0.3)


@pytest.mark.parametrize("case", MODELS)
def test_compressing_against_the_svd_llm_recipe(case: str, benchmark) -> None:
    torch.manual_seed(0)
    model = MODELS[case]()
    batches = [{"input_ids": torch.randint(0, 8000, (16, 128))} for _ in range(4)]
    shapes = {name: tuple(layer.weight.shape) for name, layer in find_linears(model).items()}
    squares = {size: outer_sum(torch.randn(2 * size, size).double()) for size in map(min, shapes.values())}

    def ours(ranks: dict[str, int], storage: str = "factors") -> None:
        how = dict(method="whitened", storage=storage, centre=False, progress=False)
        compress(copy.deepcopy(model), batches, ranks=ranks, **how)

    def theirs(ranks: dict[str, int]) -> None:
        svd_llm_factors(copy.deepcopy(model), ranks, svd_llm_moments(model, ranks, batches))

    def eigenpairs(ranks: dict[str, int]) -> None:
        for name, rank in ranks.items():
            eigh(squares[min(shapes[name])], rank)

    smaller = dict(side="smaller", methods=["whitened"])
    calls = {
        ("moments", None): lambda: collect_statistics(model, batches, **smaller),
        ("forward", None): lambda: forward(model, batches),
    }
    for keep in KEEPS:
        ranks = allocate_ranks(shapes, keep)
        calls["theirs", keep] = partial(theirs, ranks)
        calls["ours", keep] = partial(ours, ranks)
        calls["pivoted", keep] = partial(ours, ranks, "pivoted")
        calls["eigenpairs", keep] = partial(eigenpairs, ranks)
    seconds = time_in_turns(calls, repeats=3, warmup=1, clock=time.process_time)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    moments, passes = seconds["moments", None], seconds["forward", None]
    for keep in KEEPS:
        least = [one + other for one, other in zip(moments, seconds["eigenpairs", keep], strict=True)]
        for what, other in {
            "compress: SVD-LLM recipe over ours, moments included": seconds["ours", keep],
            "the same with pivoted storage": seconds["pivoted", keep],
            "the same if only moments and one eigendecomposition a layer took time": least,
            "the same if only moments took time": moments,
            "the same if only forward passes took time": passes,
        }.items():
            about = f"{case}, {tokens} tokens, keep {keep}", "CPU time ratio"
            row(what, *about, *ratio(seconds["theirs", keep], other))
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("shape", [(3072, 768), (1024, 1024), (4096, 4096)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_layers_against_dense(shape: tuple[int, int], keep: float, benchmark) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for found in layer_rows(shape, keep, TOKENS, device, dtype):
        layer_row(*found.values())
    benchmark.pedantic(lambda: None, rounds=1)


SIZE = dict(hidden=2048, layers=8, vocabulary=32000)


def _large(sizes: dict[str, int]) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A model of bfloat16 parameters with random values, and a batch; the forward pass has been run."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = llama(**sizes).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    for buffer in model.buffers():
        buffer.data.fill_(0.5)
    batches = [{"input_ids": torch.randint(0, sizes["vocabulary"], (1, 128))}]
    with torch.no_grad():
        model(**batches[0])  # what a forward pass takes is not what compressing takes
    return model, batches


def _compress_on_demand(answer, side: str) -> None:
    """A model compressed block by block: (parameters, peak over it in MB)."""
    model, batches = _large(SIZE)
    shapes = {name: tuple(layer.weight.shape) for name, layer in find_linears(model).items()}
    size = sum(p.numel() for p in model.parameters())
    options = dict(side=side) | (dict(methods=["whitened"]) if side == "smaller" else {})
    with peak_megabytes() as peak:
        replace_layers(model, allocate_ranks(shapes, 0.5), "whitened", OnDemand(model, batches, **options))
    answer.put((size, peak()))


def _compress_block(answer, side: str) -> None:
    """One block of the shapes of Llama-2-7B, `two_sided`: (parameters, peak over the model in MB)."""
    model, batches = _large(dict(hidden=4096, layers=1, vocabulary=1000, intermediate=11008, kv_heads=64))
    size = sum(p.numel() for p in model.parameters())
    with peak_megabytes() as peak:
        loss = predictive_loss()
        moments = collect_statistics(model, batches, loss=loss, side=side, methods=["two_sided"])
        compress(model, keep=0.5, statistics=moments, method="two_sided", allocation="uniform", progress=False)
    answer.put((size, peak()))


def _in_a_process(function, *arguments: object) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=function, args=(answer, *arguments))
    process.start()
    found = answer.get(timeout=1800)
    process.join()
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a part of a process needs Linux")
def test_memory_of_compressing_a_large_model(benchmark) -> None:
    size, peak = _in_a_process(_compress_on_demand, "smaller")
    _, before = _in_a_process(_compress_on_demand, "inputs")
    case = f"Llama of {size / 1e6:.0f} M bfloat16 parameters, {SIZE['layers']} layers"
    row("compress, peak memory beyond the model", case, "MB", peak)
    row("the same with moments of the inputs", case, "MB", before)
    row("a second copy of the model would be", case, "MB", 2 * size / 1e6)
    row("all factors in float64 would be", case, "MB", 8 * size * 0.5 / 1e6)
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a part of a process needs Linux")
def test_memory_of_a_block_of_a_7b_model(benchmark) -> None:
    size, peak = _in_a_process(_compress_block, "smaller")
    case = f"a block of the shapes of Llama-2-7B, {size / 1e6:.0f} M bfloat16 parameters, two_sided"
    row("statistics and compress, peak memory beyond the model", case, "MB", peak)
    row("the second moments alone with those of the inputs", case, "MB", 8 * (7 * 4096**2 + 3 * 11008**2) / 1e6)
    benchmark.pedantic(lambda: None, rounds=1)
