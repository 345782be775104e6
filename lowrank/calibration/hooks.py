"""calibration.hooks"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.nn.batches import Batch, device_of, evaluating, logits, to_device, token_mask
from lowrank.nn.targets import find_linears


def token_rows(values: Float[Tensor, "*batch n"], mask: Tensor | None, layer: str) -> Float[Tensor, "tokens n"]:
    """The vectors of a layer's input or output that belong to tokens, padding left out.

    The mask applies where the leading dimensions are (batch, tokens), flattened or not. One vector per sample, as a
    pooler sees, has no padding.

    **Raises:** `ValueError`: there is padding, and the leading dimensions fit neither.
    """
    rows = values.reshape(-1, values.shape[-1])
    lead = tuple(values.shape[:-1])
    if mask is None or lead == (len(mask),) != (mask.numel(),) or bool(mask.all()):
        return rows
    if lead in (tuple(mask.shape), (mask.numel(),)):
        return rows[mask.reshape(-1)]
    raise ValueError(
        f"`batches` have padding (attention_mask {tuple(mask.shape)}) that does not fit layer {layer!r}, "
        f"whose values have shape {tuple(values.shape)}: leave the layer out, or pass batches without padding."
    )


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Float32 products in float32: neither TF32 nor an autocast that the caller may have on."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def watching(linears: Mapping[str, nn.Linear], visit: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `visit(name, input)` before each call of each layer."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        return lambda module, args, kwargs: visit(name, args[0] if args else kwargs["input"])

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def visit_inputs(
    model: nn.Module, batches: Iterable[Batch], layers: Iterable[str], visit: Callable[[str, Tensor], None]
) -> None:
    """Calls `visit(name, rows)` with the input of each layer in each batch, `(tokens, in)`, padding left out."""
    linears = find_linears(model, layers)
    mask: Tensor | None = None
    with evaluating(model), watching(linears, lambda name, value: visit(name, token_rows(value, mask, name))):
        for batch in batches:
            batch = to_device(batch, device_of(model))
            mask = token_mask(batch)
            with torch.no_grad():
                logits(model, batch)


def collect_inputs(
    model: nn.Module, batches: Iterable[Batch], layers: Iterable[str], tokens: int
) -> dict[str, Float[Tensor, "tokens n"]]:
    """The first `tokens` input vectors of each layer, for studies that need them and not their moments.

    **Returns:** name -> `(tokens, in)` in the dtype of the activations, on the CPU.

    **Raises:** `ValueError`: the batches hold fewer tokens.
    """
    rows: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}

    def keep(name: str, values: Tensor) -> None:
        wanted = tokens - counts.get(name, 0)
        if wanted > 0:
            rows.setdefault(name, []).append(values[:wanted].detach().cpu().clone())
            counts[name] = counts.get(name, 0) + min(wanted, len(values))

    layers = list(find_linears(model, layers))
    for batch in batches:
        visit_inputs(model, [batch], layers, keep)
        if counts and min(counts.values()) >= tokens:
            break
    if not counts or min(counts.values()) < tokens:
        raise ValueError(f"`batches` must hold at least {tokens} tokens, got {min(counts.values(), default=0)}.")
    return {name: torch.cat(parts) for name, parts in rows.items()}
