"""What a model costs to run: floating-point operations, memory, time. Measured fairly, or not at all.

Competitors take turns in one process, so that a machine that slows down slows them alike; the first rounds are a warm-up;
the device is waited for before the clock is read; what is reported are all rounds, for a median and a spread.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank.nn.batches import device_of, evaluating

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes lines with times to stderr otherwise


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_in_turns(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 10,
    warmup: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Seconds of each call of each function, called in turn.

    **Arguments:** `repeats`, `warmup`: rounds that count, and rounds before them that do not.

    **Returns:** name -> `repeats` times in seconds.
    """
    device = torch.device(device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of a call, a multiplication and an addition counted as two: matrix products, convolutions
    and attention, as torch counts them. The ratio of two models is the ceiling of what one can be faster."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def training_step(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    clip: float = 1.0,
    precision: str = "fp32",
) -> tuple[Callable[[], None], int]:
    """A training step of what is trainable in a model, to be timed: forward, backward, clipping, AdamW. One step is taken at
    once, so that the optimiser has its state; the learning rate is so small that the weights stay where they are.

    **Arguments:** `loss`: `model -> scalar`, on a fixed batch. `clip`, `precision`: as in `lowrank.training.loop.Recipe`.

    **Returns:** the step, and the bytes that are held between steps: weights, buffers, the optimiser's state.
    """
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-9, weight_decay=0.0)

    @torch.enable_grad()
    def step() -> None:
        with torch.autocast(device_of(model).type, torch.bfloat16, enabled=precision == "bf16"):
            value = loss(model)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = sum(t.nbytes for tensors in optimizer.state.values() for t in tensors.values())
    return step, weight_bytes(model) + state


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that a call holds at once beyond what was held before it: activations, and caches of keys and values.

    On CUDA as its allocator counts; elsewhere as torch's profiler sees blocks of host memory come and go.
    """
    device = torch.device(device)
    with torch.no_grad():
        if device.type == "cuda":
            synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            function()
            synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
    held = peak = 0
    events: Any = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def top_operators(function: Callable[[], object], device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """Where the time of a call goes, by operator, the longest first, after one call that is not looked at.

    Times are an operator's own: what it calls is counted there, not here, so that they add up to the whole.

    **Returns:** rows of `operator`, `calls`, `self_ms`, `share` of the sum over all operators.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.no_grad():
        function()
        synchronize(device)
        with torch.profiler.profile(activities=activities) as profile:
            function()
            synchronize(device)
    # on a GPU each kernel is an entry beside the operator that launched it: operators alone are counted
    host = [event for event in profile.key_averages() if event.device_type == torch.profiler.DeviceType.CPU]  # pyright: ignore
    own = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count) for event in host
    }
    total = sum(time for time, _ in own.values()) or 1.0
    longest = sorted(own.items(), key=lambda item: -item[1][0])
    return [
        {"operator": name, "calls": count, "self_ms": time / 1e3, "share": time / total}
        for name, (time, count) in longest
        if time > 0
    ]


def generate_in_turns(
    models: Mapping[str, Any],
    prompt: Int[Tensor, "batch tokens"],
    new_tokens: int,
    *,
    repeats: int = 5,
    warmup: int = 1,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of greedy generation with a cache of keys and values, `new_tokens` for every prompt, never fewer.

    **Arguments:** `models`: name -> causal language model of transformers; all on one device.

    **Returns:** name -> `prefill`: the pass over the prompts, which gives the first token; `decode`: the passes over one token
    per prompt that give the others; `repeats` times of each.
    """
    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    for turn in range(warmup + repeats):
        for name, model in models.items():
            prefill, decode = _generate(model, prompt.to(device_of(model)), new_tokens)
            if turn >= warmup:
                times[name]["prefill"].append(prefill)
                times[name]["decode"].append(decode)
    return times


def _generate(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    with evaluating(model), torch.no_grad():
        synchronize(prompt.device)
        start = time.perf_counter()
        state = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        synchronize(prompt.device)
        middle = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = state.logits[:, -1:].argmax(-1)
            state = model(input_ids=token, past_key_values=state.past_key_values, use_cache=True)
        synchronize(prompt.device)
        return middle - start, time.perf_counter() - middle
