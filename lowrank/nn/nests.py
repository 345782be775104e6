"""Reach the tensors in a nest of mappings, sequences and dataclasses."""

import copy
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Fields(Protocol):
    """Hold fields, as any dataclass does."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def fields_of(value: Fields) -> dict[str, Any]:
    """Return name -> value of the fields of a dataclass, not copied."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def change_tensors(nest: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a nest of the same form with every tensor changed, and all else as it is.

    **Arguments**

    - `nest`: a tensor; a mapping, list, tuple or dataclass of nests; or anything else, which is returned.
    - `change`: tensor -> tensor.
    """
    if isinstance(nest, Tensor):
        return change(nest)
    if isinstance(nest, Mapping):
        values = {key: change_tensors(value, change) for key, value in nest.items()}
        return _copy_class(nest, values) if isinstance(nest, dict | UserDict) else values
    if isinstance(nest, list | tuple):
        values = [change_tensors(value, change) for value in nest]
        return type(nest)(*values) if hasattr(nest, "_fields") else type(nest)(values)
    if isinstance(nest, Fields) and not isinstance(nest, type):
        changed = copy.copy(nest)
        for name, value in fields_of(nest).items():
            object.__setattr__(changed, name, change_tensors(value, change))  # also if it is frozen
        return changed
    return nest


def _copy_class(nest: Any, values: Mapping[Any, Any]) -> Any:
    """Return the values in a mapping of the same class: that of a tokenizer has its keys as attributes too."""
    copied = copy.copy(nest)
    for key, value in values.items():
        copied[key] = value
    return copied


def list_tensors(nest: Any) -> list[Tensor]:
    """Return the tensors of a nest, see `change_tensors`, in their order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    change_tensors(nest, note)
    return found
