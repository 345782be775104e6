"""nn.surgery"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.nn.targets import find_linears, is_conv1d


class PackedLinear(nn.Module):
    """A packed projection (fused q, k, v) as separate linear layers with one input, whose outputs are joined again."""

    def __init__(self, parts: Sequence[nn.Linear], names: Sequence[str]) -> None:
        super().__init__()
        for name, part in zip(names, parts, strict=True):
            self.add_module(name, part)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return torch.cat([part(x) for part in self.children()], dim=-1)

    def dense(self) -> Float[Tensor, "out in"]:
        """The packed weight in float64; every part must be an `nn.Linear`."""
        parts: list[Any] = list(self.children())
        return torch.cat([part.weight.detach().double() for part in parts])

    @property
    def bias(self) -> Tensor | None:
        parts: list[Any] = list(self.children())
        return None if parts[0].bias is None else torch.cat([part.bias for part in parts])


def split_packed(model: nn.Module, layers: Iterable[str], parts: Sequence[str] = ("q", "k", "v")) -> list[str]:
    """Replaces packed projections by their parts, in place; the outputs stay the same.

    timm packs q, k and v into one `qkv` weight, `(3 d, d)`, in this order. Apart, each has a rank of its own.

    **Arguments:** `layers`: names or patterns of the packed layers. `parts`: their names, in the order of the rows, all of
    one size.

    **Returns:** the names of the new layers.

    **Raises:** `ValueError`: a layer whose outputs do not divide evenly.
    """
    packed = find_linears(model, layers)
    for name, layer in packed.items():
        if layer.out_features % len(parts):
            raise ValueError(
                f"`layers` must pack {len(parts)} equal parts, got {layer.out_features} outputs in {name!r}."
            )
    for name, layer in packed.items():
        biases = [None] * len(parts) if layer.bias is None else layer.bias.detach().chunk(len(parts))
        weights = layer.weight.detach().chunk(len(parts))
        made = [as_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        replace_module(model, name, _like(PackedLinear(made, parts), layer))
    return [f"{name}.{part}" for name in packed for part in parts]


def unify_linears(model: nn.Module) -> list[str]:
    """Replaces every `Conv1D` of transformers (GPT-2), which stores W transposed, by an `nn.Linear`, in place.

    **Returns:** the names of the replaced layers.
    """
    found = [name for name, module in model.named_modules() if is_conv1d(module)]
    for name in found:
        layer: Any = model.get_submodule(name)
        replace_module(model, name, _like(as_linear(layer.weight.detach().T, layer.bias.detach()), layer))
    return found


def _like(made: nn.Module, layer: nn.Module) -> nn.Module:
    """The new layer, trained or frozen, in training or evaluation mode as the one that it replaces."""
    return made.requires_grad_(next(layer.parameters()).requires_grad).train(layer.training)


def as_linear(weight: Float[Tensor, "out in"], bias: Tensor | None) -> nn.Linear:
    """An `nn.Linear` with copies of a weight and a bias."""
    out, inputs = weight.shape
    with torch.device("meta"):
        layer = nn.Linear(inputs, out, bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(memory_format=torch.contiguous_format))
    return layer


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one at a dotted name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
