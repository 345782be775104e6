"""Hash models, tensors, files and options, so that equal content can be recognized: 16 hex digits, or 32 of tensors."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from xxhash import xxh3_128

from lowrank.io.checks import require


def hash_options(options: Any) -> str:
    """Hash a JSON value; the order of keys does not matter.

    **Raises**

    - `TypeError`: something in `options` is not JSON.
    """
    return hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=8).hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """Hash the names and contents of files; their order matters."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size};".encode())
        with path.open("rb") as content:
            while part := content.read(2**20):  # weights may not fit in memory
                digest.update(part)
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor], digits: int = 32) -> str:
    """Hash the names, dtypes, shapes and bytes of tensors; the order of names does not matter.

    **Arguments**

    - `tensors`: name -> tensor, of any dtype, layout and device.
    - `digits`: 16 to compare with a hash of so many digits, which former versions wrote; else it has 32. Default 32.
    """
    # not BLAKE2b: `compress` hashes the model and all statistics, which took a share of its time that could be measured
    digest = hashlib.blake2b(digest_size=8) if digits == 16 else xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        tensor = (tensor if tensor.layout == torch.strided else tensor.to_dense()).contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_model(model: nn.Module, digits: int = 32) -> str:
    """Hash the parameters and buffers of a model: equal weights give equal hashes.

    **Arguments**

    - `model`: any PyTorch module.
    - `digits`: see `hash_tensors`. Default 32.

    **Raises**

    - `ValueError`: weights that are not in memory.
    """
    state = model.state_dict()
    check_in_memory(state)
    return hash_tensors({name: value for name, value in state.items() if isinstance(value, Tensor)}, digits)


def check_in_memory(tensors: Mapping[str, Any]) -> None:
    """Check that no tensor is on the meta device, where it has a shape and no values.

    **Arguments**

    - `tensors`: name in the model -> tensor, or another value.

    **Raises**

    - `ValueError`: a tensor on the meta device, by its name.
    """
    for name, tensor in tensors.items():
        meta = isinstance(tensor, Tensor) and tensor.is_meta  # a state may hold other values too
        rule = f"have all weights in memory: load {name!r}, which is offloaded or was never loaded"
        require(not meta, "model", rule, "the meta device")
