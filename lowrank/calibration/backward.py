"""One backward pass that sees the gradient at the output of every call of some layers."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from lowrank.calibration.collector import Collector
from lowrank.io.checks import require
from lowrank.nn.autograd import without_reentry
from lowrank.nn.batches import Batch

Loss = Callable[[nn.Module, Batch], Tensor]


class _Call(NamedTuple):
    name: str
    place: int  # how many times the layer was called before
    value: Tensor
    output: Tensor


class BackwardPass:
    """Run forward and backward passes and add the gradients of all calls to the sums; `.grad` stays as it is.

    A call that the loss does not depend on, or that runs without autograd, has gradients of zero. A call that gradient
    checkpointing repeats counts once.

    **Arguments**

    - `collector`: its layers are watched.
    """

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self.calls: list[_Call] = []
        self.without: list[str] = []  # layers that were called without autograd
        self.counts: Counter[str] = Counter()  # of all calls of a layer

    def run(self, model: nn.Module, batch: Batch, loss: Loss) -> None:
        """Run both passes on one batch.

        **Arguments**

        - `model`: in evaluation mode.
        - `batch`: on the model's device.
        - `loss`: `(model, batch) -> scalar`.

        **Raises**

        - `ValueError`: a loss that is no scalar, or without a gradient; a model that runs without autograd; NaN or infinity in an
          activation, if the loss fails.
        """
        layers = self.collector.linears.items()
        handles = [layer.register_forward_hook(self._keep(name), with_kwargs=True) for name, layer in layers]
        try:
            with torch.enable_grad(), without_reentry():
                total = self._compute(loss, model, batch)
                if not self._has_gradients(total):
                    return
                self.collector.recomputing = True
                outputs = [call.output for call in self.calls]
                gradients = torch.autograd.grad(total, outputs, allow_unused=True)
            self._add(gradients)
        finally:
            self.collector.recomputing = False
            self.calls, self.without, self.counts = [], [], Counter()
            for handle in handles:
                handle.remove()

    def _compute(self, loss: Loss, model: nn.Module, batch: Batch) -> Any:
        try:
            return loss(model, batch)
        except Exception:
            self.collector.end_batch()  # a loss that fails for NaN: say which layer has it
            raise

    def _keep(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            place = self.counts[name]
            self.counts[name] += 1
            if not torch.is_grad_enabled():
                self._note_without(name)
                return output
            output = output if output.requires_grad else output.requires_grad_()  # all weights may be frozen
            if not self.collector.recomputing:
                self.calls.append(_Call(name, place, args[0] if args else kwargs["input"], output))
            return output.clone()  # the next operation may work in place

        return hook

    def _note_without(self, name: str) -> None:
        """Note a call without autograd; inside a function of autograd its gradients would exist and not be seen."""
        start, frame = inspect.unwrap(BackwardPass.run).__code__, inspect.currentframe()
        while frame is not None and frame.f_code is not start:
            if any(isinstance(value, FunctionCtx) for value in frame.f_locals.values()):
                raise ValueError(
                    f"`model` must run layer {name!r} with autograd for `loss`, got a call inside a torch.autograd.Function, as "
                    "gradient checkpointing of its own makes: switch that off, or collect without `loss`."
                )
            frame = frame.f_back
        self.without.append(name)

    def _has_gradients(self, total: Any) -> bool:
        """Return whether a layer was called with autograd, and raise if none was for want of it."""
        shape = tuple(total.shape) if isinstance(total, Tensor) else None
        scalar = shape is not None and total.numel() == 1
        require(scalar, "loss", "return a scalar tensor", total if shape is None else f"one of shape {shape}")
        if self.without and not self.calls:
            raise ValueError(
                f"`model` must run layers with autograd for `loss`, got none with it and {self.without[0]!r} under "
                "torch.no_grad or torch.inference_mode, set inside the model or the loss: collect without `loss`."
            )
        require(total.requires_grad or not self.calls, "loss", "depend on the model with gradients", total)
        return bool(self.calls)

    def _add(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Add what came back, layer by layer."""
        by_layer: dict[str, tuple[list[int], list[Tensor], list[Tensor]]] = {}
        for call, gradient in zip(self.calls, gradients, strict=True):
            if gradient is not None and gradient.numel():
                places, values, of_layer = by_layer.setdefault(call.name, ([], [], []))
                places.append(call.place)
                values.append(call.value)
                of_layer.append(gradient)
        for name, parts in by_layer.items():
            self.collector.add_gradients(name, *parts)
