"""Linear layers whose weight is a fixed matrix and a trained one in whitened coordinates, W = W0 + D S^-1."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.factorization.moments import LayerStatistics, second_moment_eigh
from lowrank.nn.surgery import replace_module


class WhitenedLinear(nn.Module):
    """A linear layer whose weight is W0 + D S^-1, with D, `delta`, `(out, in)`, in at least float32 and zero at first.

    `linear` is the layer itself, which `fold` gives back with its weight renewed. `factor`, `inverse`: S and S^-1.
    """

    inverse: Tensor
    start: Tensor

    def __init__(self, linear: nn.Linear, factor: Float[Tensor, "n n"], inverse: Float[Tensor, "n n"]) -> None:
        super().__init__()
        weight = linear.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.linear = linear
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=wide))
        self.register_buffer("inverse", inverse.to(weight.device, wide), persistent=False)
        self.register_buffer("start", (weight.double() @ factor.to(weight.device)).to(wide), persistent=False)

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """W, multiplied anew at each access."""
        own = self.linear.weight
        return torch.addmm(own.to(self.delta.dtype), self.delta, self.inverse).to(own.dtype)

    def whitened(self) -> Float[Tensor, "out in"]:
        """W S."""
        return self.start + self.delta

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return nn.functional.linear(x, self.weight, self.linear.bias)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The layer itself with W as its weight; untouched, bit for bit, where D is zero."""
        if bool(self.delta.any()):
            own = self.linear.weight
            own.copy_(own.double() + self.delta.double() @ self.inverse.double())
        return self.linear


@contextmanager
def whitened_weights(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    statistics: Mapping[str, LayerStatistics],
    shrinkage: float | int,
    others: bool,
) -> Iterator[dict[str, WhitenedLinear]]:
    """The layers as `WhitenedLinear` inside, with D trained, and all else where `others`; folded and flagged as before after."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    factors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by the moments, which layers with one input share
    wrapped: dict[str, WhitenedLinear] = {}
    try:
        for parameter, flag in flags:
            parameter.requires_grad_(flag and others)
        for name, layer in layers.items():
            found = statistics[name]
            if id(found.gram) not in factors:
                values, vectors = second_moment_eigh(found, shrinkage)
                roots = (values / values.mean()).sqrt()  # D in units of the weight, whatever the scale of the inputs
                factors[id(found.gram)] = found.gram, vectors * roots, (vectors / roots).T.to(layer.weight)
            _, factor, inverse = factors[id(found.gram)]
            layer.weight.requires_grad_(False)
            wrapped[name] = WhitenedLinear(layer, factor, inverse)
            replace_module(model, name, wrapped[name])
        yield wrapped
    finally:
        for name, module in wrapped.items():
            replace_module(model, name, module.fold())
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
