"""Collect the second moments of the inputs of linear layers, streamed over calibration data.

For a layer with inputs x (one per token) this keeps G = sum of x x^T, the number of tokens, and the means of x and |x|:
all that the closed forms need, in float64 and in memory that does not grow with the number of tokens. Layers that
receive the same tensor, as q, k and v do, share one matrix. With a loss, the moments of the gradients at the outputs are
collected too.
"""

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lowrank.calibration.collector import Collector
from lowrank.calibration.hooks import watch_inputs
from lowrank.factorization.moments import LayerStatistics
from lowrank.nn.batches import Batch, compute_logits, device_of, eval_mode, get_token_mask, move_batch
from lowrank.nn.targets import BLOCKS, find_linears

TOKENS_PER_INPUT = 5  # fewer than this leave G poorly known, see notebook 01

Loss = Callable[[nn.Module, Batch], Tensor]


class FewTokensWarning(UserWarning):
    """Warn that there are too few calibration tokens for the number of inputs of a layer."""


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Iterable[str] = BLOCKS,
    *,
    loss: Loss | None = None,
    device: torch.device | str | None = None,
    products: torch.dtype = torch.float32,
) -> dict[str, LayerStatistics]:
    """Collect the moments of the inputs of linear layers over calibration data, in one pass and in evaluation mode.

    Under `torch.distributed` (`accelerate launch`) every process passes its own share of the batches, and every process
    returns the sums over all of them.

    **Arguments**

    - `model`: any PyTorch module; it is not changed.
    - `batches`: iterable of batches, see `lowrank.nn.batches`; tokens that `attention_mask` marks as padding are left out.
    - `layers`: names or patterns of `nn.Linear` modules. Default all inside numbered blocks.
    - `loss`: `(model, batch) -> scalar`, summed over the batch. With it the moments of the output gradients are collected too;
      the first dimension of a layer's input must then count the samples. Default None.
    - `device`: device of the float64 sums. Default the model's, or the CPU if that device has no float64.
    - `products`: float32 or float64, the least dtype in which blocks are multiplied; a float64 model always is in float64.
      Default float32.

    **Returns** layer name -> `LayerStatistics`. Layers that receive the same tensor share one `gram`.

    **Raises**

    - `ValueError`: unknown layers; no tokens; NaN or infinity in an activation; a layer that no batch reaches.

    **Warns**

    - `FewTokensWarning`: fewer than 5 tokens per input in a layer; it names the layer with the fewest.

    **Reference** Chen et al., DRONE, NeurIPS 2021, section 3, for the moments X X^T.
    """
    linears = find_linears(model, layers)
    home = device_of(model)
    sums_on = torch.device(device) if device is not None else torch.device("cpu") if home.type == "mps" else home
    collector = Collector(linears, sums_on, products)
    with eval_mode(model), watch_inputs(linears, collector.add_input):
        for batch in batches:
            batch = move_batch(batch, home)
            collector.mask = get_token_mask(batch)
            if loss is None:
                with torch.no_grad():
                    compute_logits(model, batch)
            else:
                _run_backward(model, batch, loss, collector)
            collector.end_batch()
    collector.sum_over_processes(with_gradients=loss is not None)
    _check_tokens(collector)
    return collector.finish()


def _run_backward(model: nn.Module, batch: Batch, loss: Loss, collector: Collector) -> None:
    """Run one forward and backward pass and collect the gradients of all calls of each layer; `.grad` stays as it is."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.requires_grad_()  # all weights may be frozen
            calls.append((name, args[0] if args else kwargs["input"], output))
            return output.clone()  # the next operation may work in place

        return hook

    handles = [layer.register_forward_hook(keep(name), with_kwargs=True) for name, layer in collector.linears.items()]
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(model, batch), [output for _, _, output in calls])
    finally:
        for handle in handles:
            handle.remove()
    by_layer: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for (name, value, _), gradient in zip(calls, gradients, strict=True):
        values, layer_gradients = by_layer.setdefault(name, ([], []))
        values.append(value)
        layer_gradients.append(gradient)
    for name, (values, layer_gradients) in by_layer.items():
        collector.add_gradients(name, values, layer_gradients)


def _check_tokens(collector: Collector) -> None:
    """Raise if a layer has no tokens, and warn if the layer with the fewest has too few."""
    for name in collector.linears:
        if name not in collector.leader:
            raise ValueError(f"`batches` must reach every layer, got no calibration token for {name!r}.")
    if empty := next((name for name, sums in collector.inputs.items() if sums.tokens == 0), None):
        raise ValueError(f"`batches` must hold at least one unmasked token, got none for layer {empty!r}.")
    tokens = {name: (sums.tokens, collector.linears[name].in_features) for name, sums in collector.inputs.items()}
    name = min(tokens, key=lambda name: tokens[name][0] / tokens[name][1])
    count, inputs = tokens[name]
    if count < TOKENS_PER_INPUT * inputs:
        warnings.warn(
            f"layer {name!r} has {count} calibration tokens for {inputs} inputs: pass more batches (at least "
            f"{TOKENS_PER_INPUT} tokens per input), or shrink the moments (`shrink_moments`, "
            "`whitening_factor(..., shrinkage=...)`).",
            FewTokensWarning,
            stacklevel=3,
        )
