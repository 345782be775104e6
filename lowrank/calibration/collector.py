"""Add up the moments of every layer during a pass, those of an input once for all layers that receive it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from lowrank.calibration.hooks import exact_products
from lowrank.calibration.padding import BatchPadding, token_rows
from lowrank.calibration.sharing import SharedInputs
from lowrank.factorization.moments import MOMENTS, SIZES, LayerStatistics
from lowrank.factorization.precision import with_float64
from lowrank.factorization.running_moments import RunningMoments, cut_blocks
from lowrank.io.distributed import gather, process_count, process_index, sum_in_place
from lowrank.nn.offloaded import weights_of

Key = tuple[str, str]  # a layer, and what its sums are of: "gram", "input", "output", "gradient" or "pullback"


class Collector:
    """Hold the running sums of a pass.

    Layers share the sums of inputs that all of them receive. The second moment is apart from the rest, since of two layers
    with one input perhaps only one needs it.

    **Arguments**

    - `linears`: layer name -> layer.
    - `fields`: layer name -> the fields of `LayerStatistics` to collect.
    - `device`: device of the float64 sums.
    - `products`: float32 or float64, the least dtype in which blocks are multiplied.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        fields: Mapping[str, Sequence[str]],
        device: torch.device,
        products: torch.dtype,
    ) -> None:
        self.linears, self.device, self.products = linears, device, products
        self.groups = {name: _group(names) for name, names in fields.items()}
        self.sums: dict[Key, RunningMoments] = {}
        self.shared = {group: SharedInputs(lambda name, group=group: self._create(name, group)) for group in INPUTS}
        self.mask: BatchPadding | None = None
        self.recomputing = False  # calls that repeat a forward pass do not count
        self._calls: Counter[str] = Counter()  # of each layer in this batch

    def sums_of(self, name: str, group: str) -> RunningMoments:
        """Return the sums of a layer, zero at first.

        **Arguments**

        - `name`: the layer.
        - `group`: what they are of.
        """
        if (name, group) not in self.sums:
            self.sums[name, group] = self._create(name, group)
        return self.sums[name, group]

    def _create(self, name: str, group: str) -> RunningMoments:
        fields, shape = self.groups[name][group], self.linears[name].weight.shape
        return RunningMoments(fields, shape[SIDES_OF[group]], self.device, self.products, process_index())

    def add_call(self, name: str, value: Tensor, output: Tensor) -> None:
        """Add the input and the output of one call of a layer; the input once for all layers that receive it.

        **Arguments**

        - `name`: the layer.
        - `value`: `(*batch, in)`.
        - `output`: `(*batch, out)`.
        """
        if self.recomputing:
            return
        if value.is_inference():
            value = value.clone()  # it has no version: whether another call gets the same is not known
        call = self._calls[name]
        self._calls[name] += 1
        blocks = cache(lambda: cut_blocks(token_rows(value, self.mask, name, call), self.products))  # for both groups
        with exact_products(value.device):
            for group in INPUTS:
                if group in self.groups[name]:
                    self.shared[group].receive(name, value, blocks)
            if "output" in self.groups[name]:
                self.sums_of(name, "output").add(self._outputs(name, value, output, call))

    def _outputs(self, name: str, value: Tensor, output: Tensor, call: int) -> Tensor:
        """Return the outputs before the bias; multiplied anew if the layer rounds them more than `products` allows."""
        layer = self.linears[name]
        wide = torch.promote_types(output.dtype, self.products)
        if wide != output.dtype:
            rows = with_float64(token_rows(value, self.mask, name, call).detach()).to(wide)
            with weights_of(layer):
                return rows @ layer.weight.detach().to(rows).T
        rows = token_rows(output, self.mask, name, call).detach()
        if layer.bias is None:
            return rows
        with weights_of(layer):
            return rows - layer.bias.detach()

    def add_gradients(
        self, name: str, calls: Sequence[int], values: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Add the inputs and output gradients of the calls of a layer in one pass that have gradients.

        **Arguments**

        - `name`: the layer.
        - `calls`: how many times it was called before each of these calls.
        - `values`: its inputs, `(samples, *tokens, in)` each.
        - `gradients`: the gradients at its outputs, `(samples, *tokens, out)` each.
        """
        groups = self.groups[name]
        with exact_products(gradients[0].device):
            for call, gradient in zip(calls, gradients, strict=True):
                rows = token_rows(gradient, self.mask, name, call)
                if "gradient" in groups:
                    self.sums_of(name, "gradient").add(rows)
                if "pullback" in groups:
                    wide = with_float64(rows).to(torch.promote_types(rows.dtype, self.products))
                    with weights_of(self.linears[name]):
                        weight = self.linears[name].weight.detach().to(wide)
                    self.sums_of(name, "pullback").add(wide @ weight)
            if any(MOMENTS[field]["over_samples"] for field in groups.get("gradient", ())):
                for x, g in _join_calls(values, gradients):
                    self.sums_of(name, "gradient").add_samples(x, g)

    def end_batch(self) -> None:
        """Forget the inputs of the batch and check the sums.

        **Raises**

        - `ValueError`: NaN or infinity in an activation or a gradient.
        """
        for group, inputs in self.shared.items():
            with exact_products(self.device):
                inputs.end_batch()
            for shared in inputs.groups:
                if not shared.sums.all_finite():
                    raise ValueError(_not_finite(shared.members[0], group))
        self._calls.clear()
        if wrong := next((key for key, sums in self.sums.items() if not sums.all_finite()), None):
            raise ValueError(_not_finite(*wrong))

    def sum_over_processes(self) -> None:
        """Replace the sums by their totals over all processes; nothing to do in a plain run.

        **Raises**

        - `ValueError`: two processes have reached other layers.
        """
        if process_count() == 1:
            return
        reached: set[str] = set()
        for inputs in self.shared.values():
            own = {name: shared.members[0] for name, shared in sorted(inputs.group_of.items())}
            labels = [label for label in gather(own) if label]  # a process without batches has none
            if any(label.keys() != labels[0].keys() for label in labels):
                raise ValueError("`batches` must reach the same layers in every process.")
            if labels:
                inputs.align(labels)
                reached |= labels[0].keys()
            for shared in inputs.groups:
                _sum(shared.sums)
        for name in self.linears:
            for group in sorted(self.groups[name].keys() - INPUTS) if name in reached else ():
                _sum(self.sums_of(name, group))

    def tokens(self, name: str) -> int | None:
        """Return how many tokens a layer has received; None if no batch reached it.

        **Arguments**

        - `name`: the layer.
        """
        shared = self.shared["input"].group_of.get(name)
        return None if shared is None else shared.sums.tokens

    def finish(self) -> dict[str, LayerStatistics]:
        """Return layer name -> `LayerStatistics`, and drop each sum once it is finished.

        Two matrices of one layer at most are in memory beside the result.
        """
        tokens = {name: self.tokens(name) or 0 for name in self.linears}
        for name, groups in self.groups.items():  # the sums of gradients that never came are zero
            for group in groups.keys() - INPUTS:
                self.sums_of(name, group)
        finished = {key: self.sums.pop(key).finish() for key in list(self.sums)}
        for group, inputs in self.shared.items():
            while inputs.group_of:
                shared = next(iter(inputs.group_of.values()))
                for name in shared.members:
                    del inputs.group_of[name]
                moments = shared.sums.finish()
                finished |= {(name, group): moments for name in shared.members}
        statistics: dict[str, LayerStatistics] = {}
        for name, groups in self.groups.items():
            fields: dict[str, Tensor | None] = {"gram": None}
            for group, names in groups.items():
                fields |= {field: finished[name, group][field] for field in names}
            statistics[name] = LayerStatistics(tokens=tokens[name], **fields)  # pyright: ignore[reportArgumentType]
        return statistics


INPUTS = ("input", "gram")  # the sums that layers with one input share
SIDES_OF = SIZES | {"gram": SIZES["input"]}


def _group(fields: Sequence[str]) -> dict[str, list[str]]:
    """Return the fields by what they are of."""
    groups: dict[str, list[str]] = {}
    for field in fields:
        groups.setdefault("gram" if field == "gram" else MOMENTS[field]["of"], []).append(field)
    return groups


def _join_calls(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Join the calls on equal numbers of samples along their tokens: `(samples, tokens, in)` and `(samples, tokens, out)`."""
    calls = [(torch.atleast_2d(x.detach()), torch.atleast_2d(g)) for x, g in zip(values, gradients, strict=True)]
    for size in dict.fromkeys(len(x) for x, _ in calls):
        same = [pair for pair in calls if len(pair[0]) == size]
        x, g = (
            torch.cat([part.reshape(size, -1, part.shape[-1]) for part in parts], dim=1)
            for parts in zip(*same, strict=True)
        )
        yield x, g


def _not_finite(name: str, group: str) -> str:
    label = "gradients" if group in ("gradient", "pullback") else "activations"
    return f"`batches` must give finite {label}, got NaN or infinity in layer {name!r}."


def _sum(sums: RunningMoments) -> None:
    tokens = torch.tensor(sums.tokens, device=sums.device)
    for tensor in (*sums.sums.values(), tokens):
        sum_in_place(tensor)
    sums.tokens = int(tokens)
