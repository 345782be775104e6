"""Measure what a model costs to run: floating-point operations, memory, time.

Candidates take turns in one process, so a machine that slows down affects all of them. The first rounds are a warm-up. The clock
is read only after the device has finished. All rounds are returned, for a median and a spread.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank.io.tensor_places import count_bytes
from lowrank.nn.batches import device_of, eval_mode

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes to stderr


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
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
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time functions in turn: all once, then all again.

    **Arguments**

    - `functions`: name -> function without arguments.
    - `repeats`: number of rounds that count; default 10.
    - `warmup`: number of rounds before them that do not count; default 2.
    - `device`: the device to wait for around each call; default: the CPU.
    - `clock`: function that returns seconds; default: the time that passes. `time.process_time` counts the time that this process
      computes, on all its threads, and so leaves out what other processes take on a busy machine.

    **Returns** name -> `repeats` times in seconds.
    """
    device = torch.device(device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            synchronize(device)
            start = clock()
            function()
            synchronize(device)
            if turn >= warmup:
                times[name].append(clock() - start)
    return times


def count_flops(function: Callable[[], object]) -> int:
    """Count the floating-point operations of a call: matrix products, convolutions and attention.

    A multiplication and an addition count as two operations. The ratio of two models bounds the speed-up that one can have.

    **Arguments**

    - `function`: function without arguments; it is called once, without gradients.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of all parameters and buffers of a model; shared tensors count once."""
    return count_bytes([*model.parameters(), *model.buffers()])


def build_training_step(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    clip: float = 1.0,
    precision: str = "fp32",
) -> tuple[Callable[[], None], int]:
    """Build a training step to be timed: forward, backward, clipping, AdamW on all trainable parameters.

    One step is taken here, so that the optimizer has its state. The learning rate is 1e-9, so the weights hardly change.

    **Arguments**

    - `model`: any PyTorch module; it is put in training mode.
    - `loss`: function `model -> scalar tensor`, on a fixed batch.
    - `clip`: largest norm of the gradient, > 0; default 1.
    - `precision`: 'fp32' (default) or 'bf16' (autocast).

    **Returns** the step, a function without arguments; the bytes kept between steps: weights, buffers, optimizer state.
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
    """Measure the peak memory of a call beyond the memory in use before it: activations, caches of keys and values.

    On CUDA the allocator counts; elsewhere torch's profiler records each allocation in host memory.

    **Arguments**

    - `function`: function without arguments; it is called once, without gradients.
    - `device`: the device whose memory counts; default: the CPU.

    **Returns** bytes.
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
    in_use = peak = 0
    events: Any = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


def top_operators(function: Callable[[], object], device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """Measure the time of each operator in a call, after one warm-up call.

    The time of an operator excludes the operators that it calls, so the times add up to the whole.

    **Arguments**

    - `function`: function without arguments; it is called twice, without gradients.
    - `device`: the device whose time counts; default: the CPU.

    **Returns** one row per operator, the longest time first: `operator`, `calls`, `self_ms` in milliseconds, `share` of the sum.
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
    # on a GPU each kernel has an entry beside the operator that launched it: count the operators only
    host = [event for event in profile.key_averages() if event.device_type == torch.profiler.DeviceType.CPU]  # pyright: ignore
    times = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count) for event in host
    }
    total = sum(time for time, _ in times.values()) or 1.0
    longest = sorted(times.items(), key=lambda item: -item[1][0])
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
    """Time greedy generation with a cache of keys and values; models take turns.

    **Arguments**

    - `models`: name -> causal language model of transformers, all on one device.
    - `prompt`: token ids, `(batch, tokens)`, int64.
    - `new_tokens`: tokens to generate for every prompt, >= 1; an end-of-text token does not stop it.
    - `repeats`: number of rounds that count; default 5.
    - `warmup`: number of rounds before them that do not count; default 1.

    **Returns** name -> `prefill` and `decode`, `repeats` times in seconds each. `prefill` is the pass over the prompts, which
    gives the first token. `decode` is all passes over one token per prompt, which give the others.
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
    with eval_mode(model), torch.no_grad():
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
