"""Run and differentiate a model whatever mode of autograd the caller is in, and however the model saves memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import checkpoint

from lowrank.io.checks import require


def version_of(tensor: Tensor) -> object:
    """Return what changes when a tensor is changed in place. Tensors of inference mode do not count: none is equal to another."""
    return object() if tensor.is_inference() else tensor._version


def check_differentiable(model: nn.Module) -> None:
    """Check that autograd may save the weights of a model.

    **Arguments**

    - `model`: any PyTorch module.

    **Raises**

    - `ValueError`: a parameter or buffer that was made in inference mode, by name.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        rule = f"be built outside torch.inference_mode to have gradients; copy {name!r}"
        require(not tensor.is_inference(), "model", rule, "a tensor of inference mode")


@contextmanager
def without_reentry() -> Iterator[None]:
    """Let `torch.utils.checkpoint` recompute without reentrant autograd inside the block.

    The reentrant way runs the forward pass without a graph, so that no gradient at a layer inside can be asked for. The other
    way saves as much memory and computes the same.
    """
    reentrant = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _Recomputed  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = reentrant


class _Recomputed:
    """Take the place of torch's reentrant function."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
