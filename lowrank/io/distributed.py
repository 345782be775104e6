"""The processes of a distributed training, as plain numbers and values: one where there are no others."""

from typing import Any

import torch


def processes() -> tuple[int, int]:
    """How many there are, and which one this is."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1, 0
    return distributed.get_world_size(), distributed.get_rank()


def agreed(value: Any, owner: int) -> Any:
    """The owner's value, in every process."""
    if processes()[0] == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=owner)
    return held[0]
