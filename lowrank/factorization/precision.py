"""Compute in float64 wherever tensors are: on the CPU for those of a device that has no float64, as Apple's have none."""

import functools

import torch
from torch import Tensor


@functools.cache
def float64_device(device: torch.device) -> torch.device:
    """Return a device if it computes in float64, else the CPU.

    **Arguments**

    - `device`: any device; it is asked once.
    """
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError, NotImplementedError):
        return torch.device("cpu")
    return device


def with_float64(tensor: Tensor) -> Tensor:
    """Return a tensor, or its copy on the CPU if its device has no float64; the dtype stays.

    **Arguments**

    - `tensor`: of any device.
    """
    return tensor.to(float64_device(tensor.device))
