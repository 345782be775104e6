"""Collects the second moments of the inputs of linear layers, streamed over calibration data.

For a layer with inputs x (one per token) this keeps G = sum of x x^T, the number of tokens, and the means of x and |x|:
all that the closed forms need, in float64 and in memory that does not grow with the number of tokens. Layers that
receive the same tensor, as q, k and v do, share one matrix. Given a loss, the moments of the gradients at the outputs
are collected too.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.calibration.hooks import exact_products, token_rows, watching
from lowrank.factorization.moments import LayerStatistics, Moments
from lowrank.nn.batches import Batch, device_of, evaluating, logits, to_device, token_mask
from lowrank.nn.targets import BLOCKS, find_linears

TOKENS_PER_INPUT = 5  # fewer than this leave G poorly known, see notebook 01


class FewTokensWarning(UserWarning):
    """There are too few calibration tokens for the number of inputs of a layer."""


class _Collector:
    """Feeds the inputs that hooks see into one `Moments` per distinct input."""

    def __init__(self, linears: Mapping[str, nn.Linear], device: torch.device, products: torch.dtype) -> None:
        self.linears, self.device, self.products = linears, device, products
        self.moments: dict[str, Moments] = {}
        self.gradients: dict[str, Moments] = {}
        self.row_fisher: dict[str, Tensor] = {}
        self.leader: dict[str, str] = {}  # layer -> the layer whose moments it shares, decided at its first call
        self.mask: Tensor | None = None
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}  # inputs that are alive now

    def see_input(self, name: str, value: Tensor) -> None:
        alive, version, first = self._seen.get(id(value), (lambda: None, -1, name))
        same = alive() is value and version == value._version
        leader = self.leader.setdefault(name, first if same else name)
        if leader != name:
            if not same or first != leader:
                raise ValueError(
                    f"`layers` {leader!r} and {name!r} had one input at first and now have two: "
                    "collect the statistics of such layers in separate calls."
                )
            return
        if name not in self.moments:
            self.moments[name] = Moments(value.shape[-1], self.device, self.products)
        with exact_products(value.device):
            self.moments[name].add(token_rows(value, self.mask, name))
        if not same:
            self._seen[id(value)] = (weakref.ref(value), value._version, name)

    def see_gradients(self, name: str, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """The inputs and output gradients of all calls of a layer in one pass."""
        self.add_gradient_sums(name, gradients[0].shape[-1])
        with exact_products(gradients[0].device):
            for gradient in gradients:
                self.gradients[name].add(token_rows(gradient, self.mask, name))
            x, g = (
                torch.cat([part.detach().reshape(len(part), -1, part.shape[-1]) for part in parts], dim=1)
                for parts in (values, gradients)
            )
            wide = torch.promote_types(g.dtype, self.products)
            self.row_fisher[name] += _row_fisher(x.to(wide), g.to(wide)).to(self.row_fisher[name])

    def add_gradient_sums(self, name: str, outputs: int) -> None:
        if name not in self.gradients:
            self.gradients[name] = Moments(outputs, self.device, self.products)
            self.row_fisher[name] = torch.zeros(outputs, dtype=torch.float64, device=self.device)

    def end_batch(self) -> None:
        self._seen.clear()
        for what, moments in (("activations", self.moments), ("gradients", self.gradients)):
            for name, layer in moments.items():
                if not bool(torch.isfinite(layer.sum).all() & torch.isfinite(layer.gram.diagonal()).all()):
                    raise ValueError(f"`batches` must give finite {what}, got NaN or infinity in layer {name!r}.")


def _row_fisher(x: Float[Tensor, "samples tokens n"], g: Float[Tensor, "samples tokens m"]) -> Float[Tensor, " m"]:
    """sum over samples and columns of the squared gradient of the weight, sum_t g_t x_t^T, never forming it."""
    scale = g.abs().amax(dim=(0, 1)).clamp_min(torch.finfo(g.dtype).tiny)  # squares must not vanish
    g = g / scale
    return ((x @ x.mT) @ g * g).sum(dim=(0, 1), dtype=torch.float64).clamp_min(0.0) * scale.double().square()


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Iterable[str] = BLOCKS,
    *,
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    device: torch.device | str | None = None,
    products: torch.dtype = torch.float32,
) -> dict[str, LayerStatistics]:
    """Moments of the inputs of linear layers over calibration data, in one pass and in evaluation mode.

    Under `torch.distributed` (`accelerate launch`) every process passes its own share of the batches, and every process
    returns the sums over all of them.

    **Arguments:** `model`: any module. `batches`: see `lowrank.nn.batches`; padding named by `attention_mask` is left out.
    `layers`: names or patterns of `nn.Linear` modules, by default all inside numbered blocks. `loss`: `(model, batch) ->
    scalar`, the loss summed over the batch; given it, the moments of the output gradients are collected too, where the
    leading dimension of a layer's input counts the samples. `device`:
    where the float64 sums live, by default where the model is (the CPU where that device has no float64). `products`:
    float32 or float64, the least precision in which blocks are multiplied; a float64 model always is in float64.

    **Returns:** name -> `LayerStatistics`. Layers that receive the same tensor share one `gram`.

    **Raises:** `ValueError`: unknown layers, no tokens, non-finite activations, or a layer that no batch reaches.
    **Warns:** `FewTokensWarning`: fewer than 5 tokens per input somewhere; it names the layer that is worst off.

    **Reference:** the moments are X X^T of Chen et al., DRONE, NeurIPS 2021, section 3.
    """
    linears = find_linears(model, layers)
    home = device_of(model)
    sums_on = torch.device(device) if device is not None else torch.device("cpu") if home.type == "mps" else home
    collector = _Collector(linears, sums_on, products)
    with evaluating(model), watching(linears, collector.see_input):
        for batch in batches:
            batch = to_device(batch, home)
            collector.mask = token_mask(batch)
            if loss is None:
                with torch.no_grad():
                    logits(model, batch)
            else:
                _run_backward(model, batch, loss, linears, collector.see_gradients)
            collector.end_batch()
    _sum_over_processes(collector, linears, with_gradients=loss is not None)
    return _finished(collector)


def _run_backward(
    model: nn.Module,
    batch: Batch,
    loss: Callable[[nn.Module, Batch], Tensor],
    linears: Mapping[str, nn.Linear],
    visit: Callable[[str, Sequence[Tensor], Sequence[Tensor]], None],
) -> None:
    """One forward and backward pass; `visit(name, inputs, gradients)` of all calls of each layer, `.grad` untouched."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.requires_grad_()  # all weights may be frozen
            calls.append((name, args[0] if args else named["input"], output))
            return output.clone()  # what follows may work in place

        return hook

    handles = [layer.register_forward_hook(keep(name), with_kwargs=True) for name, layer in linears.items()]
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(model, batch), [output for _, _, output in calls])
    finally:
        for handle in handles:
            handle.remove()
    for layer in dict.fromkeys(name for name, _, _ in calls):
        own = [(value, g) for (name, value, _), g in zip(calls, gradients, strict=True) if name == layer]
        visit(layer, *zip(*own, strict=True))


