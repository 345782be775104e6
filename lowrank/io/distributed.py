"""Count the processes of a distributed run and send values between them. A plain run counts as one process."""

from typing import Any

import torch


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process_count() -> int:
    """Return the number of processes, 1 in a plain run."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def process_index() -> int:
    """Return the index of this process, from 0 to `process_count() - 1`."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def broadcast(value: Any, owner: int) -> Any:
    """Return the value of one process in all processes, which must all call this.

    **Arguments**

    - `value`: any object that pickle can store. Only the value of the owner counts.
    - `owner`: index of the process that sends its value.
    """
    if process_count() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=owner)
    return values[0]


def gather(value: Any) -> list[Any]:
    """Return the value of every process, in the order of their indices. All processes must call this.

    **Arguments**

    - `value`: any object that pickle can store.
    """
    values = [value] * process_count()
    if process_count() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def sum_in_place(tensor: torch.Tensor) -> None:
    """Add the tensors of all processes into each of them. All processes must call this."""
    if process_count() > 1:
        torch.distributed.all_reduce(tensor)
