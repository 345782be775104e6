"""Second moments of one layer: the statistics themselves, and the quantities that depend on them alone."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank.factorization.block_sums import outer_sum, sum_abs, sum_rows, sum_squared_gradients
from lowrank.io.checks import require


def _moment(
    label: str,
    merge: Literal["sum", "mean"],
    shared: bool,
    over_tokens: Callable[[Tensor], Tensor] | None = None,
    over_samples: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Declare a field of `LayerStatistics`: every sum, file, hash and check follows from this.

    `label`: its name in errors. `merge`: whether it is a sum or a mean over tokens. `shared`: True if it is of the input, which
    layers can share, and False if it is of the gradient at the output. Its sum is over tokens, from rows `(tokens, size)` of the
    input or of the gradient, or over samples, from inputs and gradients `(samples, tokens, size)`.
    """
    return dict(label=label, merge=merge, shared=shared, over_tokens=over_tokens, over_samples=over_samples)


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Hold the moments of a layer over calibration tokens; `a + b` joins two disjoint parts of the data.

    The last two need a loss; g is its gradient at the layer's output.

    **Arguments**

    - `gram`: G = sum of x x^T over tokens, `(in, in)`, float64.
    - `tokens`: int N, the number of tokens.
    - `mean`: mean of x, `(in,)`, float64.
    - `abs_mean`: mean of |x|, `(in,)`, float64.
    - `gradient_gram`: sum of g g^T over tokens, `(out, out)`, float64, or None.
    - `row_fisher`: sum over samples of the squared gradient of the weight, summed over each of its rows, `(out,)`, float64, or
      None.
    """

    gram: Float[Tensor, "n n"] = field(metadata=_moment("second moments of the inputs", "sum", True, outer_sum))
    tokens: int
    mean: Float[Tensor, " n"] = field(metadata=_moment("mean x", "mean", True, sum_rows))
    abs_mean: Float[Tensor, " n"] = field(metadata=_moment("mean |x|", "mean", True, sum_abs))
    gradient_gram: Float[Tensor, "m m"] | None = field(
        default=None, metadata=_moment("second moments of the output gradients", "sum", False, outer_sum)
    )
    row_fisher: Float[Tensor, " m"] | None = field(
        default=None, metadata=_moment("row Fisher information", "sum", False, over_samples=sum_squared_gradients)
    )

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        """Return the statistics of both parts of the data together."""
        if self.gram.shape != other.gram.shape:
            raise ValueError(
                f"`other` must have moments of shape {tuple(self.gram.shape)}, got {tuple(other.gram.shape)}."
            )
        tokens, merged = self.tokens + other.tokens, {}
        for name, rules in MOMENTS.items():
            a, b = getattr(self, name), getattr(other, name)
            if (a is None) != (b is None):
                raise ValueError(f"`other` must hold {rules['label']} exactly if this one does.")
            if a is not None:
                mean = rules["merge"] == "mean"
                merged[name] = (a * self.tokens + b * other.tokens) / tokens if mean else a + b
        return LayerStatistics(tokens=tokens, **merged)

    def moments(self, *, shared: bool | None = None) -> dict[str, Tensor]:
        """Return field name -> tensor for the fields that are not None.

        **Arguments**

        - `shared`: True for those of the input, False for those of the gradients; by default both.
        """
        names = [name for name, rules in MOMENTS.items() if shared in (None, rules["shared"])]
        return {name: value for name in names if (value := getattr(self, name)) is not None}


MOMENTS = {item.name: item.metadata for item in fields(LayerStatistics) if item.metadata}  # field -> see `_moment`


def read_moment(statistics: LayerStatistics | None, name: str, weight: Float[Tensor, "out in"]) -> Tensor:
    """Return one field of the statistics, checked against the weight it belongs to.

    **Arguments**

    - `statistics`: of the layer; None raises.
    - `name`: a tensor field of `LayerStatistics`.
    - `weight`: the layer's weight; its shape and device are used.

    **Returns** float64, on the device of `weight`.

    **Raises**

    - `ValueError`: a field that is missing, of another size or not finite; no tokens.
    """
    label, shared = MOMENTS[name]["label"], MOMENTS[name]["shared"]
    if statistics is None:
        raise ValueError(f"`statistics` must hold {label}, got None: see collect_statistics.")
    value, size = getattr(statistics, name), weight.shape[1 if shared else 0]
    if value is None:
        raise ValueError(f"`statistics` must hold {label}: pass `loss` to collect_statistics.")
    if len(value) != size:
        shape = tuple(weight.shape)
        raise ValueError(
            f"`statistics` must have {label} of size {size} for a weight of shape {shape}, got {len(value)}."
        )
    _check(statistics, name)
    return value.double().to(weight.device)


def read_gram(statistics: LayerStatistics) -> Float[Tensor, "n n"]:
    """Return G in float64.

    **Raises**

    - `ValueError`: no tokens, or moments that are not finite.
    """
    _check(statistics, "gram")
    return statistics.gram.double()


def _check(statistics: LayerStatistics, name: str) -> None:
    if statistics.tokens < 1:
        raise ValueError(f"`statistics` must count at least one token, got {statistics.tokens}.")
    if not all_finite(getattr(statistics, name)):
        raise ValueError(f"`statistics` must be finite, got NaN or infinity in the {MOMENTS[name]['label']}.")


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite, without a copy of the tensor as `isfinite` makes it."""
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


