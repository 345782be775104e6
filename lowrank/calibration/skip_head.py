"""Leave a pass before the output head: nothing that statistics are collected of comes after it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn


class _HeadReachedError(Exception):
    """Ends a pass at the head."""


class SkipHead:
    """Skip the output head of a model in passes whose output nobody reads.

    The head is what transformers calls the output embeddings: a product with the whole vocabulary. The first pass runs to its
    end, and no pass is cut short if a layer that is watched comes after the head, or is the head.

    **Arguments**

    - `model`: any PyTorch module; without an output head nothing is skipped.
    - `layers`: layer name -> layer, the layers that are watched.
    """

    def __init__(self, model: Any, layers: Mapping[str, nn.Module]) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.head = (
            head if isinstance(head, nn.Module) and all(head is not layer for layer in layers.values()) else None
        )
        self.layers, self.handles, self.reached, self.passes, self.last = layers, [], False, 0, True
        self.inside = False  # in a pass that may be cut short

    def __enter__(self) -> "SkipHead":
        if self.head is not None:
            self.handles = [layer.register_forward_pre_hook(self._see_layer) for layer in self.layers.values()]
            self.handles.append(self.head.register_forward_pre_hook(self._see_head))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Run one pass inside the block, to the head or to its end."""
        self.reached, self.inside = False, True
        try:
            with suppress(_HeadReachedError):
                yield
        finally:
            self.inside = False
        self.passes += 1

    def _see_layer(self, *_: object) -> None:
        if self.inside and self.reached:
            self.last = False  # the head is not the last to be called

    def _see_head(self, *_: object) -> None:
        self.reached = True
        if self.inside and self.passes and self.last:
            raise _HeadReachedError
