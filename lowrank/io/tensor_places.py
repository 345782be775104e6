"""Tell which tensors are one in memory, and which overlap: an address alone may be that of several, or of none."""

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor


def tensor_place(tensor: Tensor) -> Hashable:
    """Return a key that two tensors share only if they are one: same storage, offset, shape, strides and dtype.

    Tensors on the meta device and tensors without elements have places of their own too. A key is valid as long as its tensor
    is in memory.
    """
    if tensor.layout != torch.strided:
        return id(tensor)
    return _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def byte_range(tensor: Tensor) -> tuple[int, int, int]:
    """Return the storage of a tensor and the first and last byte + 1 that it reaches there.

    Of a tensor with gaps, such as columns of a matrix, the gaps count too.
    """
    if tensor.layout != torch.strided:
        return id(tensor), 0, tensor.numel() * tensor.element_size()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    first = int(tensor.storage_offset())
    return _storage(tensor), first * tensor.element_size(), (first + length) * tensor.element_size()


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of tensors; those that several share count once."""
    total, storage, reached = 0, None, 0
    for here, first, last in sorted({byte_range(tensor) for tensor in tensors}):
        if here != storage:
            storage, reached = here, 0
        total += max(0, last - max(first, reached))
        reached = max(reached, last)
    return total


def count_elements(tensors: Iterable[Tensor]) -> int:
    """Count the elements of tensors; a tensor that occurs more than once counts once."""
    return sum(tensor.numel() for tensor in {tensor_place(tensor): tensor for tensor in tensors}.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # the storage itself: on the meta device every address is 0
