"""Tasks: what a parameter set names. Data, a model, the layers to compress and a metric behind one small interface."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from lowrank.nn.batches import Batch, has_labels, labels, logits
from lowrank.nn.targets import BLOCKS, find_linears
from lowrank.tasks.evaluation import IGNORED, OBJECTIVES, evaluate


@runtime_checkable
class Samples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Task:
    """One data set with one model.

    `splits`: map-style data sets; 'train' to train and calibrate, 'validation' to report, more where the source has
    them. `collate`: list of samples -> batch (see `lowrank.nn.batches`), with `attention_mask` where there is padding.
    `make_model`: a fresh model, its new weights drawn from torch's global seed. `objective`, `metrics`: keys of
    `lowrank.tasks.evaluation`, the headline metric first. `identity`: JSON, all that determines data and fresh model. `base`: how
    to build the model without its weights, as `lowrank.compression.compress.save_compressed` takes it; none is needed where the model
    knows, as those of transformers do.
    """

    name: str
    splits: Mapping[str, Samples]
    make_model: Callable[[], nn.Module]
    objective: str
    metrics: Sequence[str]
    identity: Mapping[str, Any]
    collate: Callable[[list[Any]], Batch] = default_collate
    layers: Sequence[str] = field(default=BLOCKS)
    base: Mapping[str, Any] | None = None

    @property
    def metric(self) -> str:
        return self.metrics[0]

    def split(self, name: str) -> Samples:
        if name not in self.splits:
            raise ValueError(f"`split` must be one of {sorted(self.splits)} for task {self.name!r}, got {name!r}.")
        return self.splits[name]

    def batches(
        self, split: str, batch_size: int, *, samples: int | None = None, seed: int | None = None, workers: int = 0
    ) -> DataLoader:
        """Batches of one split, in order; with `seed`, in an order drawn from it; the first `samples` samples only."""
        size = len(self.split(split))
        if samples is not None and not 1 <= samples <= size:
            raise ValueError(f"`samples` must be in [1, {size}] for split {split!r} of {self.name!r}, got {samples}.")
        order = torch.arange(size)
        if seed is not None:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        chosen = [chunk.tolist() for chunk in order[:samples].split(batch_size)]
        return self.loader(split, chosen, workers)

    def loader(self, split: str, batch_indices: Sequence[Sequence[int]], workers: int = 0) -> DataLoader:
        """Batches of the samples at given positions; draws nothing from torch's global generator."""
        return DataLoader(
            self.split(split),  # pyright: ignore[reportArgumentType] (it asks for its own base class)
            batch_sampler=batch_indices,  # pyright: ignore[reportArgumentType] (any iterable of lists will do)
            collate_fn=self.collate,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
        )

    def linears(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The targeted layers of a model."""
        return find_linears(model, self.layers)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss over the targets of a batch."""
        return OBJECTIVES[self.objective].losses(logits(model, batch), labels(batch)).mean()

    def total_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss summed over the targets of a batch, as `collect_statistics` takes it."""
        return OBJECTIVES[self.objective].losses(logits(model, batch), labels(batch)).sum()

    def sampled_loss(self, seed: int) -> Callable[[nn.Module, Batch], Tensor]:
        """`total_loss` with targets drawn from the model's own prediction: its squared gradients are the true Fisher
        information, and no label is used."""
        objective, generator = OBJECTIVES[self.objective], torch.Generator().manual_seed(seed)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            outputs, given = logits(model, batch), labels(batch)
            drawn = objective.sample(outputs.detach(), generator)
            return objective.losses(outputs, drawn.masked_fill(given == IGNORED, IGNORED)).sum()

        return loss

    def divergence(self, teacher: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
        """How far a model's outputs are from a teacher's, mean over the targets of a batch: a loss to distil with. Where a batch
        has no labels, every position counts."""
        measure = OBJECTIVES[self.objective].divergence

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            with torch.no_grad():
                wanted = logits(teacher, batch)
            given = labels(batch) if has_labels(batch) else None
            return measure(logits(model, batch), wanted, given).mean()

        return loss

    def evaluate(self, model: nn.Module, split: str = "validation", batch_size: int = 64) -> dict[str, float]:
        """Loss and metrics over a whole split."""
        return evaluate(model, self.batches(split, batch_size), self.objective, self.metrics)
