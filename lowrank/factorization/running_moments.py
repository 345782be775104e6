"""Add up the moments of one layer over blocks of tokens, and finish them to `LayerStatistics`.

Blocks of tokens are multiplied in float32 about their mean and added into float64, which keeps the second moment about the mean
to about 1e-7 of its largest eigenvalue: enough to compress with. The error of a nearly low-rank layer is decided below that;
multiply in float64 (`products`) to predict it, at about twice the cost.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank.factorization.block_sums import MOVES, Shift, subtract_mean, sum_rows
from lowrank.factorization.moments import MOMENTS, LayerStatistics
from lowrank.factorization.precision import with_float64

BLOCK_TOKENS = 4096  # tokens per product: bounds its memory, and in float32 its rounding
SLAB = 1024  # rows of a product that are widened to float64 at a time
Block = tuple[Tensor, Tensor, Shift]  # vectors, the same about their mean, and what that leaves out
OF_ROWS = ("gram", "mean", "abs_mean")  # the fields that inputs alone give, on their own side


class RunningMoments:
    """Add up some moments of vectors, block by block, in float64.

    **Arguments**

    - `fields`: names of fields of `LayerStatistics`, all of the same vectors.
    - `size`: int, length of a vector.
    - `device`: device of the sums; a block is multiplied on its own device, or on the CPU if that has no float64.
    - `products`: least dtype in which a block is multiplied, float32 or float64.
    - `stream`: int, sets the random signs apart from those of other processes. Default 0.
    """

    def __init__(
        self, fields: Iterable[str], size: int, device: torch.device, products: torch.dtype, stream: int = 0
    ) -> None:
        self.device, self.products, self.stream, self.tokens = device, products, stream, 0
        self.declared = {name: MOMENTS[name] for name in fields}
        self.generator = torch.Generator()
        nothing = torch.zeros(0, size, dtype=torch.float64, device=device)
        self.sums = {name: self._sum(name, nothing) for name in self.declared}

    def add(self, rows: Float[Tensor, "tokens n"]) -> None:
        """Add vectors to the sums over tokens."""
        self.add_blocks(cut_blocks(rows, self.products))

    def add_blocks(self, blocks: Iterable[Block]) -> None:
        """Add vectors to the sums over tokens.

        **Arguments**

        - `blocks`: the vectors as `cut_blocks` gives them, which may serve other sums too.
        """
        for block, offsets, shift in blocks:
            if self.tokens == 0:
                self.generator.manual_seed(_seed(block, self.stream))
            for name, rules in self.declared.items():
                if (over_tokens := rules["over_tokens"]) is None:
                    continue
                move = MOVES.get(over_tokens)
                part = self._sum(name, block if move is None else offsets)
                _accumulate(self.sums[name], part)
                if move is not None:
                    move(self.sums[name], part, shift)
            self.tokens += len(block)

    def _sum(self, name: str, block: Tensor) -> Tensor:
        rules = self.declared[name]
        compute: Callable[..., Tensor] = rules["over_tokens"] or sum_rows
        return compute(block, self.generator) if rules["random"] else compute(block)

    def add_samples(self, inputs: Float[Tensor, "samples tokens n"], rows: Float[Tensor, "samples tokens m"]) -> None:
        """Add whole samples to the sums over samples.

        **Arguments**

        - `inputs`: inputs of the layer, `(samples, tokens, in)`.
        - `rows`: gradients at its output, `(samples, tokens, out)`.
        """
        wide, inputs, rows = torch.promote_types(rows.dtype, self.products), with_float64(inputs), with_float64(rows)
        for name, rules in self.declared.items():
            if rules["over_samples"] is not None:
                _accumulate(self.sums[name], rules["over_samples"](inputs.to(wide), rows.to(wide)))

    def copy(self) -> "RunningMoments":
        """Return sums of the same vectors that can go on apart."""
        return deepcopy(self, {id(rules): rules for rules in self.declared.values()})  # rules never change

    def all_finite(self) -> bool:
        """Return whether all sums are finite so far; of a matrix the diagonal tells."""
        lines = (total.diagonal() if name.endswith("gram") else total for name, total in self.sums.items())
        return bool(torch.stack([line.isfinite().all() for line in lines]).all())

    def finish(self) -> dict[str, Tensor]:
        """Return field name -> moment: matrices made symmetric, means divided by the number of tokens."""
        moments = {}
        for name, total in self.sums.items():
            moments[name] = (total + total.T).div_(2) if name.endswith("gram") else total
            if self.declared[name]["merge"] == "mean":
                moments[name] = moments[name] / self.tokens
        return moments


def cut_blocks(rows: Float[Tensor, "tokens n"], products: torch.dtype) -> list[Block]:
    """Cut vectors into blocks that are multiplied at once, each beside itself about its mean.

    **Arguments**

    - `rows`: `(tokens, n)`, any floating dtype.
    - `products`: least dtype of a block, float32 or float64.
    """
    blocks = with_float64(rows.detach()).split(BLOCK_TOKENS) if len(rows) else ()
    wide = (block.to(torch.promote_types(block.dtype, products)) for block in blocks)
    return [(block, *subtract_mean(block)) for block in wide]


def _seed(block: Tensor, stream: int) -> int:
    """Return a seed that other data do not share: sketches that are added must have independent signs."""
    return (int(block.double().sum().view(torch.int64)) + stream) % 2**63


def _accumulate(total: Tensor, part: Tensor) -> None:
    """Add in slabs, so that no second float64 matrix is in memory."""
    if total.dim() == 0:
        total += part.to(total.device)
        return
    for into, slab in zip(total.split(SLAB), part.to(total.device).split(SLAB), strict=True):
        into += slab


def statistics_of_rows(rows: Float[Tensor, "tokens n"]) -> LayerStatistics:
    """Return the statistics of input vectors `(tokens, n)`, multiplied in float64."""
    moments = RunningMoments(OF_ROWS, rows.shape[-1], rows.device, torch.float64)
    moments.add(rows)
    return LayerStatistics(tokens=moments.tokens, **moments.finish())  # pyright: ignore[reportArgumentType]
