"""Second moments of one layer: the statistics themselves, and the quantities that depend on them alone."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank.factorization import block_sums as sums
from lowrank.factorization.gram import gram_norm
from lowrank.factorization.precision import float64_device, with_float64
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require

Vectors = Literal["input", "output", "gradient", "pullback"]


def _moment(
    label: str,
    of: Vectors,
    merge: Literal["sum", "mean"] = "sum",
    over_tokens: Callable[..., Tensor] | None = None,
    over_samples: Callable[[Tensor, Tensor], Tensor] | None = None,
    random: bool = False,
) -> dict[str, Any]:
    """Declare a field of `LayerStatistics`: every sum, file, hash and check follows from this.

    `label`: its name in errors. `of`: what it is a moment of: the input x, the output y before the bias, the gradient g at the
    output, or the gradient g W that is sent back. `merge`: a sum or a mean over tokens. Its sum is over tokens, from rows
    `(tokens, size)`, or over samples, from inputs and gradients `(samples, tokens, size)`. `random`: the sum draws signs.
    """
    return dict(label=label, of=of, merge=merge, over_tokens=over_tokens, over_samples=over_samples, random=random)


@check_arguments
@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Hold the moments of a layer over calibration tokens; `a + b` joins two disjoint parts of the data.

    `gram` is on the side of the inputs, `output_gram` on that of the outputs; both give the same factors. Gradients g at the
    layer's output need a loss. A field is None if it was not collected.

    **Arguments**

    - `gram`: G = sum of x x^T over tokens, `(in, in)`, float64.
    - `tokens`: int N, the number of tokens.
    - `mean`: mean of x, `(in,)`, float64.
    - `abs_mean`: mean of |x|, `(in,)`, float64.
    - `input_square`: sum of |x|^2 over tokens = tr G, a float64 scalar.
    - `input_sketch`: sums of tokens under random signs, `(64, in + 1)`, float64; Z^T Z estimates G. The last column sums the
      signs alone.
    - `output_gram`: K = W G W^T, the sum of y y^T over tokens with y the output before its bias, `(out, out)`, float64.
    - `output_mean`: mean of y, `(out,)`, float64.
    - `gradient_gram`: F = sum of g g^T over tokens, `(out, out)`, float64.
    - `row_fisher`: sum over samples of the squared gradient of the weight, summed over each of its rows, `(out,)`, float64.
    - `input_gradient_gram`: M = W^T F W, the second moment of the gradients that this layer sends to its input, `(in, in)`,
      float64; it takes the place of F if the layer has more outputs than inputs.
    - `gradient_square`: sum of |g|^2 over tokens = tr F, a float64 scalar.
    - `gradient_sketch`: as `input_sketch`, of the gradients g, `(64, out + 1)`, float64.
    """

    gram: Float[Tensor, "n n"] | None = field(
        metadata=_moment("second moments of the inputs", "input", over_tokens=sums.outer_sum)
    )
    tokens: int
    mean: Float[Tensor, " n"] = field(metadata=_moment("mean x", "input", "mean", sums.sum_rows))
    abs_mean: Float[Tensor, " n"] | None = field(
        default=None, metadata=_moment("mean |x|", "input", "mean", sums.sum_abs)
    )
    gradient_gram: Float[Tensor, "m m"] | None = field(
        default=None, metadata=_moment("second moments of the output gradients", "gradient", over_tokens=sums.outer_sum)
    )
    row_fisher: Float[Tensor, " m"] | None = field(
        default=None, metadata=_moment("row Fisher information", "gradient", over_samples=sums.sum_squared_gradients)
    )
    input_square: Float[Tensor, ""] | None = field(
        default=None, metadata=_moment("sum of squared inputs", "input", over_tokens=sums.sum_squares)
    )
    input_sketch: Float[Tensor, "k1 n1"] | None = field(
        default=None, metadata=_moment("sketch of the inputs", "input", over_tokens=sums.sum_signed, random=True)
    )
    output_gram: Float[Tensor, "m m"] | None = field(
        default=None, metadata=_moment("second moments of the outputs", "output", over_tokens=sums.outer_sum)
    )
    output_mean: Float[Tensor, " m"] | None = field(
        default=None, metadata=_moment("mean y", "output", "mean", sums.sum_rows)
    )
    input_gradient_gram: Float[Tensor, "n n"] | None = field(
        default=None,
        metadata=_moment("second moments of the gradients sent back", "pullback", over_tokens=sums.outer_sum),
    )
    gradient_square: Float[Tensor, ""] | None = field(
        default=None, metadata=_moment("sum of squared output gradients", "gradient", over_tokens=sums.sum_squares)
    )
    gradient_sketch: Float[Tensor, "k2 m1"] | None = field(
        default=None,
        metadata=_moment("sketch of the output gradients", "gradient", over_tokens=sums.sum_signed, random=True),
    )

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        """Return the statistics of both parts of the data together."""
        tokens, merged = self.tokens + other.tokens, {}
        for name, rules in MOMENTS.items():
            a, b = getattr(self, name), getattr(other, name)
            if (a is None) != (b is None):
                raise ValueError(f"`other` must hold {rules['label']} exactly if this one does.")
            if a is not None and a.shape != b.shape:
                raise ValueError(f"`other` must have {rules['label']} of shape {tuple(a.shape)}, got {tuple(b.shape)}.")
            if a is not None:
                mean = rules["merge"] == "mean"
                merged[name] = (a * self.tokens + b * other.tokens) / tokens if mean else a + b
        return replace(self, tokens=tokens, **merged)

    def moments(self) -> dict[str, Tensor]:
        """Return field name -> tensor for the fields that are not None."""
        return {name: value for name in MOMENTS if (value := getattr(self, name)) is not None}

    @property
    def side(self) -> Literal["inputs", "outputs"]:
        """Return the side of the weight whose second moments are held: those of the inputs or of the outputs."""
        return "inputs" if self.output_gram is None else "outputs"

    @property
    def has_gradients(self) -> bool:
        """Return True if the second moments of the output gradients are held, on either side."""
        return self.gradient_gram is not None or self.input_gradient_gram is not None


