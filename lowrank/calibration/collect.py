"""Collect the second moments of linear layers, streamed over calibration data.

A layer (m, n) with inputs x and outputs y before the bias (one per token) keeps G = sum of x x^T or K = sum of y y^T, on the
side that is asked for, the number of tokens, and means: all that the closed forms need, in float64 and in
memory that does not grow with the number of tokens. Layers that receive the same tensor, as q, k and v do, share one G. With a
loss, the moments of the gradients g at the outputs are collected too, as F = sum of g g^T or M = W^T F W.
"""

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from lowrank.calibration.backward import BackwardPass, Loss
from lowrank.calibration.collector import Collector
from lowrank.calibration.hooks import watch_calls
from lowrank.calibration.padding import Padding
from lowrank.calibration.skip_head import SkipHead
from lowrank.factorization.methods import METHODS
from lowrank.factorization.moments import LayerStatistics
from lowrank.factorization.precision import float64_device
from lowrank.factorization.sides import fields_for, reads_of
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.nn.autograd import check_differentiable
from lowrank.nn.batches import Batch, batches_on, compute_logits, device_of, eval_mode
from lowrank.nn.offloaded import check_weights
from lowrank.nn.targets import BLOCKS, find_linears

TOKENS_PER_INPUT = 5  # fewer than this leave G poorly known, see notebook 01


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
      the first dimension of a layer's input must then count the samples. Calls in one batch on other numbers of samples, as of
      crops of two sizes, hold samples of their own. What the loss does not depend on has gradients of zero. Default None.
    - `side`: 'inputs' for G `(in, in)` and F `(out, out)`, which PREHAB, pruning and `whitening_factor` read; 'outputs' for K
      `(out, out)` and F; 'smaller' for the matrices of size min(out, in), which serve every method of the
      library. Default 'inputs'.
    - `methods`: keys of `METHODS`; only what these read is collected. Default None, what all methods read.
    - `device`: device of the float64 sums. Default the model's, or the CPU if that device has no float64.
    - `products`: float32 or float64, the least dtype in which blocks are multiplied; a float64 model always is in float64.
      Default float32.

    **Returns** layer name -> `LayerStatistics`. Layers that receive the same tensor share the moments of it.

    **Raises**

    - `ValueError`: unknown layers, side or methods; no tokens; NaN or infinity in an activation; a layer that no batch reaches;
      weights that were never loaded; a loss without gradients, or a model that runs without autograd or was built in inference
      mode, if there is a `loss`.

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
    check_weights(model)
    if loss is not None:
        check_differentiable(model)
    require(products in (torch.float32, torch.float64), "products", "be torch.float32 or torch.float64", products)
    home = device_of(model)
    sums_on = torch.device(device) if device is not None else float64_device(home)
    collector = Collector(linears, fields, sums_on, products)
    backward, padding = BackwardPass(collector), Padding(model, linears)
    with torch.inference_mode(False), eval_mode(model), SkipHead(model, linears) as head:
        for batch in batches_on(batches, home):
            collector.mask = padding.read(batch)
            with watch_calls(linears, collector.add_call):
                if loss is None:
                    with torch.no_grad(), head.skipped():
                        compute_logits(model, batch)
                else:
                    backward.run(model, batch, loss)
            collector.end_batch()
        collector.sum_over_processes()
        _check_tokens(collector)
        return collector.finish()


def _check_tokens(collector: Collector) -> None:
    """Raise if a layer has no tokens, and warn if the layer with the fewest has too few."""
    for name in collector.linears:
        if collector.tokens(name) is None:
            raise ValueError(f"`batches` must reach every layer, got no calibration token for {name!r}.")
        if collector.tokens(name) == 0:
            raise ValueError(f"`batches` must hold at least one unmasked token, got none for layer {name!r}.")
    tokens = {name: (collector.tokens(name) or 0, layer.in_features) for name, layer in collector.linears.items()}
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
