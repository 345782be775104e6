"""Hashes that say what something is: the weights of a model, the content of tensors, a set of options."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def hash_options(options: Any) -> str:
    """16 hex digits of a JSON value; the order of keys does not matter.

    **Raises:** `TypeError`: something in it is not JSON.
    """
    return hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=8).hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """16 hex digits of the names and contents of files, in the order given."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size};".encode())
        with path.open("rb") as content:
            while part := content.read(2**20):  # weights may not fit in memory
                digest.update(part)
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_model(model: nn.Module) -> str:
    """16 hex digits of a model's parameters and buffers: the same weights, the same hash."""
    return hash_tensors(model.state_dict())
