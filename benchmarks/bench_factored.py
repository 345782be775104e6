"""Costs of compressing, and what compressed layers are worth: `make bench`. The tables go to outputs/bench/, factored.csv and
layers.csv.

Ratios are of medians of calls that take turns in one process. Memory is the peak of a process of its own.
"""

import copy
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import pytest
import torch
from shared import bert, llama, peak_megabytes, recorder
from torch import Tensor, nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.on_demand import OnDemand
from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import replace_layers
from lowrank.factorization.factorize import Factors
from lowrank.factorization.rank_allocation import allocate_ranks, rank_for_keep
from lowrank.factorization.storages import STORAGES
from lowrank.nn.batches import eval_mode
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.nn.profiling import count_flops, time_in_turns
from lowrank.nn.targets import find_linears

row, table = recorder("factored")
LAYERS = ("layer", "tokens", "dtype", "keep", "storage", "multiple", "rank", "speedup", "flop_ratio", "share")
layer_row, layer_table = recorder("layers", *LAYERS)
TOKENS = 4096


def svd_llm_moments(model: nn.Module, layers: Iterable[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """SVD-LLM's code: a float32 Gram for every layer, added up in hooks."""
    linears = find_linears(model, layers)
    grams = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in linears.items()}

    def watch(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].flatten(0, -2)
            grams[name] += x.T @ x

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in linears.items()]
    forward(model, batches)
    for handle in handles:
        handle.remove()
    return grams


def svd_llm_factors(model: nn.Module, ranks: dict[str, int], grams: dict[str, Tensor]) -> None:
    """SVD-LLM's code: Cholesky of the Gram in float64, on failure an absolute ridge; explicit inverse; full SVD of W S in
    float32; two factors with the root of the singular values on each."""
    for name, layer in find_linears(model, ranks).items():
        gram = grams[name].double()
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            smallest = torch.linalg.eigvalsh(gram)[0]
            factor = torch.linalg.cholesky(gram + (smallest.abs() + 1e-6) * torch.eye(len(gram), dtype=gram.dtype))
        inverse = torch.linalg.inv(factor).float()
        u, sigma, vt = torch.linalg.svd(layer.weight.detach() @ factor.float(), full_matrices=False)
        root = sigma[: ranks[name]].sqrt()
        right = nn.Linear(layer.in_features, ranks[name], bias=False)
        left = nn.Linear(ranks[name], layer.out_features, bias=layer.bias is not None)
        right.weight.data = (root[:, None] * vt[: ranks[name]]) @ inverse
        left.weight.data = u[:, : ranks[name]] * root
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, nn.Sequential(right, left))


