"""Linear layers whose weights are small whole numbers and scales: 8 bits with one scale per row, or 4 bits in groups."""

from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lowrank.factorization.precision import with_float64
from lowrank.io.tensor_places import count_elements
from lowrank.nn.lazy_weight import LazyWeight

LARGEST = {8: 127, 4: 7}  # bits -> the largest code; the smallest is minus that, so that zero is exact
GROUPS = {8: None, 4: 128}  # bits -> weights of a row that share a scale by default; None for the whole row
ZERO = 8  # what 4 bits store for the code 0


class QuantizedLinear(nn.Module):
    """Compute y = (q s) x + b, with a weight of whole numbers q and one scale s for each group of a row.

    Weights are multiplied out in the dtype of the layer in every pass, which is that of its scales and of its bias. Codes and
    scales are buffers: nothing trains them. A cast of the model casts the scales.

    **Arguments**

    - `in_features`, `out_features`: sizes of the weight, `(out, in)`.
    - `bits`: 8, stored as int8, or 4, two in a byte; default 8.
    - `group`: neighbours in a row that share a scale, >= 1; the last group may be smaller. Default: all of the row with 8 bits,
      128 with 4.
    - `bias`: whether the layer has a bias; default True.
    - `dtype`: of scales and bias; default: torch's default dtype.
    """

    kind = "quantized"
    codes: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 8,
        group: int | None = None,
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group = min(group or GROUPS[bits] or in_features, in_features)
        stored = (in_features, torch.int8) if bits == 8 else (ceil(in_features / 2), torch.uint8)
        self.register_buffer("codes", torch.zeros(out_features, stored[0], dtype=stored[1]))
        self.register_buffer("scale", torch.ones(out_features, ceil(in_features / self.group), dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, layer: nn.Linear, bits: int = 8, group: int | None = None) -> "QuantizedLinear":
        """Round the weight of a layer to the nearest codes: no weight w changes by more than s / 2.

        **Arguments**

        - `layer`: with a finite weight; it is not changed. The bias is copied.
        - `bits`, `group`: as above.
        """
        weight, (out, inputs) = layer.weight.detach(), layer.weight.shape
        with torch.device("meta"):
            made = cls(inputs, out, bits, group, layer.bias is not None, weight.dtype)
        groups = made.scale.shape[1]
        exact = functional.pad(with_float64(weight).double(), (0, groups * made.group - inputs))
        exact = exact.view(out, groups, made.group)
        scale = _find_scales(exact.abs().amax(-1), LARGEST[bits], weight.dtype)
        codes = (exact / scale.double()[..., None]).round().to(torch.int8).view(out, -1)[:, :inputs]
        made.codes = (codes if bits == 8 else _pack(codes)).contiguous().to(weight.device)
        made.scale = scale.to(weight.device)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
        return made.train(layer.training)

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Compute the weight q s, `(out, in)`, in the dtype of the scales."""
        codes = self.codes if self.bits == 8 else _unpack(self.codes, self.in_features)
        scale = self.scale
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(self.group, 1)[:, : self.in_features]
        return codes.to(scale.dtype) * scale

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Return the weight q s, `(out, in)`; each use computes it again, see `LazyWeight`."""
        return LazyWeight(self.scale, (self.out_features, self.in_features), self.dequantize)

    def dense(self) -> Float[Tensor, "out in"]:
        """Return the weight q s, `(out, in)`, as a pass uses it, in float64."""
        return with_float64(self.dequantize()).double()

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Compute (q s) x + b for `x`, `(..., in)`."""
        return functional.linear(x, self.dequantize(), self.bias)

    def extra_repr(self) -> str:
        """Return the sizes, for `repr`."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bits={self.bits}, group={self.group}, bias={self.bias is not None}"


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module, shared ones once; a quantised weight counts as many as its dense form has."""
    quantised = [part for part in module.modules() if isinstance(part, QuantizedLinear)]
    return count_elements(module.parameters()) + sum(part.out_features * part.in_features for part in quantised)


def _find_scales(largest: Tensor, code: int, dtype: torch.dtype) -> Tensor:
    """Return scales, rounded up to a dtype, so that the largest weights have the largest code; 1 for groups of zeros."""
    scale = (largest / code).to(dtype)
    above = torch.nextafter(scale.cpu(), torch.full_like(scale, torch.inf, device="cpu")).to(scale.device)
    scale = torch.where(scale.double() * code < largest, above, scale)
    return torch.where(largest == 0, torch.ones_like(scale), scale)


def _pack(codes: Tensor) -> Tensor:
    """Store two codes in a byte, the first of them in its lower half."""
    halves = functional.pad(codes, (0, codes.shape[1] % 2)).add(ZERO).to(torch.uint8).view(len(codes), -1, 2)
    return halves[..., 0] | halves[..., 1] << 4


def _unpack(packed: Tensor, inputs: int) -> Tensor:
    """Return the codes, `(out, inputs)`, int8."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return halves[:, :inputs].to(torch.int8) - ZERO
