"""Tensors are reached in any nest of containers, and all else stays as it is."""

from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from lowrank.nn.nests import Fields, change_tensors, fields_of, list_tensors

Pair = namedtuple("Pair", "x y")
X, Y = torch.arange(3.0), torch.arange(2)


@dataclass(frozen=True)
class Sample:
    x: Any
    name: str = "a"


NESTS: dict[str, Any] = {
    "tensor": X,
    "dict": {"x": X, "y": Y, "n": 3},
    "ordered": OrderedDict(x=X, y=None),
    "encoding": BatchEncoding({"x": X, "y": Y, "flag": True}),
    "output": BaseModelOutput(last_hidden_state=X),
    "named tuple": Pair(X, "a.png"),
    "list of dicts": [{"boxes": X}, {"boxes": Y}],
    "tuple": (X, np.ones(2), (Y, [X])),
    "dataclass": Sample({"x": [X]}),
    "empty": [],
}
LEAVES: list[Any] = [None, 3, 2.5, True, "text", b"bytes", np.ones(2), range(3), {1, 2}, Sample]


@pytest.mark.parametrize("kind", NESTS)
def test_a_nest_keeps_its_form_and_is_not_changed(kind: str) -> None:
    nest = NESTS[kind]
    before = [tensor.clone() for tensor in list_tensors(nest)]
    changed = change_tensors(nest, lambda tensor: tensor + 1)
    assert type(changed) is type(nest)
    assert all(torch.equal(found, old + 1) for found, old in zip(list_tensors(changed), before, strict=True))
    assert all(torch.equal(found, old) for found, old in zip(list_tensors(nest), before, strict=True))
    assert bool(before) == (kind != "empty")


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: type(leaf).__name__)
def test_what_is_no_tensor_is_passed_on(leaf: Any) -> None:
    def never(_: Tensor) -> Tensor:
        raise AssertionError

    assert change_tensors(leaf, never) is leaf
    assert change_tensors({"a": [leaf]}, never)["a"][0] is leaf


def test_keys_stay_attributes_and_other_mappings_become_plain_ones() -> None:
    encoding: Any = change_tensors(NESTS["encoding"], lambda tensor: tensor + 1)
    assert torch.equal(encoding.x, X + 1)
    assert encoding["flag"] is True
    found = change_tensors(MappingProxyType({"x": X}), lambda tensor: tensor + 1)
    assert isinstance(found, Mapping)
    assert torch.equal(found["x"], X + 1)


def test_fields_are_those_of_a_dataclass() -> None:
    assert isinstance(Sample(X), Fields)
    assert not isinstance({"x": X}, Fields)
    assert fields_of(Sample(X))["x"] is X
