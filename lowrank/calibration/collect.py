"""Collect the second moments of linear layers, streamed over calibration data.

A layer (m, n) with inputs x and outputs y before the bias (one per token) keeps G = sum of x x^T or K = sum of y y^T, on the
side that is asked for, the number of tokens, and means: all that the closed forms need, in float64 and in
memory that does not grow with the number of tokens. Layers that receive the same tensor, as q, k and v do, share one G. With a
loss, the moments of the gradients g at the outputs are collected too, as F = sum of g g^T or M = W^T F W.
"""

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lowrank.calibration.collector import Collector
from lowrank.calibration.hooks import watch_calls
from lowrank.calibration.skip_head import SkipHead
from lowrank.factorization.methods import METHODS
from lowrank.factorization.moments import LayerStatistics
from lowrank.factorization.sides import fields_for, reads_of
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.nn.batches import Batch, compute_logits, device_of, eval_mode, get_token_mask, move_batch
from lowrank.nn.targets import BLOCKS, find_linears

TOKENS_PER_INPUT = 5  # fewer than this leave G poorly known, see notebook 01

Loss = Callable[[nn.Module, Batch], Tensor]


class FewTokensWarning(UserWarning):
    """Warn that there are too few calibration tokens for the number of inputs of a layer."""


@check_arguments
def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Iterable[str] = BLOCKS,
    *,
    loss: Loss | None = None,
    side: str = "inputs",
    methods: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    products: torch.dtype = torch.float32,
) -> dict[str, LayerStatistics]:
    """Collect the moments of linear layers over calibration data, in one pass and in evaluation mode.

    Under `torch.distributed` (`accelerate launch`) every process passes its own share of the batches, and every process
    returns the sums over all of them.

    **Arguments**

    - `model`: any PyTorch module; it is not changed.
    - `batches`: iterable of batches, see `lowrank.nn.batches`; tokens that `attention_mask` marks as padding are left out.
    - `layers`: names or patterns of `nn.Linear` modules. Default all inside numbered blocks.
    - `loss`: `(model, batch) -> scalar`, summed over the batch. With it the moments of the output gradients are collected too;
      the first dimension of a layer's input must then count the samples. Default None.
    - `side`: 'inputs' for G `(in, in)` and F `(out, out)`, which PREHAB, pruning and `whitening_factor` read; 'outputs' for K
      `(out, out)` and F; 'smaller' for the matrices of size min(out, in), which serve every method of the
      library. Default 'inputs'.
    - `methods`: keys of `METHODS`; only what these read is collected. Default None, what all methods read.
    - `device`: device of the float64 sums. Default the model's, or the CPU if that device has no float64.
    - `products`: float32 or float64, the least dtype in which blocks are multiplied; a float64 model always is in float64.
      Default float32.

    **Returns** layer name -> `LayerStatistics`. Layers that receive the same tensor share the moments of it.

    **Raises**

    - `ValueError`: unknown layers, side or methods; no tokens; NaN or infinity in an activation; a layer that no batch reaches.

    **Warns**

    - `FewTokensWarning`: fewer than 5 tokens per input in a layer; it names the layer with the fewest.

    **Reference** Chen et al., DRONE, NeurIPS 2021, section 3, for the moments X X^T; Yu and Wu, AFM, AAAI 2023, for those of the
    outputs.
    """
    linears = find_linears(model, layers)
    methods = None if methods is None else list(methods)
    for method in methods or ():
        require(method in METHODS, "methods", f"be among {sorted(METHODS)}", method)
    reads = reads_of(methods)
    fields = {name: fields_for(layer.weight.shape, side, reads, loss is not None) for name, layer in linears.items()}
    require(products in (torch.float32, torch.float64), "products", "be torch.float32 or torch.float64", products)
    home = device_of(model)
    sums_on = torch.device(device) if device is not None else torch.device("cpu") if home.type == "mps" else home
    collector = Collector(linears, fields, sums_on, products)
    with eval_mode(model), watch_calls(linears, collector.add_call), SkipHead(model, linears) as head:
        for batch in batches:
            batch = move_batch(batch, home)
            collector.mask = get_token_mask(batch)
            if loss is None:
                with torch.no_grad(), head.skipped():
                    compute_logits(model, batch)
            else:
                _run_backward(model, batch, loss, collector)
            collector.end_batch()
    collector.sum_over_processes()
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
        if (name, "input") not in collector.leader:
            raise ValueError(f"`batches` must reach every layer, got no calibration token for {name!r}.")
        if collector.tokens(name) == 0:
            raise ValueError(f"`batches` must hold at least one unmasked token, got none for layer {name!r}.")
    tokens = {name: (collector.tokens(name), layer.in_features) for name, layer in collector.linears.items()}
    name = min(tokens, key=lambda name: tokens[name][0] / tokens[name][1])
    count, inputs = tokens[name]
    if count < TOKENS_PER_INPUT * inputs:
        warnings.warn(
            f"layer {name!r} has {count} calibration tokens for {inputs} inputs: pass more batches (at least "
            f"{TOKENS_PER_INPUT} tokens per input), or shrink the moments (`shrink_moments`, "
            "`whitening_factor(..., shrinkage=...)`).",
            FewTokensWarning,
            stacklevel=4,  # the check of the arguments stands between
        )
