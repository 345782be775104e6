"""Statistics of a model that has too many layers for all their moments to be in memory together."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lowrank.calibration.collect import collect_statistics
from lowrank.factorization.moments import LayerStatistics
from lowrank.io.arguments import check_arguments
from lowrank.nn.batches import Batch
from lowrank.nn.targets import BLOCKS, find_linears, split_block


@check_arguments
class OnDemand(Mapping[str, LayerStatistics]):
    """Collect statistics when they are asked for, one block of layers at a time, and drop those of the block before.

    This saves memory and costs a pass over the batches for every block. The statistics are of the model as it is when they are
    asked for: `compress` starts at the last block, so that the inputs of every block are still those of the dense model.

    **Arguments**

    - `model`: any PyTorch module.
    - `batches`: batches, see `lowrank.nn.batches`; read once per block, so no iterator.
    - `layers`: names or patterns of `nn.Linear` modules. Default all inside numbered blocks.
    - `options`: further arguments of `collect_statistics`.

    **Raises**

    - `ValueError`: `batches` is an iterator.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], layers: Iterable[str] = BLOCKS, **options: Any
    ) -> None:
        if isinstance(batches, Iterator):
            raise ValueError("`batches` must allow one pass per block: pass a list or a loader, got an iterator.")
        self.model, self.batches, self.options = model, batches, options
        self.blocks: dict[str, list[str]] = {}
        for name in find_linears(model, layers):
            self.blocks.setdefault(split_block(name)[0], []).append(name)
        self.in_memory: dict[str, LayerStatistics] = {}

    def __getitem__(self, name: str) -> LayerStatistics:
        if name not in self:
            raise KeyError(name)
        if name not in self.in_memory:
            self.in_memory = {}  # dropped before the next are collected
            layers = self.blocks[split_block(name)[0]]
            self.in_memory = collect_statistics(self.model, self.batches, layers, **self.options)
        return self.in_memory[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.blocks.get(split_block(name)[0], ())

    def __iter__(self) -> Iterator[str]:
        return (name for names in self.blocks.values() for name in names)

    def __len__(self) -> int:
        return sum(map(len, self.blocks.values()))
