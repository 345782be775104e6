"""Find the layers of a block whose output is added to hidden states, by the values in one pass and without names."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowrank.nn.block_calls import Call, first_tensor, run_block


def find_residuals(
    block: nn.Module, call: Call, layers: Mapping[str, nn.Module], device: torch.device
) -> dict[str, str]:
    """Find the layers that add their output y to hidden states s: a later tensor of the block is s + y, to the last bit.

    A layer whose output is scaled, normalised or joined with others before it is added is not found. The inputs of all modules of
    the block are in memory at once, for this one call.

    **Arguments**

    - `block`: in evaluation mode; it is run once.
    - `call`: its arguments.
    - `layers`: name -> layer of the block, the ones to look at.
    - `device`: where the block is.

    **Returns** name of the layer -> name inside the block of the first module that gets s as its input; '' for the block itself.
    """
    watch = _Watch()
    with ExitStack() as hooks:
        for name, module in block.named_modules():
            hooks.callback(module.register_forward_pre_hook(watch.before(name), with_kwargs=True).remove)
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(watch.after(name)).remove)
        watch.inputs.append(("", run_block(block, call, device)))
    found = {name: watch.find_source(*output) for name, output in watch.outputs.items()}
    return {name: source for name, source in found.items() if source is not None}


class _Watch:
    """Note the inputs of all modules and the outputs of some, in the order of the calls."""

    def __init__(self) -> None:
        self.inputs: list[tuple[str, Tensor]] = []
        self.versions: dict[int, int] = {}
        self.outputs: dict[str, tuple[int, Tensor]] = {}  # with the number of inputs seen before

    def before(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
                value = first_tensor((args, kwargs))
                if all(value is not other for _, other in self.inputs):
                    self.inputs.append((name, value))
                    self.versions[id(value)] = value._version

        return hook

    def after(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            self.outputs[name] = (len(self.inputs), output)

        return hook

    def find_source(self, count: int, output: Tensor) -> str | None:
        """Return the module whose input is the difference of a later tensor and an output."""
        later = list(_alike(self.inputs[count:], output))
        for name, value in _alike(self.inputs[:count], output):
            if self.versions[id(value)] == value._version:  # not changed in place since
                total = _rows(value) + _rows(output)
                if any(torch.equal(total, _rows(other)) for _, other in later):
                    return name
        return None


def _alike(inputs: Sequence[tuple[str, Tensor]], output: Tensor) -> Iterator[tuple[str, Tensor]]:
    size, last = output.numel(), output.shape[-1]
    return (pair for pair in inputs if pair[1].numel() == size and pair[1].dim() > 0 and pair[1].shape[-1] == last)


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])
