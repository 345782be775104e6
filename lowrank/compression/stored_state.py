"""What a file holds of a model besides its plain tensors: extra state, and buffers that no state has; and what it cannot hold."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.compression.architecture import LAYER_KINDS
from lowrank.io.hashing import check_in_memory
from lowrank.nn.usv import USV_LAYERS

RECORD = "lowrank_record"  # attribute of a compressed model: the hash of its dense weights, and the table of its layers
EXTRA = "_extra_state"  # the last part of the names that torch gives to what `get_extra_state` returns


def check_state(model: nn.Module) -> dict[str, Any]:
    """Check that a file can hold every tensor of a model, and return its extra state that is no tensor.

    **Returns** name -> JSON value.

    **Raises**

    - `ValueError`: a tensor on the meta device, sparse or quantised; extra state that JSON does not give back.
    """
    state: dict[str, Any] = model.state_dict()
    tensors = {**state, **dict(model.named_buffers())}
    check_in_memory(tensors)
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and (kind := _find_kind(tensor)):
            raise ValueError(f"`model` must have dense tensors in memory, got {name!r}, which is {kind}.")
    extra = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    for name, value in extra.items():
        if not _survives_json(value):
            raise ValueError(
                f"`model` must have extra state of tensors or JSON values, got {type(value).__name__} in {name!r}."
            )
    return extra


def _find_kind(tensor: Tensor) -> str | None:
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout}): register it as a dense buffer, or build it from dense ones"
    return "quantised" if tensor.is_quantized else None


def _survives_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def find_buffers(model: nn.Module, rebuilt: nn.Module | None) -> dict[str, Tensor]:
    """Find the buffers that no state holds, and that the rebuilt model does not have with the same values and dtype.

    **Arguments**

    - `model`: the model to save.
    - `rebuilt`: what its folder builds; None if the folder does not say, and then all of them are taken.

    **Returns** name -> buffer on the CPU.
    """
    own = (*LAYER_KINDS.values(), *USV_LAYERS.values())  # which know how to get theirs back
    others = {} if rebuilt is None else dict(rebuilt.named_buffers())
    state = model.state_dict()
    return {
        name: buffer.detach().cpu().contiguous()
        for name, buffer in model.named_buffers()
        if name not in state
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), own)
        and (rebuilt is None or (name in others and not _is_equal(buffer.cpu(), others[name])))
    }


def _is_equal(one: Tensor, other: Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape and not other.is_meta
    return same and bool(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))


def put_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Set buffers that no state holds.

    **Arguments**

    - `model`: the model that gets them.
    - `buffers`: name -> buffer.

    **Raises**

    - `ValueError`: it has no such buffer.
    """
    known = {name for name, _ in model.named_buffers()}
    for name, buffer in buffers.items():
        if name not in known:
            raise ValueError(f"`architecture` must have the buffer {name!r}, as the compressed model has, got none.")
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, buffer)
