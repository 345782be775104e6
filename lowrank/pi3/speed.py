"""How long a forward pass of π³ takes, by the published protocol and by a fair one.

Published: one forward pass of a process that has made none before. Fair: models take turns, a warm-up, medians of many,
the device waited for. Speed does not depend on the values of weights, so they may be random.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.factorization.rank_allocation import kept_parameters, rank_for_keep
from lowrank.nn.batches import device_of
from lowrank.nn.low_rank import LowRankLinear
from lowrank.nn.profiling import peak_bytes, synchronize, time_in_turns, weight_bytes
from lowrank.nn.surgery import replace_module
from lowrank.nn.targets import find_linears
from lowrank.pi3.model import Pi3, Pi3Config, autocast

# Groups of layers that are compressed, each with what is in the one before. Output heads stay dense: they are in float32.
TARGETS: Mapping[str, tuple[str, ...]] = {"decoder": (r"decoder\.\d+\..*",)}
TARGETS = TARGETS | {"decoder + encoder": (*TARGETS["decoder"], r"encoder\.blocks\..*")}
TARGETS = TARGETS | {"all linears": (*TARGETS["decoder + encoder"], r"(point|conf|camera)_decoder\..*")}


def published_ranks(model: nn.Module, targets: str, keep: float | int, storage: str = "factors") -> dict[str, int]:
    """layer -> the largest rank within `keep` of each layer of a group of `TARGETS`.

    **Raises:** `ValueError`: an unknown group, `keep` outside (0, 1].
    """
    if targets not in TARGETS:
        raise ValueError(f"`targets` must be one of {list(TARGETS)}, got {targets!r}.")
    linears = find_linears(model, TARGETS[targets])
    return {name: rank_for_keep(tuple(layer.weight.shape), keep, storage) for name, layer in linears.items()}


def random_pi3(
    config: Pi3Config, ranks: Mapping[str, int] | None = None, device: torch.device | str = "cpu"
) -> tuple[Pi3, dict[str, int]]:
    """A π³ of random weights, with layers of two factors where `ranks` names them and they are smaller, to be timed.

    **Returns:** the model in evaluation mode, and the parameters that each factored layer saves.
    """
    with torch.device("meta"):
        model = Pi3(config)
    saved: dict[str, int] = {}
    linears = find_linears(model, list(ranks)) if ranks else {}
    for name, layer in linears.items():
        shape = tuple(layer.weight.shape)
        if (less := shape[0] * shape[1] - kept_parameters(shape, ranks[name])) > 0:  # pyright: ignore
            with torch.device("meta"):
                made = LowRankLinear(shape[1], shape[0], ranks[name], bias=layer.bias is not None)  # pyright: ignore
            replace_module(model, name, made)
            saved[name] = less
    model = model.to_empty(device=device)
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.02) if tensor.dim() > 1 else nn.init.ones_(tensor)
    for tensor in model.buffers():
        nn.init.ones_(tensor)
    return model.eval(), saved


def forward(model: nn.Module, images: Tensor, precision: str = "fp32") -> Callable[[], object]:
    """A forward pass without gradients, as users run it."""
    device = device_of(model)

    def run() -> object:
        with torch.no_grad(), autocast(device, precision):
            return model(images)

    return run


def _first_seconds(
    config: dict[str, Any], ranks: dict[str, int], shape: tuple[int, ...], precision: str, device: str
) -> float:
    torch.set_grad_enabled(False)
    model, _ = random_pi3(Pi3Config(**config), ranks, device)
    run = forward(model, torch.rand(shape).to(device), precision)
    synchronize(torch.device(device))
    start = time.perf_counter()
    run()
    synchronize(torch.device(device))
    return time.perf_counter() - start


def first_seconds(
    config: Pi3Config,
    ranks: Mapping[str, int],
    shape: tuple[int, ...],
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> float:
    """The published measurement: seconds of the first forward pass of a new process, on images of a shape
    `(scenes, views, 3, height, width)`. Set-up of libraries and growth of the allocator are in it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        given = (asdict(config), dict(ranks), shape, precision, str(device))
        return pool.submit(_first_seconds, *given).result()


def compare_speed(
    models: Mapping[str, nn.Module],
    shape: tuple[int, ...],
    precision: str = "fp32",
    *,
    repeats: int = 10,
    warmup: int = 2,
) -> list[dict[str, Any]]:
    """The fair measurement: models on one device take turns.

    **Arguments:** `models`: the first is what the others are compared with. `shape`: of the images,
    `(scenes, views, 3, height, width)`. `repeats`, `warmup`: see `time_in_turns`.

    **Returns:** rows of `model`, `forward_ms` (median) and its quartile range `spread_ms`, `frames_per_s`, `speed_up` over the
    first model, `weights_mb`, and `peak_mb` beyond them, both in 10^6 bytes.
    """
    device = device_of(next(iter(models.values())))
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    runs = {name: forward(model.eval(), images, precision) for name, model in models.items()}
    times = time_in_turns(runs, repeats=repeats, warmup=warmup, device=device)
    first = median(next(iter(times.values())))
    rows = []
    for name, seconds in times.items():
        quartiles = torch.tensor(seconds).quantile(torch.tensor([0.25, 0.75]))
        rows.append(
            {
                "model": name,
                "forward_ms": 1e3 * median(seconds),
                "spread_ms": 1e3 * float(quartiles[1] - quartiles[0]),
                "frames_per_s": shape[0] * shape[1] / median(seconds),
                "speed_up": first / median(seconds),
                "weights_mb": weight_bytes(models[name]) / 1e6,
                "peak_mb": peak_bytes(runs[name], device) / 1e6,
            }
        )
    return rows
