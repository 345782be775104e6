"""Replace modules of a model: packed projections by their parts, `Conv1D` layers by linear ones, any module by another."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.factorization.precision import with_float64
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.nn.lazy_weight import make_lazy, weight_of
from lowrank.nn.offloaded import check_not_offloaded
from lowrank.nn.targets import find_linears, find_shared_weights, is_conv1d


class PackedLinear(nn.Module):
    """Apply several linear layers to one input and join their outputs: a packed projection (q, k, v) taken apart.

    **Arguments**

    - `parts`: the layers, in the order of their outputs.
    - `names`: one name for each part.
    """

    def __init__(self, parts: Sequence[nn.Linear], names: Sequence[str]) -> None:
        super().__init__()
        for name, part in zip(names, parts, strict=True):
            self.add_module(name, part)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Apply every part to `x`, `(..., in)`, and join the outputs, `(..., out)`."""
        return torch.cat([part(x) for part in self.children()], dim=-1)

    def dense(self) -> Float[Tensor, "out in"]:
        """Return the packed weight, `(out, in)`, float64; every part must be an `nn.Linear`."""
        parts: list[Any] = list(self.children())
        return torch.cat([with_float64(part.weight.detach()).double() for part in parts])

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Return the packed weight, `(out, in)`, for models that read it; each use joins the parts again."""
        parts = [weight_of(part) for part in self.children()]
        shape = (sum(map(len, parts)), parts[0].shape[1])
        return make_lazy(parts[0], shape, lambda: torch.cat([weight_of(part) for part in self.children()]))

    @property
    def bias(self) -> Tensor | None:
        """Return the packed bias, `(out,)`, or None."""
        parts: list[Any] = list(self.children())
        return None if parts[0].bias is None else torch.cat([part.bias for part in parts])


@torch.inference_mode(False)  # the new parameters may be trained
@check_arguments
def split_packed(model: nn.Module, layers: Iterable[str], parts: Sequence[str] = ("q", "k", "v")) -> list[str]:
    """Replace packed projections by their parts, in place; the outputs of the model stay the same.

    timm packs q, k and v into one `qkv` weight, `(3 d, d)`, in this order. As separate layers, each gets a rank of its own.

    **Arguments**

    - `model`: any PyTorch module; it is changed.
    - `layers`: names or patterns of the packed layers.
    - `parts`: names of the parts, each once, in the order of the rows; all have the same number of rows.

    **Returns** the names of the new layers.

    **Raises**

    - `ValueError`: a layer whose outputs do not divide evenly, or whose weight another module shares; offloaded weights; parts
      without names of their own; nothing is changed then.
    """
    named = len(parts) > 0 and len(set(parts)) == len(parts) and all(part.isidentifier() for part in parts)
    require(named, "parts", "be at least one name, each once, of letters, digits and underscores", parts)
    packed = find_linears(model, layers)
    check_not_offloaded(model)
    names = _find_names(model, packed)
    for name, layer in packed.items():
        if layer.out_features % len(parts):
            raise ValueError(
                f"`layers` must pack {len(parts)} equal parts, got {layer.out_features} outputs in {name!r}."
            )
    for name, layer in packed.items():
        biases = [None] * len(parts) if layer.bias is None else layer.bias.detach().chunk(len(parts))
        weights = layer.weight.detach().chunk(len(parts))
        pieces = [as_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        replacement = copy_mode(PackedLinear(pieces, parts), layer)
        for alias in names[name]:
            replace_module(model, alias, replacement)
    return [f"{name}.{part}" for name in packed for part in parts]


@torch.inference_mode(False)
@check_arguments
def unify_linears(model: nn.Module) -> list[str]:
    """Replace every `Conv1D` of transformers (GPT-2) by an `nn.Linear`, in place; the outputs of the model stay the same.

    A `Conv1D` stores its weight transposed, `(in, out)`. The methods of this library expect `(out, in)`.

    **Returns** the names of the replaced layers.

    **Raises**

    - `ValueError`: a layer whose weight another module shares, or which is the model itself; offloaded weights; nothing is
      changed then.
    """
    check_not_offloaded(model)
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if is_conv1d(module)}
    if "" in layers:
        raise ValueError("`model` must hold the layers, got one that is a Conv1D itself: pass nn.Sequential(model).")
    names = _find_names(model, layers)
    for name, layer in layers.items():
        replacement = copy_mode(as_linear(layer.weight.detach().T, layer.bias.detach()), layer)
        for alias in names[name]:
            replace_module(model, alias, replacement)
    return list(layers)


def _find_names(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return all names of each layer, and refuse a weight that another module shares: a new layer would part them."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    found = {name: names[id(layer)] for name, layer in layers.items()}
    for name, aliases in find_shared_weights(model, layers).items():
        rule = f"hold the weight of {name!r} in one module, since a new layer would part them"
        require(len(aliases) == len(found[name]), "model", rule, aliases)
    return found


def copy_mode(module: Any, layer: Any) -> Any:
    """Put a new module in training mode, and freeze its weights and its biases, as the layer that it replaces.

    **Arguments**

    - `module`: the new module; it is changed. Parameters whose names end with 'bias' follow the bias of the layer.
    - `layer`: the layer that it replaces, with `weight` and `bias`.

    **Returns** the new module.
    """
    for name, parameter in module.named_parameters():
        source = layer.bias if name.endswith("bias") else layer.weight
        parameter.requires_grad_(source.requires_grad)
    return module.train(layer.training)


def as_linear(weight: Float[Tensor, "out in"], bias: Tensor | None) -> nn.Linear:
    """Build an `nn.Linear` from copies of a weight and a bias.

    **Arguments**

    - `weight`: `(out, in)`, any dtype and device.
    - `bias`: `(out,)`, or None for a layer without bias.
    """
    out, inputs = weight.shape
    with torch.device("meta"):
        layer = nn.Linear(inputs, out, bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(memory_format=torch.contiguous_format))
    return layer


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule at a dotted name, in place.

    **Arguments**

    - `model`: any PyTorch module; it is changed.
    - `name`: dotted name of the submodule to replace.
    - `module`: the new submodule.

    **Raises**

    - `ValueError`: an empty name, which is the model itself.
    """
    require(name != "", "name", "be that of a submodule", name)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
