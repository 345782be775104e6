"""Check the arguments of a public function against its annotations, before it does anything."""

import functools
import inspect
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])
LONGEST = 80  # characters of a value in a message
NUMBERS = {int: numbers.Integral, float: numbers.Real}  # NumPy's are such, too; a bool is none here


class ArgumentError(TypeError, ValueError):
    """Report an argument of another type than its annotation says."""


def check_arguments(target: F) -> F:
    """Wrap a function, or the constructor of a class, so that each argument has the type that its annotation says.

    Types are checked down to the items of lists, tuples and dicts, and to kind and dimensions of tensors. What can be read
    once stays unread.

    **Arguments**

    - `target`: function or class, with annotations.

    **Returns** the function with the check in front, or the same class.

    **Raises** when called:

    - `ArgumentError`, a `TypeError` and a `ValueError`: "`rank` must be int, got '3'."
    """
    if inspect.isclass(target):
        setattr(target, "__init__", check_arguments(target.__init__))  # noqa: B010 (a constructor may not be assigned)
        return typing.cast(F, target)
    signature = inspect.signature(target)

    @functools.wraps(target)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in (hints := _hints(target)):
                _check(name, value, hints[name], signature.parameters[name].kind)
        return target(*args, **kwargs)

    return typing.cast(F, checked)


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function)


def _check(name: str, value: Any, hint: Any, kind: Any) -> None:
    several = {name: value}
    if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        several = value if isinstance(value, dict) else {f"{name}[{i}]": item for i, item in enumerate(value)}
    for label, item in several.items():
        if (wrong := _find_wrong(item, hint, label)) is not None:
            place, part, wanted = wrong[0], wrong[1], _name(wrong[2])
            single = isinstance(part, str) and re.match("Iterable|Sequence|Collection", wanted)
            raise ArgumentError(
                f"`{place}` must be {wanted}, got {'the single string ' if single else ''}{describe(part)}."
            )
        _check_device(label, item, hint)


def _check_device(name: str, value: Any, hint: Any) -> None:
    """Refuse a text that names no device, if a `torch.device` may stand in its place."""
    device = next((part for part in get_args(hint) if getattr(part, "__name__", "") == "device"), None)
    if isinstance(value, str) and device is not None:
        try:
            device(value)
        except RuntimeError:
            raise ArgumentError(f"`{name}` must name a device, as 'cpu' or 'cuda:0', got {value!r}.") from None


def _find_wrong(value: Any, hint: Any, place: str, items: bool = True) -> tuple[str, Any, Any] | None:
    """Return place, value and annotation of the value or the first of its items that has another type; None if all fits."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        found = [_find_wrong(value, part, place, items) for part in inner]
        deeper = [wrong for wrong in found if wrong and wrong[0] != place]
        return None if None in found else (deeper or [(place, value, hint)])[0]
    if not _fits(value, hint, origin, inner):
        return place, value, hint
    if not items:  # what is inside of a batch is for the model to read
        return None
    if origin is tuple and type(value) is tuple and Ellipsis not in inner:
        pairs = list(zip(value, inner, strict=False))
    elif type(value) in (list, tuple) and inner:
        pairs = [(item, inner[0]) for item in value]
    elif type(value) is dict and len(inner) == 2:
        wrong = [_find_wrong(key, inner[0], f"{place}[{key!r}]", items=False) for key in value]
        wrong += [_find_wrong(item, inner[1], f"{place}[{key!r}]", items=False) for key, item in value.items()]
        return next((part for part in wrong if part), None)
    else:
        return None
    wrong = (_find_wrong(item, part, f"{place}[{i}]", items=False) for i, (item, part) in enumerate(pairs))
    return next((part for part in wrong if part), None)


def _fits(value: Any, hint: Any, origin: Any, inner: tuple[Any, ...]) -> bool:
    """Return True if a value has the type of an annotation, its items aside."""
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint in NUMBERS:
        return isinstance(value, NUMBERS[hint]) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, os.PathLike)
    if origin is Literal:
        return value in inner
    if origin is Callable:
        return callable(value)
    if origin in (Iterable, Sequence, Collection):
        return _is_several(value, origin, inner)
    if origin is tuple and Ellipsis not in inner:
        return isinstance(value, tuple | list) and len(value) == len(inner)
    kind = origin or hint
    if not isinstance(kind, type) or (getattr(kind, "_is_protocol", False) and kind.__module__ != "collections.abc"):
        return True
    return isinstance(value, tuple | list if kind is tuple else kind)


def _is_several(value: Any, origin: Any, inner: tuple[Any, ...]) -> bool:
    """Return True for what is iterable. A text is no list of texts, though Python reads it as one of letters."""
    if isinstance(value, str | bytes):
        return False
    if origin is Iterable:
        return hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    return (
        hasattr(value, "__len__")
        and hasattr(value, "__iter__")
        and not (origin is Sequence and isinstance(value, Mapping))
    )


def _name(hint: Any) -> str:
    """Return an annotation without the names of modules."""
    text = hint.__qualname__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=\w)", "", text).replace("NoneType", "None")


def describe(value: Any) -> str:
    """Describe a value in a few words of one line: shape and dtype of a tensor or array, else type or text."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, str | int | float | None | list | tuple | dict | Path):
        try:
            return f"{' '.join(repr(value).split()):.{LONGEST}}"
        except ValueError:  # Python writes no integer of more than 4300 digits
            return "a very large integer"
    return (
        f"{'the class' if isinstance(value, type) else 'a'} {getattr(value, '__qualname__', type(value).__qualname__)}"
    )
