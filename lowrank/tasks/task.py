"""A task: data, a model, the layers to compress, and the losses and metrics that judge the model, behind one interface."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from lowrank.io.checks import require, require_frozen
from lowrank.nn.batches import IGNORED, Batch, compute_logits, get_labels, has_labels
from lowrank.nn.targets import BLOCKS, find_linears
from lowrank.tasks.evaluation import OBJECTIVES, evaluate, evaluate_samples
from lowrank.tasks.metrics import METRICS, Metric


@runtime_checkable
class Samples(Protocol):
    """Describe a map-style data set: samples by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Task:
    """Hold one data set with one model.

    'train' fits and calibrates, 'validation' chooses, and 'test' is reported: it is read only once all choices are frozen,
    see `open_test`.

    **Arguments**

    - `name`: for messages and cache keys.
    - `splits`: name -> map-style data set, with 'train', 'validation' and 'test'; a source may have more.
    - `make_model`: `() -> nn.Module`, a fresh model. Its new weights come from torch's global generator.
    - `objective`: a key of `lowrank.tasks.evaluation.OBJECTIVES`.
    - `metrics`: keys of `lowrank.tasks.metrics.METRICS`, the headline metric first.
    - `identity`: JSON, all that determines data and fresh model: the key of cached results. `lowrank.tasks.registry.load_task`
      sets it; None, the default, before.
    - `collate`: list of samples -> batch, see `lowrank.nn.batches`; with `attention_mask` if samples are padded. The default
      stacks tensors.
    - `layers`: names or patterns of the targeted layers, see `lowrank.nn.targets`; by default all inside blocks.
    - `base`: how to build the model without its weights, see `lowrank.compression.checkpoint.save_compressed`. None, the
      default, for models that know it themselves, as transformers models do.
    - `fingerprints`: JSON, what determines data and weights besides the loader's options: hashes, revisions. Empty by default.
    - `frozen`: the hash of the frozen choices, which opens 'test'. None, the default, before; `open_test` sets it.
    """

    name: str
    splits: Mapping[str, Samples]
    make_model: Callable[[], nn.Module]
    objective: str
    metrics: Sequence[str]
    identity: Mapping[str, Any] | None = None
    collate: Callable[[list[Any]], Batch] = default_collate
    layers: Sequence[str] = field(default=BLOCKS)
    base: Mapping[str, Any] | None = None
    fingerprints: Mapping[str, Any] = field(default_factory=dict)
    frozen: str | None = None

    @property
    def metric(self) -> str:
        """Return the name of the headline metric, the name of its column in tables."""
        return self.metrics[0]

    @property
    def headline(self) -> Metric:
        """Return the headline metric."""
        return METRICS[self.metric]

    @property
    def rows(self) -> dict[str, int]:
        """Return the number of samples of each split."""
        return {name: len(samples) for name, samples in self.splits.items()}

    def open_test(self, frozen: str) -> "Task":
        """Return a copy of the task that may read the split 'test'.

        **Arguments**

        - `frozen`: the hash of the frozen choices, 16 hex digits; `Report.freeze` returns it in a notebook.

        **Raises**

        - `ValueError`: `frozen` is no such hash.
        """
        require_frozen("test", frozen)
        return replace(self, frozen=frozen)

    def split(self, name: str) -> Samples:
        """Return the data set of a split.

        **Raises**

        - `ValueError`: no such split; 'test' before `open_test`.
        """
        require(name in self.splits, "split", f"be one of {sorted(self.splits)} for task {self.name!r}", name)
        require_frozen(name, self.frozen)
        return self.splits[name]

    def batches(
        self, split: str, batch_size: int, *, samples: int | None = None, seed: int | None = None
    ) -> DataLoader:
        """Return the batches of a split.

        **Arguments**

        - `split`: a key of `splits`.
        - `batch_size`: samples per batch, >= 1; the last batch may be smaller.
        - `samples`: how many samples to take, in [1, samples of the split]; all by default.
        - `seed`: shuffles the samples before `samples` of them are taken; by default they stay in order.

        **Raises**

        - `ValueError`: no such split; 'test' before `open_test`; `samples` outside its range.
        """
        size = len(self.split(split))
        rule = f"be in [1, {size}] for split {split!r} of {self.name!r}"
        require(samples is None or 1 <= samples <= size, "samples", rule, samples)
        order = torch.arange(size)
        if seed is not None:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        return self.loader(split, [positions.tolist() for positions in order[:samples].split(batch_size)])

    def loader(self, split: str, batch_indices: Sequence[Sequence[int]], workers: int = 0) -> DataLoader:
        """Return batches of the samples at the given positions; torch's global generator is left as it is.

        **Arguments**

        - `split`: a key of `splits`.
        - `batch_indices`: for each batch the positions of its samples.
        - `workers`: processes that load samples, >= 0; default 0, this process alone.

        **Raises**

        - `ValueError`: no such split; 'test' before `open_test`.
        """
        return DataLoader(
            self.split(split),  # pyright: ignore[reportArgumentType] (it asks for its own base class)
            batch_sampler=batch_indices,  # pyright: ignore[reportArgumentType] (any iterable of lists will do)
            collate_fn=self.collate,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
        )

    def linears(self, model: nn.Module) -> dict[str, nn.Linear]:
        """Return the targeted layers of a model: name -> layer."""
        return find_linears(model, self.layers)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the mean loss over the targets of a batch, a scalar; 0 for a batch without targets.

        **Arguments**

        - `model`: a model of this task, in any form.
        - `batch`: with labels.
        """
        losses = OBJECTIVES[self.objective].losses(compute_logits(model, batch), get_labels(batch))
        return _mean(losses)

    def total_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the sum of the losses over the targets of a batch, a scalar, as `collect_statistics` takes it.

        **Arguments**

        - `model`: a model of this task, in any form.
        - `batch`: with labels.
        """
        return OBJECTIVES[self.objective].losses(compute_logits(model, batch), get_labels(batch)).sum()

    def sampled_loss(self, seed: int) -> Callable[[nn.Module, Batch], Tensor]:
        """Return a function like `total_loss` whose targets are sampled from the model's own prediction.

        Its squared gradients are the true Fisher information. Labels only say which positions count.

        **Arguments**

        - `seed`: of the random targets.

        **Returns** `(model, batch) -> scalar`.
        """
        objective, generator = OBJECTIVES[self.objective], torch.Generator().manual_seed(seed)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            outputs, labels = compute_logits(model, batch), get_labels(batch)
            targets = objective.sample(outputs.detach(), generator)
            if not labels.is_floating_point():  # a number that is predicted may be -100
                targets = targets.masked_fill(labels == IGNORED, IGNORED)
            return objective.losses(outputs, targets).sum()

        return loss

    def divergence(self, teacher: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
        """Return a loss to distil with: the mean of `divergences` over a batch.

        **Arguments**

        - `teacher`: a model of this task; it gets no gradients.

        **Returns** `(model, batch) -> scalar`.
        """
        compare = self.divergences(teacher)
        return lambda model, batch: _mean(compare(model, batch))

    def divergences(self, teacher: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
        """Return a function that measures the distance between the outputs of a model and those of a teacher.

        **Arguments**

        - `teacher`: a model of this task; it gets no gradients.

        **Returns** `(model, batch) -> (targets,)`, one per target, or per position if the batch has no labels.
        """
        measure = OBJECTIVES[self.objective].divergence

        def compare(model: nn.Module, batch: Batch) -> Tensor:
            with torch.no_grad():
                wanted = compute_logits(teacher, batch)
            labels = get_labels(batch) if has_labels(batch) else None
            return measure(compute_logits(model, batch), wanted, labels)

        return compare

    def evaluate(self, model: nn.Module, split: str = "validation", batch_size: int = 64) -> dict[str, float]:
        """Compute loss and metrics over a whole split.

        **Arguments**

        - `model`: a model of this task, in any form; it is not changed.
        - `split`: a key of `splits`; default 'validation'.
        - `batch_size`: samples per batch; default 64.

        **Returns** `loss`, then the metrics, the headline metric first.

        **Raises**

        - `ValueError`: no such split; 'test' before `open_test`.
        """
        return evaluate(model, self.batches(split, batch_size), self.objective, self.metrics)

    def evaluate_samples(
        self, model: nn.Module, split: str = "validation", batch_size: int = 64
    ) -> tuple[dict[str, float], np.ndarray]:
        """Compute what `evaluate` does, and the mean loss of each sample of the split, in its order.

        **Arguments**

        - `model`, `split`, `batch_size`: as for `evaluate`.

        **Returns** the results of `evaluate`; losses, `(samples,)`, float64.

        **Raises**

        - `ValueError`: no such split; 'test' before `open_test`.
        """
        return evaluate_samples(model, self.batches(split, batch_size), self.objective, self.metrics)


def _mean(values: Tensor) -> Tensor:
    """Return the mean, 0 of nothing: a batch may have no target."""
    return values.mean() if values.numel() else values.sum()
