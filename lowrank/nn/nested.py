"""A linear layer that holds its factors at full rank, with all that is needed to cut it to any smaller rank later."""

from typing import Any

import torch
from torch import Tensor

from lowrank.factorization.factorize import Factors
from lowrank.factorization.precision import with_float64
from lowrank.nn.low_rank import FACTORED_LAYERS, LowRankLinear
from lowrank.nn.surgery import as_linear, copy_mode


class NestedLinear(LowRankLinear):
    """Compute y = B (A x) + b at full rank; the first r columns of B and rows of A are the best factors of rank r.

    `spectrum`, `(rank,)`, are the singular values that tell what a rank loses. `mean`, `(in,)`, is the mean input that the bias
    makes up for when the layer is cut, zeros if inputs are not centred. Both are float64, stored as whole numbers of the same
    bits: a cast of the model leaves them alone, and devices without float64 hold them.

    **Arguments**

    - `in_features`, `out_features`: sizes of the weight, `(out, in)`.
    - `rank`: min(in, out).
    - `bias`: whether the layer has a bias; default True.
    - `dtype`: of the parameters; default: torch's default dtype.
    """

    storage = "nested"
    spectrum_bits: Tensor
    mean_bits: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, dtype)
        self.register_buffer("spectrum_bits", torch.zeros(rank, dtype=torch.int64))
        self.register_buffer("mean_bits", torch.zeros(in_features, dtype=torch.int64))

    @classmethod
    def from_factors(
        cls, factors: Factors, bias: Tensor | None, dtype: torch.dtype, bias_dtype: torch.dtype | None = None
    ) -> "NestedLinear":
        """Build the layer from factors at full rank, with their spectrum and a mean of zeros.

        **Arguments**

        - `factors`: at full rank, with all singular values; they are not changed.
        - `bias`: `(out,)`, or None for a layer without bias.
        - `dtype`: of the parameters.
        - `bias_dtype`: of the bias, if it is another one.
        """
        layer: Any = super().from_factors(factors, bias, dtype, bias_dtype)
        layer.spectrum_bits = _as_bits(factors.spectrum).to(layer.left.weight.device)
        layer.mean_bits.zero_()
        return layer

    @property
    def spectrum(self) -> Tensor:
        """Return the singular values, `(rank,)`, float64, descending, on the CPU."""
        return self.spectrum_bits.cpu().view(torch.float64)

    def set_mean(self, mean: Tensor) -> None:
        """Set the mean input, `(in,)`, that the bias makes up for when the layer is cut."""
        self.mean_bits = _as_bits(mean).to(self.mean_bits.device)

    @torch.no_grad()
    def cut(self, rank: int, storage: str) -> Any:
        """Build the layer of a smaller rank; its bias restores the mean output.

        **Arguments**

        - `rank`: int in [1, `self.rank`].
        - `storage`: 'factors' or 'pivoted', or 'dense' for an `nn.Linear` with the whole weight.
        """
        dtype, device = self.left.weight.dtype, self.left.weight.device
        if storage == "dense":
            return copy_mode(as_linear(self.dense().to(dtype).to(device), self.bias), self.left)
        left, right = (with_float64(part.weight).double() for part in (self.left, self.right))
        factors = Factors(left, right, self.spectrum).truncate(rank)
        bias = None if self.bias is None else self.bias.to(left.device)
        layer = FACTORED_LAYERS[storage].from_factors(factors, bias, dtype)
        if bias is not None:
            mean = self.mean_bits.cpu().view(torch.float64).to(left.device)[:, None]
            layer.set_bias(bias.double() + (self.multiply(mean) - layer.multiply(mean))[:, 0])
        return copy_mode(layer.to(device), self.left)


def _as_bits(values: Tensor) -> Tensor:
    """Return the bits of float64 values as whole numbers, on the CPU."""
    return values.detach().cpu().double().contiguous().clone().view(torch.int64)
