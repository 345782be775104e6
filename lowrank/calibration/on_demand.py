"""Statistics of a model whose moments do not fit in memory together."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lowrank.calibration.collect import collect_statistics
from lowrank.factorization.moments import LayerStatistics
from lowrank.nn.batches import Batch
from lowrank.nn.targets import BLOCKS, find_linears, split_block


class OnDemand(Mapping[str, LayerStatistics]):
    """Statistics that are collected when they are asked for, one block of layers at a time, and dropped for the next.

    For models whose moments do not fit in memory together: a pass over the batches for every block, and the moments of one
    block held. What is asked for is measured on the model as it is then; `compress` asks for the last block first, so that
    the inputs of every block are still those of the dense model.

    **Arguments:** those of `collect_statistics`; `batches` is gone through once per block, so no generator.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], layers: Iterable[str] = BLOCKS, **options: Any
    ) -> None:
        if isinstance(batches, Iterator):
            raise ValueError("`batches` must be gone through once per block: pass a list or a loader, got an iterator.")
        self.model, self.batches, self.options = model, batches, options
        self.blocks: dict[str, list[str]] = {}
        for name in find_linears(model, layers):
            self.blocks.setdefault(split_block(name)[0], []).append(name)
        self.held: dict[str, LayerStatistics] = {}

    def __getitem__(self, name: str) -> LayerStatistics:
        if name not in self:
            raise KeyError(name)
        if name not in self.held:
            self.held = {}  # dropped before the next are made
            self.held = collect_statistics(self.model, self.batches, self.blocks[split_block(name)[0]], **self.options)
        return self.held[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.blocks.get(split_block(name)[0], ())

    def __iter__(self) -> Iterator[str]:
        return (name for names in self.blocks.values() for name in names)

    def __len__(self) -> int:
        return sum(map(len, self.blocks.values()))