def forward(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    with eval_mode(model), torch.no_grad():
        for batch in batches:
            model(**batch)


MODELS = {
    "BERT 768, 2 layers": lambda: bert(768, 2),
    "Llama 1024, 1 layer": lambda: llama(1024, 1),
    "Llama 2048, 1 layer": lambda: llama(2048, 1),
}


@pytest.mark.parametrize("case", MODELS)
def test_compressing_against_the_svd_llm_recipe(case: str, benchmark) -> None:
    torch.manual_seed(0)
    model = MODELS[case]()
    batches = [{"input_ids": torch.randint(0, 8000, (16, 128))} for _ in range(4)]
    ranks = allocate_ranks({name: tuple(layer.weight.shape) for name, layer in find_linears(model).items()}, 0.5)
    statistics, grams = collect_statistics(model, batches), svd_llm_moments(model, ranks, batches)

    def ours(storage: str = "factors") -> None:
        replace_layers(copy.deepcopy(model), ranks, Configuration("whitened", storage), statistics)

    seconds = time_in_turns(
        {
            "forward": lambda: forward(model, batches),
            "our moments": lambda: collect_statistics(model, batches),
            "their moments": lambda: svd_llm_moments(model, ranks, batches),
            "our factors": ours,
            "pivoted": lambda: ours("pivoted"),
            "their factors": lambda: svd_llm_factors(copy.deepcopy(model), ranks, grams),
        },
        repeats=3,
        warmup=1,
    )
    took = {name: median(times) for name, times in seconds.items()}
    case = f"{case}, {sum(batch['input_ids'].numel() for batch in batches)} tokens"
    ours_all, theirs_all = (took[f"{whose} moments"] + took[f"{whose} factors"] for whose in ("our", "their"))
    row("compress: SVD-LLM recipe over ours, moments included", case, "time ratio", theirs_all / ours_all)
    row("compress: the same, moments given", case, "time ratio", took["their factors"] / took["our factors"])
    row("compress: the same if our decomposition took no time", case, "time ratio", theirs_all / took["our moments"])
    row("compress: forward passes, in both, of our time", case, "share", took["forward"] / ours_all)
    row(
        "compress: pivoted over factor storage, moments given",
        case,
        "time ratio",
        took["pivoted"] / took["our factors"],
    )
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("shape", [(3072, 768), (1024, 1024), (4096, 4096)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_layers_against_dense(shape: tuple[int, int], keep: float, benchmark) -> None:
    out, inputs = shape
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(TOKENS, inputs, device=device, dtype=dtype)
    layers: dict[tuple[object, ...], nn.Module] = {}
    for storage in STORAGES:
        for multiple in (1, 8, 64):
            rank = rank_for_keep(shape, keep, storage, multiple)
            left, right = torch.randn(out, rank), torch.randn(rank, inputs)
            factors = Factors(left, right, torch.zeros(min(shape)))
            made = FACTORED_LAYERS[storage].from_factors(factors, torch.zeros(out), dtype)
            layers[storage, multiple, rank] = made.to(device)
    layers["dense",] = nn.Linear(inputs, out, bias=True, device=device, dtype=dtype)
    with torch.no_grad():
        calls = {key: (lambda layer=layer: layer(x)) for key, layer in layers.items()}
        seconds = time_in_turns(calls, repeats=7, warmup=2, device=device)
        flops = {key: count_flops(call) for key, call in calls.items()}
    dense = flops.pop(("dense",)), median(seconds.pop(("dense",)))
    for key, own in flops.items():
        speedup, ceiling = dense[1] / median(seconds[key]), dense[0] / own
        about = f"{out}x{inputs}", TOKENS, str(dtype).removeprefix("torch.")
        layer_row(*about, keep, *key, speedup, ceiling, speedup / ceiling)
    benchmark.pedantic(lambda: None, rounds=1)


SIZE = dict(hidden=2048, layers=8, vocabulary=32000)


def _compress_large(answer) -> None:
    """A model of hundreds of millions of bfloat16 parameters, compressed block by block: (model MB, peak over it MB)."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = llama(**SIZE).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    for buffer in model.buffers():
        buffer.data.fill_(0.5)
    shapes = {name: tuple(layer.weight.shape) for name, layer in find_linears(model).items()}
    batches = [{"input_ids": torch.randint(0, SIZE["vocabulary"], (1, 128))}]
    size = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        model(**batches[0])  # what a forward pass takes is not what compressing takes
    with peak_megabytes() as peak:
        replace_layers(model, allocate_ranks(shapes, 0.5), "whitened", OnDemand(model, batches))
    hidden, widest = min(shapes.values())[1], max(inputs for _, inputs in shapes.values())
    moments = 8 * (3 * hidden**2 + widest**2)  # of a block: inputs of attention, of its output, of the MLP's two sides
    answer.put((size, peak(), (moments + 8 * max(5 * hidden * widest, widest**2)) / 1e6))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a part of a process needs Linux")
def test_memory_of_compressing_a_large_model(benchmark) -> None:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_compress_large, args=(answer,))
    process.start()
    size, peak, formula = answer.get(timeout=1800)
    process.join()
    case = f"Llama of {size / 1e6:.0f} M bfloat16 parameters, {SIZE['layers']} layers"
    row("compress, peak memory beyond the model", case, "MB", peak)
    row("the same by the formula of compress's docstring", case, "MB", formula)
    row("a second copy of the model would be", case, "MB", 2 * size / 1e6)
    row("all factors in float64 would be", case, "MB", 8 * size * 0.5 / 1e6)
    benchmark.pedantic(lambda: None, rounds=1)
