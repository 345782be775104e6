"""Build a stranger's architecture without memory for it, however large its description says it is."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lowrank.io.checks import require

SLACK = 1000  # parameters that a constructor may make and throw away


COUNTS = re.compile("layer|depth", re.IGNORECASE)  # in the names of the numbers that constructors count up to


def check_counts(content: Any, tensors: int, name: str = "") -> None:
    """Check that no description of an architecture counts more layers than a file can hold.

    **Arguments**

    - `content`: JSON, a configuration or options.
    - `tensors`: how many tensors the file of the weights holds.
    - `name`: the key of `content`. Default "".

    **Raises**

    - `ValueError`: a number of layers above `tensors` and `SLACK`; the message names it.
    """
    if isinstance(content, Mapping):
        for key, value in content.items():
            check_counts(value, tensors, str(key))
    elif isinstance(content, Sequence) and not isinstance(content, str):
        for value in content:
            check_counts(value, tensors, name)
    elif isinstance(content, int) and COUNTS.search(name):
        require(content <= tensors + SLACK, "folder", f"describe a model of its {tensors} tensors", f"{name} {content}")


@contextmanager
def bounded_skeleton(tensors: int) -> Iterator[None]:
    """Build modules on the meta device inside a `with` block, and stop at far more parameters than a file has tensors.

    **Arguments**

    - `tensors`: how many tensors the file of the weights holds.

    **Raises**

    - `ValueError`: the modules have more than four times as many parameters, and `SLACK`.
    """
    count, most = 0, 4 * tensors + SLACK

    def register(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        require(count <= most, "folder", f"describe a model of its {tensors} tensors", f"one of more than {most}")

    hook = register_module_parameter_registration_hook(register)
    try:
        with torch.device("meta"):
            yield
    finally:
        hook.remove()