def _sum_over_processes(collector: _Collector, linears: Mapping[str, nn.Linear], with_gradients: bool) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    maps: list[dict[str, str]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(maps, collector.leader)
    leaders = next((found for found in maps if found), {})
    if any(found and found != leaders for found in maps):
        raise ValueError("`batches` must reach the same layers in every process.")
    collector.leader = leaders  # a process without batches has seen none
    for name in dict.fromkeys(leaders.values()):
        layer = collector.moments.setdefault(
            name, Moments(linears[name].in_features, collector.device, collector.products)
        )
        _all_reduce(layer)
    for name in leaders if with_gradients else ():
        collector.add_gradient_sums(name, linears[name].out_features)
        _all_reduce(collector.gradients[name])
        torch.distributed.all_reduce(collector.row_fisher[name])


def _all_reduce(moments: Moments) -> None:
    tokens = torch.tensor(moments.tokens, device=moments.gram.device)
    for tensor in (moments.gram, moments.sum, moments.abs_sum, tokens):
        torch.distributed.all_reduce(tensor)
    moments.tokens = int(tokens)


def _finished(collector: _Collector) -> dict[str, LayerStatistics]:
    missing = [name for name in collector.linears if name not in collector.leader]
    if missing:
        raise ValueError(f"`batches` must reach every layer, got no calibration token for {missing[0]!r}.")
    if empty := next((name for name, sums in collector.moments.items() if sums.tokens == 0), None):
        raise ValueError(f"`batches` must hold at least one unmasked token, got none for layer {empty!r}.")
    name, sums = min(collector.moments.items(), key=lambda item: item[1].tokens / len(item[1].gram))
    if sums.tokens < TOKENS_PER_INPUT * len(sums.gram):
        warnings.warn(
            f"layer {name!r} has {sums.tokens} calibration tokens for {len(sums.gram)} inputs: pass more batches (at least "
            f"{TOKENS_PER_INPUT} tokens per input), or shrink the moments (`shrunk`, `whitening_factor(..., shrinkage=...)`).",
            FewTokensWarning,
            stacklevel=3,
        )
    # each sum is dropped once it is finished: two of one layer at most
    shared = {name: collector.moments.pop(name).finish() for name in list(collector.moments)}
    gradients = {name: collector.gradients.pop(name).finish().gram for name in list(collector.gradients)}
    fisher = collector.row_fisher
    return {
        name: replace(shared[collector.leader[name]], gradient_gram=gradients.get(name), row_fisher=fisher.get(name))
        for name in collector.linears
    }
