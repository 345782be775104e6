"""Linear layers stored in other ways than as one matrix: two factors, pivot rows, parts of a packed projection."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lowrank.factorization.methods import Factors

LARGEST = 1.25  # |C| of a pivoted layer is at most this


class LowRankLinear(nn.Module):
    """y = B (A x) + b in the place of y = W x + b.

    `right`: `nn.Linear(in, rank)` holding A; `left`: `nn.Linear(rank, out)` holding B and the bias: two ordinary layers, so
    that everything which works on linear layers (peft, quantisers, compilers) works on them.
    """

    storage = "factors"

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Linear(in_features, rank, bias=False, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, dtype=dtype)

    @classmethod
    @torch.no_grad()
    def from_factors(cls, factors: Factors, bias: Tensor | None, dtype: torch.dtype) -> "LowRankLinear":
        """The layer of given factors, scaled so that each of the `rank` terms has the same norm on both sides."""
        left, right = factors.left.double(), factors.right.double()
        scale = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
        scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
        layer = _blank(cls, left, right, bias, dtype)
        layer.left.weight.copy_(left * scale)
        layer.right.weight.copy_(right / scale[:, None])
        layer.set_bias(bias)
        return layer

    @property
    def bias(self) -> Tensor | None:
        return self.left.bias

    @torch.no_grad()
    def set_bias(self, bias: Tensor | None) -> None:
        """Another bias in the place of the one there is."""
        if bias is not None:
            self.left.bias.copy_(bias)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """B A, multiplied anew at each access."""
        return self.left.weight @ self.right.weight

    def dense(self) -> Float[Tensor, "out in"]:
        """B A in float64."""
        return self.left.weight.detach().double() @ self.right.weight.detach().double()

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return self.left(self.right(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotedLinear(nn.Module):
    """y_P = W_P x and y_~P = C y_P: the same rank-r weight in r (out + in) - r^2 parameters and r indices.

    r independent rows P of W' = B A determine the others: W'[~P] = C W'[P] with C = B[~P] B[P]^-1. `right`:
    `nn.Linear(in, rank)` holding W'[P] and b_P; `left`: `nn.Linear(rank, out - rank)` holding C and b_~P - C b_P; `pivots`: P,
    `(rank,)`, int64.

    **Reference:** Zhao et al., PIFA, arXiv:2501.19090, section 3. The rows are chosen here so that |C| <= 1.25.
    """

    storage = "pivoted"
    pivots: Tensor
    others: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Linear(in_features, rank, bias=bias, dtype=dtype)
        self.left = nn.Linear(rank, out_features - rank, bias=bias, dtype=dtype)
        self.register_buffer("pivots", torch.arange(rank))
        self.register_buffer("others", torch.arange(rank, out_features), persistent=False)
        self.register_load_state_dict_post_hook(_find_others)

    @classmethod
    @torch.no_grad()
    def from_factors(cls, factors: Factors, bias: Tensor | None, dtype: torch.dtype) -> "PivotedLinear":
        """The layer of given factors.

        **Raises:** `ValueError`: a rank that is not below the number of outputs; the weight itself is as small then.
        """
        left, right = factors.left.double(), factors.right.double()
        if factors.rank >= len(left):
            raise ValueError(f"`factors` must have a rank below the {len(left)} outputs, got {factors.rank}.")
        pivots, coefficients = _pivot_rows(left)
        layer = _blank(cls, left, right, bias, dtype)
        layer.right.weight.copy_(left[pivots] @ right)
        layer.left.weight.copy_(coefficients)
        layer.pivots.copy_(pivots)
        layer.find_others()
        layer.set_bias(bias)
        return layer

    @property
    def bias(self) -> Tensor | None:
        """b, from where it is stored."""
        rows = self.right.bias
        return None if rows is None else self._joined(rows, self.left(rows))

    @torch.no_grad()
    def set_bias(self, bias: Tensor | None) -> None:
        """Another bias in the place of the one there is."""
        if bias is not None:
            self.right.bias.copy_(bias[self.pivots])
            rows = self.left.weight.double() @ self.right.bias.double()
            self.left.bias.copy_(bias[self.others].double() - rows)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """W', multiplied anew at each access."""
        rows = self.right.weight
        return self._joined(rows.T, (self.left.weight @ rows).T).T

    def dense(self) -> Float[Tensor, "out in"]:
        """W' in float64."""
        rows = self.right.weight.detach().double()
        return self._joined(rows.T, (self.left.weight.detach().double() @ rows).T).T

    def find_others(self) -> None:
        """`others`, the rows that are not pivots, ascending, from `pivots`."""
        chosen = torch.zeros(self.out_features, dtype=torch.bool, device=self.pivots.device)
        chosen[self.pivots] = True
        self.others = (~chosen).nonzero().squeeze(1)

    def _joined(self, pivots: Tensor, others: Tensor) -> Tensor:
        """Both parts of the outputs in their places; one new tensor, which costs less than joining and permuting."""
        y = pivots.new_empty(*pivots.shape[:-1], self.out_features)
        return y.index_copy_(-1, self.pivots, pivots).index_copy_(-1, self.others, others)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        rows = self.right(x)
        return self._joined(rows, self.left(rows))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _find_others(module: Any, _: object) -> None:
    module.find_others()


def _blank(cls: type[Any], left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Any:
    """An uninitialised layer for factors of given shapes, on their device."""
    sizes = (right.shape[1], left.shape[0], right.shape[0])
    with torch.device("meta"):
        layer = cls(*sizes, bias=bias is not None, dtype=dtype)
    return layer.to_empty(device=left.device)


def _pivot_rows(left: Float[Tensor, "out rank"]) -> tuple[Int[Tensor, " rank"], Float[Tensor, "rest rank"]]:
    """Rows P that determine the others, and C with left[~P] = C left[P], |C| <= `LARGEST`; ~P in ascending order.

    LU with partial pivoting finds independent rows; then a row that C weighs too heavily takes the place of the pivot it
    leans on, which multiplies the volume of the pivot rows by |C| > 1 each time and so comes to an end (maxvol).
    """
    basis = torch.linalg.qr(left).Q  # the same column space, well conditioned
    rank = basis.shape[1]
    lower, permutation = _lu(basis)
    coefficients = torch.linalg.solve_triangular(
        lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True
    )
    pivots, others = permutation[:rank].clone(), permutation[rank:].clone()
    while coefficients.numel():
        row, column = divmod(int(coefficients.abs().argmax()), rank)
        pivot = coefficients[row, column].clone()
        if pivot.abs() <= LARGEST:
            break
        new_row, old_column = coefficients[row] / pivot, coefficients[:, column].clone()
        coefficients -= torch.outer(old_column, new_row)
        coefficients[:, column] = old_column / pivot
        coefficients[row] = -new_row
        coefficients[row, column] = 1 / pivot
        pivots[column], others[row] = others[row].clone(), pivots[column].clone()
    others = others.sort().values
    return pivots, torch.linalg.solve(basis[pivots].T, basis[others].T).T


def _lu(basis: Tensor) -> tuple[Tensor, Tensor]:
    """The unit lower triangular factor, `(out, rank)`, and the order of the rows in it."""
    packed, swaps = torch.linalg.lu_factor(basis)
    permutation = torch.arange(len(basis), device=basis.device)
    for row, other in enumerate(swaps.tolist()):
        permutation[[row, other - 1]] = permutation[[other - 1, row]]
    return packed.tril(-1), permutation


FACTORED: dict[str, type[Any]] = {kind.storage: kind for kind in (LowRankLinear, PivotedLinear)}
