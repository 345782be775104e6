"""Add the moments of an input once for all layers that receive it, and apart for layers that stop to."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lowrank.factorization.running_moments import Block, RunningMoments


@dataclass(eq=False)
class _Group:
    """Hold layers that have received the same inputs so far, and the sums of these.

    **Arguments**

    - `sums`: the sums.
    - `members`: names of the layers.
    - `calls`: inputs so far.
    - `first`: the first input, as long as it is in memory, and its version.
    - `pending`: an input that not all members have received yet, its version, and its blocks. It is added once they have: a layer
      that receives another one takes the sums up to now with it. Whoever waits for the input keeps it in memory anyway.
    - `waiting`: the members that have not received it.
    """

    sums: RunningMoments
    members: list[str]
    calls: int = 0
    first: tuple[weakref.ref[Tensor], int] | None = None
    pending: tuple[Tensor, int, Callable[[], list[Block]]] | None = None
    waiting: set[str] = field(default_factory=set)

    def add_pending(self) -> None:
        """Add the input that all members have received.

        **Raises**

        - `ValueError`: it was changed in the meantime.
        """
        if self.pending is None:
            return
        value, version, blocks = self.pending
        if _version(value) != version:
            raise ValueError(
                f"`layers` {self.members} had one input at first, and now it is changed in place between them: collect the "
                "statistics of such layers in separate calls."
            )
        self.sums.add_blocks(blocks())
        self.calls, self.pending, self.waiting = self.calls + 1, None, set()


class SharedInputs:
    """Hold the sums of the inputs of layers; decide at every call which layers share them.

    **Arguments**

    - `create`: layer name -> sums of nothing.
    """

    def __init__(self, create: Callable[[str], RunningMoments]) -> None:
        self.create = create
        self.group_of: dict[str, _Group] = {}

    @property
    def groups(self) -> list[_Group]:
        """Return the groups, each once."""
        return list(dict.fromkeys(self.group_of.values()))

    def receive(self, name: str, value: Tensor, blocks: Callable[[], list[Block]]) -> None:
        """Take the input of one call of a layer.

        **Arguments**

        - `name`: the layer.
        - `value`: the input.
        - `blocks`: returns its vectors without padding, see `cut_blocks`.
        """
        if name not in self.group_of and (group := self._group_begun_by(value)) is not None:
            group.members.append(name)
            self.group_of[name] = group
            return
        group = self.group_of.setdefault(name, _Group(self.create(name), [name]))
        if group.pending is not None:
            if name in group.waiting and _is_same(value, *group.pending[:2]):
                group.waiting.remove(name)
                if not group.waiting:
                    group.add_pending()
                return
            self._part([name] if name in group.waiting else sorted(group.waiting))
            group = self.group_of[name]
        if len(group.members) == 1:
            group.first = (weakref.ref(value), _version(value)) if group.calls == 0 else None
            group.sums.add_blocks(blocks())
            group.calls += 1
        else:
            group.pending = value, _version(value), blocks
            group.waiting = set(group.members) - {name}

    def end_batch(self) -> None:
        """Set apart the layers that did not receive the last input of their group, and forget the inputs."""
        for group in self.groups:
            self._part(sorted(group.waiting))
            group.first = None

    def _group_begun_by(self, value: Tensor) -> _Group | None:
        """Return the group whose only input so far is this tensor."""
        for group in self.groups:
            if group.calls == 1 and group.first is not None and _is_same(value, group.first[0](), group.first[1]):
                return group
        return None

    def _part(self, names: Iterable[str]) -> None:
        """Give layers that wait for an input, and will not get it, a copy of the sums of their own."""
        for name in names:
            group = self.group_of[name]
            group.members.remove(name)
            group.waiting.remove(name)
            self.group_of[name] = _Group(group.sums.copy(), [name], group.calls)
            if not group.waiting:
                group.add_pending()

    def align(self, labels: Sequence[Mapping[str, str]]) -> None:
        """Set apart the layers that do not share their sums in all processes.

        **Arguments**

        - `labels`: for each process, layer -> the first layer of its group.
        """
        together: dict[tuple[str, ...], list[str]] = {}
        for name in labels[0]:
            together.setdefault(tuple(other[name] for other in labels), []).append(name)
        taken: set[int] = set()
        for names in together.values():
            group = self.group_of.get(names[0]) or _Group(self.create(names[0]), [])
            sums = group.sums.copy() if id(group) in taken else group.sums
            taken.add(id(group))
            self.group_of |= dict.fromkeys(names, _Group(sums, names, group.calls))


def _is_same(value: Tensor, other: Tensor | None, version: int) -> bool:
    return value is other and _version(value) == version


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version