def centre_moments(statistics: LayerStatistics) -> LayerStatistics:
    """Replace G by the second moment about the mean, G - N mu mu^T.

    The effect of a layer on the mean input is then left to its bias: b + (W - W') mu restores it exactly. The mean itself is kept
    for that, so centre statistics only once.
    """
    gram = read_gram(statistics)
    return replace(statistics, gram=gram - statistics.tokens * torch.outer(statistics.mean, statistics.mean))


def shrink_moments(statistics: LayerStatistics, shrinkage: float) -> LayerStatistics:
    """Replace G by G + shrinkage * tr(G)/n * I.

    **Arguments**

    - `statistics`: of one layer; not changed.
    - `shrinkage`: float >= 0, relative to the mean eigenvalue. For fewer tokens than about 5 per input; no method needs it
      numerically.

    **Raises**

    - `ValueError`: `shrinkage` below 0, no tokens, or moments that are not finite.
    """
    require(shrinkage >= 0.0, "shrinkage", "be >= 0", shrinkage)
    gram = read_gram(statistics).clone()
    gram.diagonal().add_(shrinkage * gram.diagonal().mean())
    return replace(statistics, gram=gram)


def second_moment_eigh(
    statistics: LayerStatistics, shrinkage: float = 0.0
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Return the eigenvalues and eigenvectors of G/N + shrinkage * tr(G/N)/n * I.

    **Arguments**

    - `statistics`: of one layer.
    - `shrinkage`: float >= 0, see `shrink_moments`. Default 0.

    **Returns** eigenvalues, ascending, clipped at 0, and eigenvectors as columns, float64.
    """
    values, vectors = torch.linalg.eigh(shrink_moments(statistics, shrinkage).gram / statistics.tokens)
    return values.clamp_min(0.0), vectors


def whitening_factor(statistics: LayerStatistics, shrinkage: float = 0.0) -> Float[Tensor, "n n"]:
    """Return a factor S of the second moment: S S^T = G/N + shrinkage * tr(G/N)/n * I.

    S = Q sqrt(lambda) from the eigenvalues in float64, with those that rounding left below zero set to zero. No Cholesky factor
    that could fail and no absolute constant: S scales with the activations. S^-1 x is white.

    **Arguments**

    - `statistics`: of one layer.
    - `shrinkage`: float >= 0, see `shrink_moments`. Default 0.

    **Returns** `(n, n)`, float64, columns by ascending eigenvalue.

    **Reference** Wang et al., SVD-LLM, ICLR 2025, arXiv:2403.07378, section 3.1, which uses a Cholesky factor.
    """
    values, vectors = second_moment_eigh(statistics, shrinkage)
    return vectors * values.sqrt()


def gram_norm(matrix: Float[Tensor, "m n"], gram: Float[Tensor, "n n"]) -> float:
    """Return sqrt(tr(M G M^T)).

    **Arguments**

    - `matrix`: M, `(m, n)`, float64.
    - `gram`: G, `(n, n)`, float64, on the same device.
    """
    return torch.einsum("mn,mn->", matrix @ gram, matrix).clamp_min(0.0).sqrt().item()


def output_norm(weight: Float[Tensor, "m n"], statistics: LayerStatistics) -> float:
    """Return ||W X||_F, the norm of a layer's outputs, or of their error if W is a difference of weights.

    **Arguments**

    - `weight`: W, `(out, in)`, any floating dtype; multiplied in float64.
    - `statistics`: of the inputs X.
    """
    return gram_norm(weight.detach().double(), read_gram(statistics).to(weight.device))
