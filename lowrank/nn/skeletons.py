"""Build a stranger's architecture without memory for it, however large its description says it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lowrank.io.checks import require

SLACK = 1000  # parameters that a constructor may make and throw away


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
