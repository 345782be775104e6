"""Find the blocks that a model calls, in what order it calls layers, and run one block alone.

A block is a numbered part of the model (`split_block`). The first tensor among its arguments, and the first among what it
returns, are its hidden states. Nothing here goes by the names of a family: what follows what is seen from a pass.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lowrank.nn.autograd import version_of
from lowrank.nn.batches import Batch, run_model
from lowrank.nn.targets import split_block


class Call(NamedTuple):
    """Hold what a module is called with.

    **Arguments**

    - `args`: arguments by position.
    - `kwargs`: arguments by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> "Call":
        """Return the arguments with copies of their tensors on a device, so that a block may work in place."""
        return Call(*tree_map(lambda leaf: leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf, (*self,)))

    def with_hidden(self, hidden: Tensor) -> "Call":
        """Return the arguments with other hidden states."""
        leaves, form = tree_flatten((*self,))
        leaves[_first_tensor(leaves)] = hidden
        return Call(*tree_unflatten(leaves, form))


@dataclass(frozen=True)
class TracedBlock:
    """Describe a block as a model calls it.

    **Arguments**

    - `name`: dotted name of the module.
    - `follows`: whether it gets the hidden states that the targeted block in front returns, and its other arguments, as they are.
    - `stages`: its targeted layers in the order of their first call; layers that receive one tensor are one stage.
    """

    name: str
    follows: bool
    stages: tuple[tuple[str, ...], ...]


class _Reached(Exception):  # noqa: N818 (no error: it ends a pass that has gone far enough)
    """End a pass at a module."""


def capture_calls(modules: Sequence[nn.Module], run: Callable[[], Any]) -> list[Call]:
    """Return the arguments that modules are called with in a pass, and stop the pass at the last one.

    **Arguments**

    - `modules`: parts of what is run, in the order in which it calls them.
    - `run`: runs a model or a block.

    **Raises**

    - `ValueError`: the pass does not call all of them in this order.
    """
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is modules[len(calls)]:
            calls.append(Call(args, kwargs))
        if len(calls) == len(modules):
            raise _Reached

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        run()
    except _Reached:
        return calls
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError("`batches` must all reach the same layers, got a batch that does not.")


def run_block(block: nn.Module, call: Call, device: torch.device) -> Tensor:
    """Run a block alone and return its hidden states.

    **Arguments**

    - `block`: the module.
    - `call`: its arguments, on any device.
    - `device`: where the block is.
    """
    return first_tensor(block(*(here := call.to(device)).args, **here.kwargs))


def first_tensor(value: Any) -> Tensor:
    """Return the first tensor in a nest of tuples, lists and mappings: the hidden states of a call or of an output.

    **Raises**

    - `ValueError`: there is none.
    """
    leaves = tree_leaves(value)
    return leaves[_first_tensor(leaves)]


def _first_tensor(leaves: Sequence[Any]) -> int:
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            return place
    raise ValueError("`model` must pass hidden states to its blocks as tensors, got a block without any.")


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Run a model without its cache of keys and values inside the `with` block: a block run twice would write it twice."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    used = [config for config in configs.values() if getattr(config, "use_cache", False)]
    try:
        for config in used:
            config.use_cache = False
        yield
    finally:
        for config in used:
            config.use_cache = True


def trace_blocks(model: nn.Module, batches: Iterable[Batch], layers: Mapping[str, nn.Linear]) -> list[TracedBlock]:
    """Find the blocks of targeted layers and their stages, in the order in which a model calls them.

    **Arguments**

    - `model`: in evaluation mode; every batch is run once.
    - `batches`: on the model's device.
    - `layers`: layer name -> layer, the targeted ones.

    **Raises**

    - `ValueError`: a layer outside numbered blocks; a block or layer that is not called exactly once in a pass; another order
      in another batch; no batch.
    """
    if outside := next((name for name in layers if not split_block(name)[0]), None):
        raise ValueError(
            f"`layers` must lie in numbered blocks, such as 'layers.0.up', got {outside!r}, which does not."
        )
    found: list[TracedBlock] | None = None
    for position, batch in enumerate(batches):
        blocks = _trace(model, batch, layers)
        for block, first in zip(blocks, found or blocks, strict=True):
            if block != first:
                raise ValueError(
                    "`batches` must all be run in the same order, got another order of layers, or other arguments, in "
                    f"block {block.name!r} of batch {position} than in the first: {block}, not {first}."
                )
        found = blocks
    if found is None:
        raise ValueError("`batches` must hold at least one batch, got none.")
    return found


def _trace(model: nn.Module, batch: Batch, layers: Mapping[str, nn.Linear]) -> list[TracedBlock]:
    """Run one batch and note what it calls."""
    calls = _Calls()
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(calls.on_layer(name), with_kwargs=True).remove)
        for name in {split_block(layer)[0] for layer in layers}:
            for handle in calls.watch(name, model.get_submodule(name)):
                hooks.callback(handle.remove)
        run_model(model, batch)
    return calls.finish(layers)


class _Calls:
    """Note the calls of blocks and layers in one pass, without keeping more than one block's tensors."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.stages: dict[str, list[tuple[weakref.ref[Tensor], object, list[str]]]] = {}
        self.front: dict[str, str | None] = {}  # block -> the block whose output it continues
        self.current: dict[str, Call] = {}  # blocks that run now
        self.last: tuple[str, Call, Any] | None = None  # the block that ended last, its arguments and what it returned

    def on_layer(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.counts[name] = self.counts.get(name, 0) + 1
            value = first_tensor((args, kwargs))
            stages = self.stages.setdefault(split_block(name)[0], [])
            same = (names for tensor, version, names in stages if tensor() is value and version == version_of(value))
            if (names := next(same, None)) is not None:
                names.append(name)
            else:
                stages.append((weakref.ref(value), version_of(value), [name]))

        return hook

    def watch(self, name: str, block: nn.Module) -> Iterator[Any]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.counts[name] = self.counts.get(name, 0) + 1
            self.current[name] = call = Call(args, kwargs)
            self.front[name] = self.last[0] if self.last and _continues(call, *self.last[1:]) else None

        def after(_: nn.Module, __: Any, output: Any) -> None:
            self.last = (name, self.current.pop(name), output)

        yield block.register_forward_pre_hook(before, with_kwargs=True)
        yield block.register_forward_hook(after)

    def finish(self, layers: Mapping[str, nn.Linear]) -> list[TracedBlock]:
        for name in [*layers, *{split_block(name)[0]: None for name in layers}]:
            if (count := self.counts.get(name, 0)) != 1:
                raise ValueError(
                    f"`model` must call each targeted layer and its block once in a pass, got {count} calls of {name!r}: "
                    "leave it out of `layers`."
                )
        names = [None, *self.stages]
        return [
            TracedBlock(
                name, front is not None and self.front[name] == front, tuple(tuple(s) for *_, s in self.stages[name])
            )
            for front, name in zip(names, self.stages, strict=False)
        ]


def _continues(call: Call, before: Call, output: Any) -> bool:
    """Tell whether a block is called as the one before it was, but for the hidden states, which are its output."""
    (leaves, form), (others, other_form) = tree_flatten((*call,)), tree_flatten((*before,))
    place = _first_tensor(leaves)
    pairs = [pair for position, pair in enumerate(zip(leaves, others, strict=False)) if position != place]
    return form == other_form and leaves[place] is first_tensor(output) and all(_equal(*pair) for pair in pairs)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.dtype == b.dtype and torch.equal(a, b))
    return a is b or (isinstance(a, bool | int | float | str) and type(a) is type(b) and a == b)
