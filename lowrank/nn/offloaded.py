"""Models whose weights accelerate keeps elsewhere: on the CPU or on disk, and on the meta device until a layer is called."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.io.checks import require
from lowrank.io.hashing import check_in_memory


def execution_device(model: nn.Module) -> torch.device:
    """Return the device on which the first offloaded module of a model runs, the meta device if none is offloaded."""
    for module in model.modules():
        if (hook := _offload_hook(module)) is not None:
            return torch.device("cpu" if hook.execution_device is None else hook.execution_device)
    return torch.device("meta")


def _offload_hook(module: nn.Module) -> Any:
    """Return what accelerate brings the weights of a module with when it is called, None if they are there."""
    hook = getattr(module, "_hf_hook", None)
    return next((part for part in (hook, *getattr(hook, "hooks", ())) if getattr(part, "offload", False)), None)


def check_weights(model: nn.Module) -> None:
    """Check that the weights of a model are there when it runs.

    **Arguments**

    - `model`: any PyTorch module.

    **Raises**

    - `ValueError`: a tensor on the meta device that accelerate does not bring.
    """
    brought = {id(tensor) for part in model.modules() if _offload_hook(part) for tensor in _tensors(part).values()}
    check_in_memory({name: tensor for name, tensor in _tensors(model).items() if id(tensor) not in brought})


def check_not_offloaded(model: nn.Module) -> None:
    """Check that accelerate offloads no module: one that takes its place would have no weights to compute with.

    **Arguments**

    - `model`: any PyTorch module; weights that were never loaded are allowed, as in an architecture to load into.

    **Raises**

    - `ValueError`: an offloaded module, by name.
    """
    for name, module in model.named_modules():
        rule = f"have all weights in memory: module {name!r} must not be offloaded"
        require(_offload_hook(module) is None, "model", rule, "an offload hook of accelerate")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@contextmanager
def weights_of(layer: nn.Module) -> Iterator[nn.Module]:
    """Hold the weights of one layer in memory inside the block.

    **Arguments**

    - `layer`: any module without submodules; it is yielded.

    **Raises**

    - `ValueError`: weights on the meta device that accelerate does not bring.
    """
    if not any(parameter.is_meta for parameter in layer.parameters()):
        yield layer
        return
    from accelerate.utils import align_module_device  # noqa: PLC0415

    with align_module_device(layer):
        check_in_memory(dict(layer.named_parameters()))
        yield layer
