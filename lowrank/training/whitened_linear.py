"""Linear layers whose weight is a fixed matrix plus a trained one in whitened coordinates, W = W0 + D S^-1."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.factorization.moments import LayerStatistics, read_gram, second_moment_eigh
from lowrank.factorization.precision import with_float64
from lowrank.nn.lazy_weight import make_lazy
from lowrank.nn.surgery import replace_module


class WhitenedLinear(nn.Module):
    """Compute a linear layer with weight W0 + D S^-1 and train D.

    D is the parameter `delta`, `(out, in)`, zero at the start, in at least float32.

    **Arguments**

    - `linear`: the layer to replace. `fold` returns it.
    - `factor`: S, `(in, in)`.
    - `inverse`: S^-1, `(in, in)`.
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
        start = with_float64(weight).double()
        self.register_buffer("start", (start @ factor.to(start)).to(weight.device, wide), persistent=False)

    @property
    def in_features(self) -> int:
        """Return the number of inputs."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """Return the number of outputs."""
        return self.linear.out_features

    @property
    def bias(self) -> Tensor | None:
        """Return the bias, `(out,)`, or None."""
        return self.linear.bias

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Return W, `(out, in)`, in the dtype of the layer; each use computes it again, see `LazyWeight`."""
        fixed = self.linear.weight
        return make_lazy(fixed, tuple(fixed.shape), self._compute_weight)

    def _compute_weight(self) -> Tensor:
        fixed = self.linear.weight
        return torch.addmm(fixed.to(self.delta.dtype), self.delta, self.inverse).to(fixed.dtype)

    def whitened_weight(self) -> Float[Tensor, "out in"]:
        """Compute W S."""
        return self.start + self.delta

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Compute x W^T + b."""
        return nn.functional.linear(x, self._compute_weight(), self.linear.bias)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """Write W into the original layer and return it; with D = 0 it stays the same bit for bit."""
        if bool(self.delta.any()):
            weight, delta, inverse = (
                with_float64(part).double() for part in (self.linear.weight, self.delta, self.inverse)
            )
            self.linear.weight.copy_(weight + delta @ inverse)
        return self.linear


@contextmanager
def whiten_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    statistics: Mapping[str, LayerStatistics],
    shrinkage: float | int,
    others: bool,
) -> Iterator[dict[str, WhitenedLinear]]:
    """Replace layers by `WhitenedLinear` while the block runs, and let only D require gradients.

    On exit, D is folded into the weights and every `requires_grad` flag is restored.

    **Arguments**

    - `model`: changed in place.
    - `layers`: name -> layer of the model to replace.
    - `statistics`: name -> second moments of the inputs, for every layer to replace. Inputs that are all zero leave S = I.
    - `shrinkage`: > 0, added to the eigenvalues of the moments, relative to their mean; bounds S^-1.
    - `others`: let all other parameters that are not frozen require gradients too.

    **Returns** name -> the layer that replaces it.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    factors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by the moments, which layers with one input share
    whitened: dict[str, WhitenedLinear] = {}
    try:
        for parameter, flag in flags:
            parameter.requires_grad_(flag and others)
        for name, layer in layers.items():
            moments = statistics[name]
            gram = read_gram(moments)
            if id(moments.gram) not in factors:
                values, vectors = second_moment_eigh(moments, shrinkage)
                mean = values.mean()  # D in units of the weight, whatever the scale of the inputs, if there are any
                roots = (values / mean).sqrt() if mean > 0 else torch.ones_like(values)
                factors[id(moments.gram)] = gram, vectors * roots, (vectors / roots).T.to(layer.weight)
            _, factor, inverse = factors[id(moments.gram)]
            layer.weight.requires_grad_(False)
            whitened[name] = WhitenedLinear(layer, factor, inverse)
            replace_module(model, name, whitened[name])
        yield whitened
    finally:
        for name, module in whitened.items():
            replace_module(model, name, module.fold())
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
