"""Add up the moments of one layer over blocks of tokens, and finish them to `LayerStatistics`.

Blocks of tokens are multiplied in float32 and added into float64, which keeps G to about 1e-7 of its largest eigenvalue:
enough to compress with. The error of a nearly low-rank layer is decided below that; multiply in float64 (`products`) to predict
it, at about twice the cost.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank.factorization.block_sums import sum_rows
from lowrank.factorization.moments import MOMENTS, LayerStatistics

BLOCK_TOKENS = 4096  # tokens per product: bounds its memory, and in float32 its rounding
SLAB = 1024  # rows of a product that are widened to float64 at a time


class RunningMoments:
    """Add up the moments of vectors, block by block, in float64.

    **Arguments**

    - `size`: int, length of a vector.
    - `device`: device of the sums; a block is multiplied on its own device.
    - `products`: least dtype in which a block is multiplied, float32 or float64.
    - `shared`: True to sum the fields of the input, False those of the gradients at the output. Default True.
    """

    def __init__(self, size: int, device: torch.device, products: torch.dtype, shared: bool = True) -> None:
        self.device, self.products, self.tokens = device, products, 0
        self.declared = {name: rules for name, rules in MOMENTS.items() if rules["shared"] == shared}
        nothing = torch.zeros(0, size, dtype=torch.float64, device=device)
        self.sums = {name: (rules["over_tokens"] or sum_rows)(nothing) for name, rules in self.declared.items()}

    def add(self, rows: Float[Tensor, "tokens n"]) -> None:
        """Add vectors to the sums over tokens."""
        for block in rows.detach().split(BLOCK_TOKENS):
            block = block.to(torch.promote_types(block.dtype, self.products))
            for name, rules in self.declared.items():
                if rules["over_tokens"] is not None:
                    _accumulate(self.sums[name], rules["over_tokens"](block))
        self.tokens += len(rows)

    def add_samples(self, inputs: Float[Tensor, "samples tokens n"], rows: Float[Tensor, "samples tokens m"]) -> None:
        """Add whole samples to the sums over samples.

        **Arguments**

        - `inputs`: inputs of the layer, `(samples, tokens, in)`.
        - `rows`: gradients at its output, `(samples, tokens, out)`.
        """
        wide = torch.promote_types(rows.dtype, self.products)
        for name, rules in self.declared.items():
            if rules["over_samples"] is not None:
                _accumulate(self.sums[name], rules["over_samples"](inputs.to(wide), rows.to(wide)))

    def all_finite(self) -> bool:
        """Return whether all sums are finite so far; of a matrix the diagonal tells."""
        lines = (total.diagonal() if total.dim() == 2 else total for total in self.sums.values())
        return bool(torch.stack([line.isfinite().all() for line in lines]).all())

    def finish(self) -> dict[str, Tensor]:
        """Return field name -> moment: matrices made symmetric, means divided by the number of tokens."""
        moments = {}
        for name, total in self.sums.items():
            moments[name] = (total + total.T).div_(2) if total.dim() == 2 else total
            if self.declared[name]["merge"] == "mean":
                moments[name] = moments[name] / self.tokens
        return moments


def _accumulate(total: Tensor, part: Tensor) -> None:
    """Add in slabs, so that no second float64 matrix is in memory."""
    for into, slab in zip(total.split(SLAB), part.to(total.device).split(SLAB), strict=True):
        into += slab


def statistics_of_rows(rows: Float[Tensor, "tokens n"]) -> LayerStatistics:
    """Return the statistics of input vectors `(tokens, n)`, multiplied in float64."""
    moments = RunningMoments(rows.shape[-1], rows.device, torch.float64)
    moments.add(rows)
    return LayerStatistics(tokens=moments.tokens, **moments.finish())
