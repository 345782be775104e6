"""Add up the moments of every layer during a pass, those of an input once for all layers that receive it."""

import weakref
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lowrank.calibration.hooks import exact_products, token_rows
from lowrank.factorization.moments import MOMENTS, SIZES, LayerStatistics
from lowrank.factorization.precision import with_float64
from lowrank.factorization.running_moments import RunningMoments
from lowrank.io.distributed import gather, process_count, process_index, sum_in_place
from lowrank.nn.autograd import version_of
from lowrank.nn.offloaded import weights_of

Key = tuple[str, str]  # a layer, and what its sums are of: "gram", "input", "output", "gradient" or "pullback"


class Collector:
    """Hold the running sums of a pass.

    The sums of an input belong to the first layer that receives it, and others point there. The second moment is apart from
    the rest, since of two layers with one input perhaps only one needs it.

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
        self.leader: dict[Key, str] = {}  # whose sums a layer shares, decided at its first call
        self.mask: Tensor | None = None
        self.recomputing = False  # calls that repeat a forward pass do not count
        self._seen: dict[tuple[int, str], tuple[weakref.ref[Tensor], object, str]] = {}  # inputs that are in memory now

    def sums_of(self, name: str, group: str) -> RunningMoments:
        """Return the sums of a layer, zero at first.

        **Arguments**

        - `name`: the layer.
        - `group`: what they are of.
        """
        if (name, group) not in self.sums:
            fields, shape = self.groups[name][group], self.linears[name].weight.shape
            size = shape[SIDES_OF[group]]
            self.sums[name, group] = RunningMoments(fields, size, self.device, self.products, process_index())
        return self.sums[name, group]

    def add_call(self, name: str, value: Tensor, output: Tensor) -> None:
        """Add the input and the output of one call of a layer; the input once for all layers that receive it.

        **Arguments**

        - `name`: the layer.
        - `value`: `(*batch, in)`.
        - `output`: `(*batch, out)`.

        **Raises**

        - `ValueError`: a layer shares its input in one call and not in another.
        """
        if self.recomputing:
            return
        with exact_products(value.device):
            for group in ("input", "gram"):
                if group in self.groups[name] and self._leads(name, group, value):
                    self.sums_of(name, group).add(token_rows(value, self.mask, name))
            if "output" in self.groups[name]:
                self.sums_of(name, "output").add(self._outputs(name, value, output))

    def _leads(self, name: str, group: str, value: Tensor) -> bool:
        """Return True if this layer is the one that adds this input."""
        tensor, version, first = self._seen.get((id(value), group), (lambda: None, -1, name))
        same = tensor() is value and version == version_of(value)
        leader = self.leader.setdefault((name, group), first if same else name)
        if leader != name and (not same or first != leader):
            raise ValueError(
                f"`layers` {leader!r} and {name!r} had one input at first and now have two: "
                "collect the statistics of such layers in separate calls."
            )
        if leader == name and not same:
            self._seen[id(value), group] = (weakref.ref(value), version_of(value), name)
        return leader == name

    def _outputs(self, name: str, value: Tensor, output: Tensor) -> Tensor:
        """Return the outputs before the bias; multiplied anew if the layer rounds them more than `products` allows."""
        layer = self.linears[name]
        wide = torch.promote_types(output.dtype, self.products)
        if wide != output.dtype:
            rows = with_float64(token_rows(value, self.mask, name).detach()).to(wide)
            with weights_of(layer):
                return rows @ layer.weight.detach().to(rows).T
        rows = token_rows(output, self.mask, name).detach()
        if layer.bias is None:
            return rows
        with weights_of(layer):
            return rows - layer.bias.detach()

    def add_gradients(self, name: str, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add the inputs and output gradients of all calls of a layer in one pass.

        **Arguments**

        - `name`: the layer.
        - `values`: its inputs, `(samples, *tokens, in)` each.
        - `gradients`: the gradients at its outputs, `(samples, *tokens, out)` each.
        """
        groups = self.groups[name]
        with exact_products(gradients[0].device):
            for gradient in gradients:
                rows = token_rows(gradient, self.mask, name)
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
        self._seen.clear()
        if wrong := next((key for key, sums in self.sums.items() if not sums.all_finite()), None):
            name, group = wrong
            label = "gradients" if group in ("gradient", "pullback") else "activations"
            raise ValueError(f"`batches` must give finite {label}, got NaN or infinity in layer {name!r}.")

    def sum_over_processes(self) -> None:
        """Replace the sums by their totals over all processes; nothing to do in a plain run.

        **Raises**

        - `ValueError`: two processes have reached other layers.
        """
        if process_count() == 1:
            return
        leaders = [leader for leader in gather(self.leader) if leader]  # a process without batches has none
        if any(leader != leaders[0] for leader in leaders):
            raise ValueError("`batches` must reach the same layers in every process.")
        self.leader = leaders[0] if leaders else {}
        reached = {name for name, _ in self.leader}
        for name in self.linears:
            for group in self.groups[name] if name in reached else ():
                if self.leader.get((name, group), name) == name:
                    _sum(self.sums_of(name, group))

    def tokens(self, name: str) -> int:
        """Return how many tokens a layer has received; 0 if no batch reached it.

        **Arguments**

        - `name`: the layer.
        """
        leader = self.leader.get((name, "input"))
        return 0 if leader is None else self.sums[leader, "input"].tokens

    def finish(self) -> dict[str, LayerStatistics]:
        """Return layer name -> `LayerStatistics`, and drop each sum once it is finished.

        Two matrices of one layer at most are in memory beside the result.
        """
        tokens = {name: self.tokens(name) for name in self.linears}
        for name, groups in self.groups.items():  # the sums of gradients that never came are zero
            for group in groups:
                self.sums_of(self.leader.get((name, group), name), group)
        finished = {key: self.sums.pop(key).finish() for key in list(self.sums)}
        statistics: dict[str, LayerStatistics] = {}
        for name, groups in self.groups.items():
            fields: dict[str, Tensor | None] = {"gram": None}
            for group, names in groups.items():
                shared = finished[self.leader.get((name, group), name), group]
                fields |= {field: shared[field] for field in names}
            statistics[name] = LayerStatistics(tokens=tokens[name], **fields)  # pyright: ignore[reportArgumentType]
        return statistics


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


def _sum(sums: RunningMoments) -> None:
    tokens = torch.tensor(sums.tokens, device=sums.device)
    for tensor in (*sums.sums.values(), tokens):
        sum_in_place(tensor)
    sums.tokens = int(tokens)