MOMENTS = {item.name: item.metadata for item in fields(LayerStatistics) if item.metadata}  # field -> see `_moment`
SIZES = {"input": 1, "output": 0, "gradient": 0, "pullback": 1}  # vectors -> the side of the weight they are as long as


def read_moment(statistics: LayerStatistics | None, name: str, weight: Float[Tensor, "out in"]) -> Tensor:
    """Return one field of the statistics, checked against the weight it belongs to.

    **Arguments**

    - `statistics`: of the layer; None raises.
    - `name`: a tensor field of `LayerStatistics`.
    - `weight`: the layer's weight; its shape and device are used.

    **Returns** float64, on the device of `weight`, or on the CPU if that has no float64.

    **Raises**

    - `ValueError`: a field that is missing, of another size or not finite; no tokens.
    """
    rules = MOMENTS[name]
    if statistics is None:
        raise ValueError(f"`statistics` must hold {rules['label']}, got None: see collect_statistics.")
    value, size = getattr(statistics, name), weight.shape[SIZES[rules["of"]]]
    if value is not None and value.dim():
        rule = f"have {rules['label']} of size {size} for a weight of shape {tuple(weight.shape)}"
        require(value.shape[-1] == size + rules["random"], "statistics", rule, value.shape[-1])
    return _check(statistics, name).double().to(float64_device(weight.device))


def _how_to_get(statistics: LayerStatistics, name: str) -> str:
    if MOMENTS[name]["of"] in ("gradient", "pullback") and not statistics.has_gradients:
        return "pass `loss` to collect_statistics"
    if name in ("gram", "gradient_gram"):
        return f"they are on the side of the {statistics.side}, pass `side='inputs'` to collect_statistics"
    return "name the method in `methods` of collect_statistics"


def read_gram(statistics: LayerStatistics) -> Float[Tensor, "n n"]:
    """Return G in float64.

    **Raises**

    - `ValueError`: statistics on the side of the outputs, no tokens, or moments that are not finite.
    """
    return _check(statistics, "gram").double()


