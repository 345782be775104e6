"""Two streams of hidden states, of the dense model and of the model with the new layers made so far, from block to block."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.calibration.padding import BatchPadding, token_rows
from lowrank.nn.batches import Batch, batches_on, device_of, run_model
from lowrank.nn.block_calls import Call, TracedBlock, capture_calls, first_tensor, run_block
from lowrank.nn.residuals import find_residuals
from lowrank.nn.surgery import replace_module

CPU = torch.device("cpu")


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in place inside the block, and those that were there back afterwards.

    **Arguments**

    - `model`: any PyTorch module.
    - `modules`: dotted name -> module.
    """
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            replace_module(model, name, module)
        yield
    finally:
        for name, module in before.items():
            replace_module(model, name, module)


class Streams:
    """Hold what one block is called with in both models, batch by batch, on the CPU: no hidden states of any other block.

    **Arguments**

    - `model`: the dense model, in evaluation mode; it is dense again after each method.
    - `batches`: calibration data.
    - `modules`: layer name -> new layer; the owner adds those that it makes.
    - `padding`: of each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        modules: Mapping[str, nn.Module],
        padding: Sequence[BatchPadding | None],
    ) -> None:
        self.model, self.batches, self.modules, self.padding = model, batches, modules, padding
        self.device = device_of(model)
        self.block: TracedBlock | None = None
        self.dense: list[Call] = []
        self.compressed: list[Call] = []

    def move_to(self, block: TracedBlock) -> None:
        """Take both streams to a block: through the block in front if it follows that one, else from the input of the model.

        **Raises**

        - `ValueError`: a batch that does not reach the block.
        """
        if self.block is not None and block.follows:
            self._pass(self.dense, self.block, {})
            self._pass(self.compressed, self.block, self.modules)
        else:
            self.leave()
            self.dense, self.compressed = self._start(block, {}), self._start(block, self.modules)
        self.block = block

    def leave(self) -> None:
        """Forget both streams, so that the next block gets new ones."""
        self.block, self.dense, self.compressed = None, [], []

    def residuals(self, names: Iterable[str]) -> dict[str, str]:
        """Return those layers of the block that add their output to hidden states, and the modules whose input those are.

        **Arguments**

        - `names`: layers of the block.
        """
        block, call = self._block(), self.dense[0]
        layers = {name: self.model.get_submodule(name) for name in names}
        found = find_residuals(self.model.get_submodule(block), call, layers, self.device)
        return {name: ".".join(filter(None, (block, source))) for name, source in found.items()}

    def inputs(
        self, name: str, residual: str | None = None
    ) -> Iterator[tuple[Float[Tensor, "tokens u"], Float[Tensor, "tokens n"]]]:
        """Run the block until it calls a layer, and yield what it wants and what it gets, for each batch.

        **Arguments**

        - `name`: a layer of the block, one that is still dense.
        - `residual`: a module whose input are the hidden states that the layer is added to. Default None.

        **Returns** pairs: the inputs in the dense model, followed by the difference of the hidden states in the two models if
        there is a `residual`; and the inputs in the compressed model.

        **Raises**

        - `ValueError`: a batch that does not reach the layer, or with other tokens in the two models.
        """
        names = [name] if residual is None else [residual, name]
        for mask, dense, compressed in zip(self.padding, self.dense, self.compressed, strict=True):
            (*s, x), (*own, rows) = (
                [token_rows(first_tensor(found), mask, name) for found in self._capture(names, call, modules)]
                for call, modules in ((dense, {}), (compressed, self.modules))
            )
            if x.shape != rows.shape:
                raise ValueError(
                    f"`layers` must receive the same tokens in the dense and the compressed model, got {len(x)} and "
                    f"{len(rows)} in {name!r}, as under routing: leave it out."
                )
            wide = torch.promote_types(x.dtype, torch.float32)
            yield torch.cat([x, *(a.to(wide) - b.to(wide) for a, b in zip(s, own, strict=True))], dim=1), rows

    def _capture(self, names: Sequence[str], call: Call, modules: Mapping[str, nn.Module]) -> list[Call]:
        """Run the block until it has called some modules, and return what they were called with."""
        with replaced(self.model, modules):
            block, *parts = (self.model.get_submodule(name) for name in (self._block(), *names))
            return capture_calls(parts, lambda: run_block(block, call, self.device))

    def _block(self) -> str:
        assert self.block is not None
        return self.block.name

    def _start(self, block: TracedBlock, modules: Mapping[str, nn.Module]) -> list[Call]:
        """Return what a block is called with, by running the model up to it."""
        target = self.model.get_submodule(block.name)
        with replaced(self.model, modules):
            batches = batches_on(self.batches, self.device)
            return [capture_calls([target], lambda b=batch: run_model(self.model, b))[0].to(CPU) for batch in batches]

    def _pass(self, calls: list[Call], block: TracedBlock, modules: Mapping[str, nn.Module]) -> None:
        """Run a block on a stream; its output takes the place of its input, batch by batch."""
        module = self.model.get_submodule(block.name)
        with replaced(self.model, modules):
            for position, call in enumerate(calls):
                calls[position] = call.with_hidden(run_block(module, call, self.device).to(CPU))
