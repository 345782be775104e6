"""Arguments against annotations: what fits passes as it is, what does not is named before anything is done."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.io.arguments import ArgumentError, check_arguments, describe


@check_arguments
def public(
    weight: Float[Tensor, "out in"],
    rank: int = 1,
    keep: float | int | None = None,
    flag: bool = False,
    *more: int,
    layers: Iterable[str] = (),
    values: Sequence[float | int] = (),
    ranks: Mapping[str, int] | None = None,
    loss: Callable[[nn.Module], Tensor] | None = None,
    device: torch.device | str | None = None,
    path: Path | str = "",
    pair: tuple[int, int] | None = None,
    side: Literal["in", "out"] = "in",
    **options: Any,
) -> dict[str, Any]:
    """Return what came."""
    return dict(rank=rank, keep=keep, values=values, **options)


WEIGHT = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(weight=3), r"`weight` must be Float\[Tensor, 'out in'\], got 3"),
        (dict(weight=WEIGHT[0]), r"got Tensor of shape \(3,\), torch.float32"),
        (dict(weight=WEIGHT.int()), "torch.int32"),
        (dict(weight=np.ones((2, 3))), r"got ndarray of shape \(2, 3\), float64"),
        (dict(rank="3"), "`rank` must be int, got '3'"),
        (dict(rank=2.0), "`rank` must be int, got 2.0"),
        (dict(rank=True), "`rank` must be int, got True"),
        (dict(keep=True), r"`keep` must be float \| int \| None, got True"),
        (dict(keep=[0.5]), r"got \[0.5\]"),
        (dict(flag=1), "`flag` must be bool, got 1"),
        (dict(layers="up"), r"`layers` must be Iterable\[str\], got the single string 'up'"),
        (dict(layers=["up", 5]), r"`layers\[1\]` must be str, got 5"),
        (dict(layers=5), "`layers` must be"),
        (dict(values={1: 2}), "`values` must be Sequence"),
        (dict(values=[1, "2"]), r"`values\[1\]` must be float \| int, got '2'"),
        (dict(ranks={"a": 2.0}), r"`ranks\['a'\]` must be int, got 2.0"),
        (dict(ranks={5: 2}), r"`ranks\[5\]` must be str, got 5"),
        (dict(ranks=[2]), r"`ranks` must be Mapping\[str, int\] \| None"),
        (dict(loss=5), "`loss` must be Callable"),
        (dict(device="nowhere"), "`device` must name a device, as 'cpu' or 'cuda:0', got 'nowhere'"),
        (dict(device=5), r"`device` must be device \| str \| None"),
        (dict(path=5), r"`path` must be Path \| str, got 5"),
        (dict(pair=(1, 2, 3)), r"`pair` must be tuple\[int, int\]"),
        (dict(pair=(1, "2")), r"`pair\[1\]` must be int"),
        (dict(side="left"), "`side` must be Literal"),
        (dict(keep=nn.Linear), "got the class Linear"),
        (dict(keep=nn.Linear(2, 2)), "got a Linear"),
    ],
)
def test_another_type_is_named_with_its_value_in_one_line(given, words) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        public(**{"weight": WEIGHT} | given)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_what_fits_passes_as_it_is() -> None:
    given: dict[str, Any] = dict(rank=np.int64(2), keep=np.float32(0.5), values=np.ones(3), colour=object())
    assert public(WEIGHT, **given) == given
    public(WEIGHT.half(), 1, None, True, 4, 5, layers=iter(["a"]), ranks={}, loss=print, device="cpu", path=Path("a"))
    public(WEIGHT, layers=("a",), values=torch.ones(2), device=torch.device("cpu"), pair=(1, 2), side="out")


def test_an_iterable_that_can_be_read_once_stays_unread() -> None:
    @check_arguments
    def first(items: Iterable[int]) -> int:
        return next(iter(items))

    assert first(number for number in (7, 8)) == 7


def test_missing_and_unknown_arguments_are_named_as_python_does() -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'weight'"):
        public()  # pyright: ignore[reportCallIssue]
    with pytest.raises(ArgumentError, match=r"`more\[1\]` must be int, got 'x'"):
        public(WEIGHT, 1, None, True, 4, "x")  # pyright: ignore[reportArgumentType]


@check_arguments
@dataclass(frozen=True)
class Options:
    """Hold options."""

    rank: int = 1
    name: str | None = None


def test_the_constructor_of_a_class_is_checked_and_copies_are_too() -> None:
    assert replace(Options(2), name="a") == Options(2, "a")
    with pytest.raises(ArgumentError, match=r"`name` must be str \| None, got 5"):
        replace(Options(), name=5)


def test_values_of_any_size_are_described_in_one_short_line() -> None:
    values: list[Any] = [
        10**5000,
        "x" * 500,
        list(range(1000)),
        {"a": "b\nc" * 99},
        torch.ones(9, 9),
        nn.ReLU(),
        nn.ReLU,
        json,
    ]
    assert all(len(describe(value)) <= 80 and "\n" not in describe(value) for value in values)
