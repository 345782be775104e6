"""See the inputs of layers during a pass over batches."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.calibration.padding import Padding, token_rows
from lowrank.nn.batches import Batch, batches_on, compute_logits, device_of, eval_mode
from lowrank.nn.targets import find_linears


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 in float32 inside the block: without TF32, and without an autocast of the caller.

    **Arguments**

    - `device`: the device that multiplies.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def watch_calls(linears: Mapping[str, nn.Linear], visit: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call a function with the input and the output of each call of each layer, inside the block.

    **Arguments**

    - `linears`: layer name -> layer.
    - `visit`: `(name, input, output) -> None`.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
        def call(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            with torch.inference_mode(False), torch.no_grad():  # a model may set inference mode for itself
                visit(name, args[0] if args else kwargs["input"], output)

        return call

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def visit_inputs(
    model: nn.Module, batches: Iterable[Batch], layers: Iterable[str], visit: Callable[[str, Tensor], None]
) -> None:
    """Call a function with the input of each layer in each batch, in evaluation mode.

    **Arguments**

    - `model`: any PyTorch module; it is not changed.
    - `batches`: iterable of batches, see `lowrank.nn.batches`.
    - `layers`: names or patterns of `nn.Linear` modules.
    - `visit`: `(name, rows) -> None`, with rows `(tokens, in)` without padding.
    """
    linears = find_linears(model, layers)
    padding = Padding(model, linears)
    with eval_mode(model):
        for batch in batches_on(batches, device_of(model)):
            calls, mask = Counter[str](), padding.read(batch)

            def see(name: str, value: Tensor, _: Tensor, calls: Counter[str] = calls, mask: Any = mask) -> None:
                calls[name] += 1
                visit(name, token_rows(value, mask, name, calls[name] - 1))

            with watch_calls(linears, see), torch.no_grad():
                compute_logits(model, batch)


def collect_inputs(
    model: nn.Module, batches: Iterable[Batch], layers: Iterable[str], tokens: int
) -> dict[str, Float[Tensor, "tokens n"]]:
    """Return the first input vectors of each layer, for studies that need more than their moments.

    **Arguments**

    - `model`: any PyTorch module; it is not changed.
    - `batches`: iterable of batches, see `lowrank.nn.batches`; read as far as needed.
    - `layers`: names or patterns of `nn.Linear` modules.
    - `tokens`: int >= 1, vectors per layer.

    **Returns** layer name -> `(tokens, in)` in the dtype of the activations, on the CPU.

    **Raises**

    - `ValueError`: the batches hold fewer tokens.
    """
    rows: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}

    def keep(name: str, values: Tensor) -> None:
        missing = tokens - counts.get(name, 0)
        if missing > 0:
            rows.setdefault(name, []).append(values[:missing].detach().cpu().clone())
            counts[name] = counts.get(name, 0) + min(missing, len(values))

    def needed() -> Iterator[Batch]:
        for batch in batches:
            yield batch
            if counts and min(counts.values()) >= tokens:
                return

    visit_inputs(model, needed(), layers, keep)
    if not counts or min(counts.values()) < tokens:
        raise ValueError(f"`batches` must hold at least {tokens} tokens, got {min(counts.values(), default=0)}.")
    return {name: torch.cat(parts) for name, parts in rows.items()}
