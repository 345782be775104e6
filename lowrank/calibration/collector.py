"""Add up the moments of every layer during a pass, once for each distinct input."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank.calibration.hooks import exact_products, token_rows
from lowrank.factorization.moments import LayerStatistics
from lowrank.factorization.running_moments import RunningMoments
from lowrank.io.distributed import gather, process_count, sum_in_place


class Collector:
    """Hold the running sums of a pass: one for each distinct input, one for the output gradients of each layer.

    **Arguments**

    - `linears`: layer name -> layer.
    - `device`: device of the float64 sums.
    - `products`: float32 or float64, the least dtype in which blocks are multiplied.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], device: torch.device, products: torch.dtype) -> None:
        self.linears, self.device, self.products = linears, device, products
        self.inputs: dict[str, RunningMoments] = {}
        self.gradients: dict[str, RunningMoments] = {}
        self.leader: dict[str, str] = {}  # layer -> the layer whose moments it shares, decided at its first call
        self.mask: Tensor | None = None
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}  # inputs that are in memory now

    def add_input(self, name: str, value: Tensor) -> None:
        """Add the input of one call of a layer, unless another layer has received the same tensor.

        **Arguments**

        - `name`: the layer.
        - `value`: `(*batch, in)`.

        **Raises**

        - `ValueError`: a layer shares its input in one call and not in another.
        """
        tensor, version, first = self._seen.get(id(value), (lambda: None, -1, name))
        same = tensor() is value and version == value._version
        leader = self.leader.setdefault(name, first if same else name)
        if leader != name:
            if not same or first != leader:
                raise ValueError(
                    f"`layers` {leader!r} and {name!r} had one input at first and now have two: "
                    "collect the statistics of such layers in separate calls."
                )
            return
        if name not in self.inputs:
            self.inputs[name] = RunningMoments(value.shape[-1], self.device, self.products)
        with exact_products(value.device):
            self.inputs[name].add(token_rows(value, self.mask, name))
        if not same:
            self._seen[id(value)] = (weakref.ref(value), value._version, name)

    def add_gradients(self, name: str, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add the inputs and output gradients of all calls of a layer in one pass.

        **Arguments**

        - `name`: the layer.
        - `values`: its inputs, `(samples, *tokens, in)` each.
        - `gradients`: the gradients at its outputs, `(samples, *tokens, out)` each.
        """
        sums = self.gradient_sums(name)
        with exact_products(gradients[0].device):
            for gradient in gradients:
                sums.add(token_rows(gradient, self.mask, name))
            x, g = (
                torch.cat([part.detach().reshape(len(part), -1, part.shape[-1]) for part in parts], dim=1)
                for parts in (values, gradients)
            )
            sums.add_samples(x, g)

    def gradient_sums(self, name: str) -> RunningMoments:
        """Return the sums of a layer's output gradients, zero at first."""
        if name not in self.gradients:
            outputs = self.linears[name].out_features
            self.gradients[name] = RunningMoments(outputs, self.device, self.products, shared=False)
        return self.gradients[name]

    def end_batch(self) -> None:
        """Forget the inputs of the batch and check the sums.

        **Raises**

        - `ValueError`: NaN or infinity in an activation or a gradient.
        """
        self._seen.clear()
        for label, moments in (("activations", self.inputs), ("gradients", self.gradients)):
            if wrong := next((name for name, sums in moments.items() if not sums.all_finite()), None):
                raise ValueError(f"`batches` must give finite {label}, got NaN or infinity in layer {wrong!r}.")

    def sum_over_processes(self, *, with_gradients: bool) -> None:
        """Replace the sums by their totals over all processes; nothing to do in a plain run.

        **Arguments**

        - `with_gradients`: whether the output gradients are collected, also in a process without batches.

        **Raises**

        - `ValueError`: two processes have reached other layers.
        """
        if process_count() == 1:
            return
        leaders = [leader for leader in gather(self.leader) if leader]  # a process without batches has none
        if any(leader != leaders[0] for leader in leaders):
            raise ValueError("`batches` must reach the same layers in every process.")
        self.leader = leaders[0] if leaders else {}
        for name in dict.fromkeys(self.leader.values()):
            size = self.linears[name].in_features
            _sum(self.inputs.setdefault(name, RunningMoments(size, self.device, self.products)))
        for name in self.leader if with_gradients else ():
            _sum(self.gradient_sums(name))

    def finish(self) -> dict[str, LayerStatistics]:
        """Return layer name -> `LayerStatistics`, and drop each sum once it is finished.

        Two matrices of one layer at most are in memory beside the result.
        """
        statistics: dict[str, LayerStatistics] = {}
        for name in list(self.inputs):
            sums = self.inputs.pop(name)
            statistics[name] = LayerStatistics(tokens=sums.tokens, **sums.finish())
        finished = {name: self.gradients.pop(name).finish() for name in list(self.gradients)}
        return {name: replace(statistics[self.leader[name]], **finished.get(name, {})) for name in self.linears}


def _sum(sums: RunningMoments) -> None:
    tokens = torch.tensor(sums.tokens, device=sums.device)
    for tensor in (*sums.sums.values(), tokens):
        sum_in_place(tensor)
    sums.tokens = int(tokens)