def _check(statistics: LayerStatistics, name: str) -> Tensor:
    value = getattr(statistics, name)
    if value is None:
        raise ValueError(f"`statistics` must hold {MOMENTS[name]['label']}: {_how_to_get(statistics, name)}.")
    if statistics.tokens < 1:
        raise ValueError(f"`statistics` must count at least one token, got {statistics.tokens}.")
    if not all_finite(value):
        raise ValueError(f"`statistics` must be finite, got NaN or infinity in the {MOMENTS[name]['label']}.")
    return value


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite, without a copy of the tensor as `isfinite` makes it."""
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


def centre_moments(statistics: LayerStatistics) -> LayerStatistics:
    """Replace G by the second moment about the mean, G - N mu mu^T; on the side of the outputs, K likewise.

    The effect on the mean input is left to the bias, b + (W - W') mu. The mean is kept for that: centre statistics only once.
    """
    centred: dict[str, Tensor] = {}
    if (mean := statistics.output_mean) is not None:
        centred["output_gram"] = _check(statistics, "output_gram").double() - statistics.tokens * torch.outer(
            mean, mean
        )
    elif statistics.gram is not None:
        mean = statistics.mean
        centred["gram"] = read_gram(statistics) - statistics.tokens * torch.outer(mean, mean)
    if statistics.input_square is not None:
        centred["input_square"] = statistics.input_square - statistics.tokens * statistics.mean.square().sum()
    if (sketch := statistics.input_sketch) is not None:
        centred["input_sketch"] = torch.cat([sketch[:, :-1] - sketch[:, -1:] * statistics.mean, sketch[:, -1:]], dim=1)
    return replace(statistics, **centred)  # pyright: ignore[reportArgumentType]


def shrink_moments(
    statistics: LayerStatistics, shrinkage: float, weight: Float[Tensor, "m n"] | None = None
) -> LayerStatistics:
    """Replace G by G + shrinkage * tr(G)/n * I; on the side of the outputs, K by K + shrinkage * tr(G)/n * W W^T.

    **Arguments**

    - `statistics`: of one layer; not changed.
    - `shrinkage`: float >= 0, relative to the mean eigenvalue, for fewer tokens than about 5 per input.
    - `weight`: W, `(out, in)`; needed on the side of the outputs. Default None.

    **Raises**

    - `ValueError`: `shrinkage` below 0, no tokens, moments that are not finite; no weight on the side of the outputs.
    """
    require(shrinkage >= 0.0, "shrinkage", "be >= 0", shrinkage)
    if statistics.side == "inputs" or statistics.output_gram is None or statistics.input_square is None:
        gram = read_gram(statistics).clone()
        added = shrinkage * gram.diagonal().mean()
        gram.diagonal().add_(added)
        shrunk = {"gram": gram}
    else:
        if weight is None:
            raise ValueError("`weight` must be given for statistics on the side of the outputs, got None.")
        w = weight.detach().to(statistics.output_gram)
        added = shrinkage * statistics.input_square / len(statistics.mean)
        shrunk = {"output_gram": statistics.output_gram + added * (w @ w.T)}
    if (sketch := statistics.input_sketch) is not None:  # rows whose second moment is the added one
        eye = torch.eye(sketch.shape[1] - 1, sketch.shape[1], dtype=sketch.dtype, device=sketch.device)
        shrunk["input_sketch"] = torch.cat([sketch, added.sqrt() * eye])
    return replace(statistics, **shrunk)


def second_moment_eigh(
    statistics: LayerStatistics, shrinkage: float = 0.0
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Return the eigenvalues and eigenvectors of G/N + shrinkage * tr(G/N)/n * I.

    **Arguments**

    - `statistics`: of one layer.
    - `shrinkage`: float >= 0, see `shrink_moments`. Default 0.

    **Returns** eigenvalues, ascending, clipped at 0, and eigenvectors as columns, float64.
    """
    read_gram(statistics)
    values, vectors = torch.linalg.eigh(read_gram(shrink_moments(statistics, shrinkage)) / statistics.tokens)
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


def output_norm(weight: Float[Tensor, "m n"], statistics: LayerStatistics) -> float:
    """Return ||W X||_F, the norm of a layer's outputs, or of their error if W is a difference of weights.

    **Arguments**

    - `weight`: W, `(out, in)`, any floating dtype; multiplied in float64.
    - `statistics`: of the inputs X.
    """
    weight = with_float64(weight.detach()).double()
    return gram_norm(weight, read_gram(statistics).to(weight))
