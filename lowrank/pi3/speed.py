"""Time a forward pass of π³, by the published protocol and by a fair one.

Published: one forward pass of a process that has made none before. Fair: models take turns, with a warm-up and medians of many
passes, and the clock waits for the device. Speed does not depend on the values of weights, so they may be random.
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
from lowrank.io.checks import require
from lowrank.nn.batches import device_of
from lowrank.nn.low_rank import LowRankLinear
from lowrank.nn.profiling import peak_bytes, synchronize, time_in_turns, weight_bytes
from lowrank.nn.surgery import replace_module
from lowrank.nn.targets import find_linears
from lowrank.pi3.model import Pi3, Pi3Config, autocast

# Groups of layers to compress, each with the layers of the one before. Output heads stay dense, because they run in float32.
TARGETS: Mapping[str, tuple[str, ...]] = {"decoder": (r"decoder\.\d+\..*",)}
TARGETS = TARGETS | {"decoder + encoder": (*TARGETS["decoder"], r"encoder\.blocks\..*")}
TARGETS = TARGETS | {"all linears": (*TARGETS["decoder + encoder"], r"(point|conf|camera)_decoder\..*")}


def published_ranks(model: nn.Module, targets: str, keep: float | int, storage: str = "factors") -> dict[str, int]:
    """Compute the largest rank within a share of the parameters, for each layer of a group.

    **Arguments**

    - `model`: a dense π³; it may be on the meta device.
    - `targets`: the group of layers, a key of `TARGETS`.
    - `keep`: share of the parameters of each layer, in (0, 1].
    - `storage`: 'factors' or 'pivoted'; default 'factors'.

    **Returns** layer -> rank.

    **Raises**

    - `ValueError`: an unknown group; `keep` out of its range or too small for rank 1.
    """
    require(targets in TARGETS, "targets", f"be one of {list(TARGETS)}", targets)
    linears = find_linears(model, TARGETS[targets])
    return {name: rank_for_keep(tuple(layer.weight.shape), keep, storage) for name, layer in linears.items()}


def random_pi3(
    config: Pi3Config, ranks: Mapping[str, int] | None = None, device: torch.device | str = "cpu"
) -> tuple[Pi3, dict[str, int]]:
    """Build a π³ with random weights to be timed.

    **Arguments**

    - `config`: its sizes.
    - `ranks`: layer -> rank of layers that get two factors, unless the factors are as large as the weight. Default: none.
    - `device`: where the weights are; default: the CPU.

    **Returns** the model in evaluation mode, and layer -> parameters that its factors save.

    **Raises**

    - `ValueError`: a layer that does not exist; a rank out of its range.
    """
    with torch.device("meta"):
        model = Pi3(config)
    saved: dict[str, int] = {}
    linears = find_linears(model, list(ranks)) if ranks else {}
    for name, layer in linears.items():
        shape = tuple(layer.weight.shape)
        if (less := shape[0] * shape[1] - kept_parameters(shape, ranks[name])) > 0:  # pyright: ignore
            with torch.device("meta"):
                factored = LowRankLinear(shape[1], shape[0], ranks[name], bias=layer.bias is not None)  # pyright: ignore
            replace_module(model, name, factored)
            saved[name] = less
    model = model.to_empty(device=device)
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.02) if tensor.dim() > 1 else nn.init.ones_(tensor)
    for tensor in model.buffers():
        nn.init.ones_(tensor)
    return model.eval(), saved


def build_forward(model: nn.Module, images: Tensor, precision: str = "fp32") -> Callable[[], object]:
    """Build a function that makes one forward pass without gradients, as users run it.

    **Arguments**

    - `model`: a π³.
    - `images`: `(scenes, views, 3, height, width)`, in [0, 1], on the device of the model.
    - `precision`: 'fp32' or 'bf16'; default 'fp32'.
    """
    device = device_of(model)

    def run() -> object:
        with torch.no_grad(), autocast(device, precision):
            return model(images)

    return run


def _time_first_pass(
    config: dict[str, Any], ranks: dict[str, int], shape: tuple[int, ...], precision: str, device: str
) -> float:
    torch.set_grad_enabled(False)
    model, _ = random_pi3(Pi3Config(**config), ranks, device)
    run = build_forward(model, torch.rand(shape).to(device), precision)
    synchronize(torch.device(device))
    start = time.perf_counter()
    run()
    synchronize(torch.device(device))
    return time.perf_counter() - start


def time_first_pass(
    config: Pi3Config,
    ranks: Mapping[str, int],
    shape: tuple[int, ...],
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> float:
    """Time the first forward pass of a new process, the published measurement.

    It includes the set-up of libraries and the growth of the allocator.

    **Arguments**

    - `config`: the sizes of the model.
    - `ranks`: layer -> rank of layers that get two factors, see `random_pi3`.
    - `shape`: of the images, `(scenes, views, 3, height, width)`.
    - `precision`: 'fp32' or 'bf16'; default 'fp32'.
    - `device`: default: the CPU.

    **Returns** seconds.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        arguments = (asdict(config), dict(ranks), shape, precision, str(device))
        return pool.submit(_time_first_pass, *arguments).result()


def compare_speed(
    models: Mapping[str, nn.Module],
    shape: tuple[int, ...],
    precision: str = "fp32",
    *,
    repeats: int = 10,
    warmup: int = 2,
) -> list[dict[str, Any]]:
    """Compare the speed of models that take turns on one device, the fair measurement.

    **Arguments**

    - `models`: name -> model; the others are compared with the first.
    - `shape`: of the images, `(scenes, views, 3, height, width)`.
    - `precision`: 'fp32' or 'bf16'; default 'fp32'.
    - `repeats`: passes of each model that count; default 10.
    - `warmup`: passes of each model before them; default 2.

    **Returns** one row per model: `model`, `forward_ms` (median) and its quartile range `spread_ms`, `frames_per_s`, `speed_up`
    over the first model, `weights_mb`, and the peak memory beyond the weights, `peak_mb`; both in 10^6 bytes.
    """
    device = device_of(next(iter(models.values())))
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    runs = {name: build_forward(model.eval(), images, precision) for name, model in models.items()}
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
