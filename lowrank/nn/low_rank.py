"""Linear layers with a low-rank weight: stored as two factors, or as pivot rows and coefficients (PIFA)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.factorization.factorize import Factors, balance
from lowrank.factorization.precision import with_float64
from lowrank.factorization.storages import FACTORS, PIVOTED
from lowrank.io.checks import require
from lowrank.nn.lazy_weight import make_lazy, weight_of
from lowrank.nn.pivots import find_pivot_rows

SHOWN = 8  # pivots in a message


class LowRankLinear(nn.Module):
    """Compute y = B (A x) + b instead of y = W x + b, in rank (out + in) parameters and the bias.

    `right` is an `nn.Linear(in, rank)` with weight A; `left` is an `nn.Linear(rank, out)` with weight B and the bias. Both are
    ordinary layers, so everything that works on linear layers (peft, quantizers, compilers) works on them.

    **Arguments**

    - `in_features`, `out_features`: sizes of the weight W, `(out, in)`.
    - `rank`: number of columns of B and rows of A, >= 1.
    - `bias`: whether the layer has a bias; default True.
    - `dtype`: of the parameters; default: torch's default dtype.
    """

    storage = FACTORS.name

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Linear(in_features, rank, bias=False, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, dtype=dtype)

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls, factors: Factors, bias: Tensor | None, dtype: torch.dtype, bias_dtype: torch.dtype | None = None
    ) -> "LowRankLinear":
        """Build the layer from factors, scaled so that each of the `rank` terms has the same norm in A and in B.

        **Arguments**

        - `factors`: the factors of the weight; they are not changed.
        - `bias`: `(out,)`, or None for a layer without bias.
        - `dtype`: of the parameters; the scales are computed in float64.
        - `bias_dtype`: of the bias, if it is another one.
        """
        left, right = balance(factors.left.double(), factors.right.double())
        layer = _build_empty(cls, left, right, dtype, None if bias is None else bias_dtype or dtype)
        layer.left.weight.copy_(left)
        layer.right.weight.copy_(right)
        layer.set_bias(bias)
        return layer

    @property
    def bias(self) -> Tensor | None:
        """Return the bias, `(out,)`, or None."""
        return self.left.bias

    @torch.no_grad()
    def set_bias(self, bias: Tensor | None) -> None:
        """Replace the values of the bias, `(out,)`; None changes nothing."""
        if bias is not None:
            self.left.bias.copy_(bias)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Return W' = B A, `(out, in)`, in the dtype of the layer; each use multiplies again, see `LazyWeight`."""
        shape = (self.out_features, self.in_features)
        return make_lazy(weight_of(self.left), shape, lambda: weight_of(self.left) @ weight_of(self.right))

    def dense(self) -> Float[Tensor, "out in"]:
        """Compute W' = B A, `(out, in)`, in float64, without gradients."""
        return _widen(self.left.weight) @ _widen(self.right.weight)

    def multiply(self, columns: Float[Tensor, "in k"]) -> Float[Tensor, "out k"]:
        """Compute W' X for float64 columns, `(in, k)`, in float64, without gradients and without forming W'."""
        return _widen(self.left.weight) @ (_widen(self.right.weight) @ columns)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Compute B (A x) + b for `x`, `(..., in)`."""
        return self.left(self.right(x))

    def extra_repr(self) -> str:
        """Return the sizes, for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotedLinear(nn.Module):
    """Compute z = W'_P x, y_P = z + b_P and y_~P = C z + b_~P: a weight of rank r in r (out + in) - r^2 parameters.

    The rows P of W' = B A, the pivots, are independent. They determine the other rows: W'[~P] = C W'[P] with
    C = B[~P] B[P]^-1. `right` is an `nn.Linear(in, rank)` with weight W'[P]. `left` is an `nn.Linear(rank, out - rank)` with
    weight C and bias b_~P. `pivots` is P, `(rank,)`, int64, and `pivot_bias` is b_P. It is added after C: a large bias would
    take the digits of all other outputs with it.

    **Arguments**

    - `in_features`, `out_features`: sizes of the weight, `(out, in)`.
    - `rank`: number of pivots, in [1, out - 1].
    - `bias`: whether the layer has a bias; default True.
    - `dtype`: of the parameters; default: torch's default dtype.

    **Reference** Zhao et al., PIFA, arXiv:2501.19090, section 3. `lowrank.nn.pivots` chooses the rows so that |C| <= 1.25.
    """

    storage = PIVOTED.name
    pivots: Tensor
    others: Tensor
    pivot_bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Linear(in_features, rank, bias=False, dtype=dtype)
        self.left = nn.Linear(rank, out_features - rank, bias=bias, dtype=dtype)
        self.register_parameter("pivot_bias", nn.Parameter(torch.zeros(rank, dtype=dtype)) if bias else None)
        self.register_buffer("pivots", torch.arange(rank))
        self.register_buffer("others", torch.arange(rank, out_features), persistent=False)
        self.register_load_state_dict_post_hook(_update_others)

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls, factors: Factors, bias: Tensor | None, dtype: torch.dtype, bias_dtype: torch.dtype | None = None
    ) -> "PivotedLinear":
        """Build the layer from factors.

        **Arguments**

        - `factors`: the factors of the weight, of a rank below `out`; they are not changed.
        - `bias`: `(out,)`, or None for a layer without bias.
        - `dtype`: of the parameters; pivots and coefficients are computed in float64.
        - `bias_dtype`: of the bias, if it is another one.

        **Raises**

        - `ValueError`: the rank is `out` or more; a dense weight is as small then.
        """
        left, right = factors.left.double(), factors.right.double()
        if factors.rank >= len(left):
            raise ValueError(f"`factors` must have a rank below the {len(left)} outputs, got {factors.rank}.")
        pivots, coefficients = find_pivot_rows(left)
        layer = _build_empty(cls, left, right, dtype, None if bias is None else bias_dtype or dtype)
        layer.right.weight.copy_(left[pivots] @ right)
        layer.left.weight.copy_(coefficients)
        layer.pivots.copy_(pivots)
        layer.update_others()
        layer.set_bias(bias)
        return layer

    @property
    def bias(self) -> Tensor | None:
        """Join the bias b, `(out,)`, of its two stored parts; None if the layer has none."""
        return None if self.pivot_bias is None else self._join(self.pivot_bias, self.left.bias)

    @torch.no_grad()
    def set_bias(self, bias: Tensor | None) -> None:
        """Replace the values of the bias, `(out,)`; None changes nothing."""
        if bias is not None and self.pivot_bias is not None:
            self.pivot_bias.copy_(bias[self.pivots])
            self.left.bias.copy_(bias[self.others])

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Return W', `(out, in)`, in the dtype of the layer; each use multiplies again, see `LazyWeight`."""
        shape = (self.out_features, self.in_features)
        return make_lazy(weight_of(self.right), shape, lambda: self._complete(weight_of(self.right)))

    @torch.no_grad()
    def dense(self) -> Float[Tensor, "out in"]:
        """Compute W', `(out, in)`, in float64, without gradients."""
        return self._complete(_widen(self.right.weight))

    @torch.no_grad()
    def multiply(self, columns: Float[Tensor, "in k"]) -> Float[Tensor, "out k"]:
        """Compute W' X for float64 columns, `(in, k)`, in float64, without gradients and without forming W'."""
        return self._complete(_widen(self.right.weight) @ columns)

    def _complete(self, rows: Tensor) -> Tensor:
        """Return all rows of a product from those of the pivots, `(rank, k)`."""
        left = weight_of(self.left)
        left = left if left.dtype == rows.dtype else with_float64(left).to(rows)
        return self._join(rows.T, (left @ rows).T).T

    def update_others(self) -> None:
        """Recompute `others`, the ascending indices of the rows that are no pivots; needed after `pivots` changes.

        **Raises**

        - `ValueError`: pivots that are not distinct rows, as a damaged file may have them.
        """
        is_pivot = torch.zeros(self.out_features, dtype=torch.bool, device=self.pivots.device)
        is_pivot[self.pivots.clamp(0, self.out_features - 1)] = True
        self.others = (~is_pivot).nonzero().squeeze(1)
        outside = bool(((self.pivots < 0) | (self.pivots >= self.out_features)).any())
        distinct = not outside and len(self.others) == self.out_features - self.rank
        rule = f"be {self.rank} distinct rows of {self.out_features}"
        require(distinct, "pivots", rule, self.pivots.tolist()[:SHOWN])

    def _join(self, pivots: Tensor, others: Tensor) -> Tensor:
        """Put both parts of the outputs in their places, in one new tensor: cheaper than to concatenate and permute."""
        y = pivots.new_empty(*pivots.shape[:-1], self.out_features)
        return y.index_copy_(-1, self.pivots.to(y.device), pivots).index_copy_(-1, self.others.to(y.device), others)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Compute W' x + b for `x`, `(..., in)`: the pivot outputs first, then the others from them."""
        rows = self.right(x)
        others = self.left(rows)
        if self.pivot_bias is not None:
            rows = rows + self.pivot_bias.to(rows.dtype)  # autocast casts the outputs, not the parameter
        return self._join(rows, others)

    def extra_repr(self) -> str:
        """Return the sizes, for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def move_pivot_bias(state: dict[str, Tensor], name: str) -> None:
    """Move the bias of the pivots out of `right` in the state of a pivoted layer, in place: once C was applied to it too.

    **Arguments**

    - `state`: name -> tensor, with `right.bias` of the layer; it is changed.
    - `name`: of the layer.
    """
    bias, weight, others = (state[f"{name}.{key}"] for key in ("right.bias", "left.weight", "left.bias"))
    state[f"{name}.left.bias"] = (_widen(others) + _widen(weight) @ _widen(bias)).to(others)
    state[f"{name}.pivot_bias"] = state.pop(f"{name}.right.bias")


FACTORED_LAYERS: dict[str, type[Any]] = {layer.storage: layer for layer in (LowRankLinear, PivotedLinear)}


def _widen(weight: Tensor) -> Tensor:
    return with_float64(weight.detach()).double()


def _update_others(module: Any, _: object) -> None:
    module.update_others()


def _build_empty(
    cls: type[Any], left: Tensor, right: Tensor, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> Any:
    """Build a layer of the sizes of two factors on their device, without initializing its parameters.

    The bias may have a dtype of its own, as a dense layer's may; None builds a layer without bias.
    """
    sizes = (right.shape[1], left.shape[0], right.shape[0])
    with torch.device("meta"):
        layer = cls(*sizes, bias=bias_dtype is not None, dtype=dtype)
    for name, parameter in list(layer.named_parameters()):
        if name.endswith("bias"):
            owner, _, key = name.rpartition(".")
            setattr(layer.get_submodule(owner), key, nn.Parameter(parameter.to(bias_dtype or dtype)))
    return layer.to_empty(device=left.device)
