"""Methods of compression: what the outputs (H) and the inputs (S) of a weight count for.

A method is one function `(statistics, weight) -> Weighting`; `factorize` then minimises ||H (W - W') S||_F over the weights W' of
a rank, and `weighted_norm` measures that norm. The methods differ in nothing else:

| method | H | S |
|---|---|---|
| `svd` | I | I |
| `asvd` | I | diag(mean abs x)^alpha |
| `fwsvd` | diag(row Fisher)^(1/2) | I |
| `whitened` | I | S S^T = G |
| `two_sided` | H^T H = E[g g^T], with a ridge | S S^T = G |

Statistics on the side of the outputs hold W S S^T W^T in place of S S^T, and those of a layer with more outputs than inputs may
hold W^T H^T H W in place of H^T H: the same norm of the same W, from the smaller matrices.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank.factorization.block_sums import SKETCH_ROWS, outer_sum
from lowrank.factorization.moments import LayerStatistics, read_moment
from lowrank.factorization.precision import with_float64
from lowrank.factorization.weighting import Weighting

ALPHA = 0.5  # exponent of ASVD's channel scales
RIDGE = 0.03  # of two_sided, relative to the mean eigenvalue of E[g g^T]

Method = Callable[[LayerStatistics | None, Tensor], Weighting]


def svd(statistics: LayerStatistics | None, weight: Tensor) -> Weighting:
    """Let all outputs and inputs count alike: the best factors in the Frobenius norm, without data.

    **Arguments**

    - `statistics`: not used, may be None.
    - `weight`: W, `(out, in)`; not used.

    **Reference** Eckart and Young, Psychometrika 1936.
    """
    return Weighting()


def asvd(statistics: LayerStatistics | None, weight: Tensor) -> Weighting:
    """Weigh each input channel by the square root of its mean magnitude.

    The truncation of W diag(s) with s_j = (mean |x_j|)^0.5. A diagonal takes the place of G, so correlations are not seen.

    **Arguments**

    - `statistics`: its `abs_mean`, `(in,)`, is used.
    - `weight`: W, `(out, in)`; its shape and device are used.

    **Raises**

    - `ValueError`: statistics that are missing, of another size or not finite.

    **Reference** Yuan et al., ASVD, arXiv:2312.05821, section 3.2.
    """
    return Weighting(inputs=(read_moment(statistics, "abs_mean", weight) ** ALPHA) ** 2)


def fwsvd(statistics: LayerStatistics | None, weight: Tensor) -> Weighting:
    """Weigh each row of the weight by its empirical Fisher information.

    The truncation of D W, with D^2 the diagonal of the Fisher information summed over each row.

    **Arguments**

    - `statistics`: its `row_fisher`, `(out,)`, is used.
    - `weight`: W, `(out, in)`; its shape and device are used.

    **Raises**

    - `ValueError`: statistics that are missing, without gradients, of another size or not finite.

    **Reference** Hsu et al., FWSVD, ICLR 2022, arXiv:2207.00112, equations 4 to 8.
    """
    return Weighting(outputs=read_moment(statistics, "row_fisher", weight))


def whitened(statistics: LayerStatistics | None, weight: Tensor) -> Weighting:
    """Weigh the inputs by their second moment G: the best factors for the layer's outputs on the calibration data.

    ||(W - W') S||_F = ||(W - W') X||_F for the matrix X of all calibration inputs.

    **Arguments**

    - `statistics`: its `gram`, `(in, in)`, or its `output_gram`, `(out, out)`, is used.
    - `weight`: W, `(out, in)`; its shape and device are used.

    **Raises**

    - `ValueError`: statistics that are missing, of another size, without tokens or not finite.

    **Reference** Chen et al., DRONE, NeurIPS 2021; Wang et al., SVD-LLM, ICLR 2025, arXiv:2403.07378. From the outputs: Yu and
    Wu, AFM, AAAI 2023.
    """
    return Weighting(**_weigh_inputs(statistics, weight))


def two_sided(statistics: LayerStatistics | None, weight: Tensor) -> Weighting:
    """Weigh the inputs by G and the outputs by their gradients: the best factors in an approximation of the loss.

    H^T H = E[g g^T] + 0.03 times its mean eigenvalue, which keeps H well conditioned. With gradients under labels drawn from the
    model, the squared norm approximates twice the rise of the loss summed over the calibration data, so that the spectra of
    different layers compare.

    **Arguments**

    - `statistics`: its `gram`, `(in, in)`, or `output_gram`, `(out, out)`, and its `gradient_gram`, `(out, out)`, or
      `input_gradient_gram`, `(in, in)`, are used.
    - `weight`: W, `(out, in)`.

    **Raises**

    - `ValueError`: statistics that are missing, without gradients, of another size, without tokens or not finite.

    **Reference** Martens and Grosse, KFAC, ICML 2015, arXiv:1503.05671, section 3, for the weighting.
    """
    inputs = _weigh_inputs(statistics, weight)
    if statistics is not None and statistics.gradient_gram is None and statistics.input_gradient_gram is not None:
        return Weighting(**inputs, **_weigh_pullback(statistics, weight))
    outputs = read_moment(statistics, "gradient_gram", weight)
    mean = outputs.diagonal().mean()
    if statistics is None or not mean > 0:  # no gradient reaches the layer
        return Weighting(**inputs, outputs=torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device))
    outputs = outputs.clone()
    outputs.diagonal().add_(RIDGE * mean)
    return Weighting(**inputs, outputs=outputs.div_(statistics.tokens))


def _weigh_inputs(statistics: LayerStatistics | None, weight: Tensor) -> dict[str, Tensor]:
    """Return S S^T from the inputs or W S S^T W^T from the outputs, and a sketch of S if there is one."""
    if statistics is None or statistics.output_gram is None:
        weighting = {"inputs": read_moment(statistics, "gram", weight)}
    else:
        weighting = {"image": read_moment(statistics, "output_gram", weight)}
    if statistics is not None and statistics.input_sketch is not None:
        weighting["inputs_sketch"] = read_moment(statistics, "input_sketch", weight)[:, :-1]
    return weighting


def _weigh_pullback(statistics: LayerStatistics, weight: Tensor) -> dict[str, Tensor]:
    """Return W^T H^T H W, and a sketch of H, with the ridge that `two_sided` adds to the second moments of the gradients."""
    w = with_float64(weight.detach()).double()
    moments = read_moment(statistics, "input_gradient_gram", weight)
    mean = read_moment(statistics, "gradient_square", weight) / len(w)
    signs = torch.randint(0, 2, (SKETCH_ROWS, len(w)), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
    random = signs.to(w) / SKETCH_ROWS**0.5  # its second moment estimates the identity
    if not mean > 0:
        return {"pullback": outer_sum(w), "outputs_sketch": random}
    sketch = read_moment(statistics, "gradient_sketch", weight)[:, :-1]
    ridge = RIDGE * mean
    return {
        "pullback": outer_sum(w).mul_(ridge).add_(moments).div_(statistics.tokens),
        "outputs_sketch": torch.cat([sketch, ridge.sqrt() * random]) / statistics.tokens**0.5,
    }


METHODS: dict[str, Method] = {"svd": svd, "asvd": asvd, "fwsvd": fwsvd, "whitened": whitened, "two_sided": two_sided}
READS: dict[str, tuple[str, ...]] = {  # method -> what it reads of full statistics; a method not listed may read all
    "svd": (),
    "asvd": ("abs_mean",),
    "fwsvd": ("row_fisher",),
    "whitened": ("gram",),
    "two_sided": ("gram", "gradient_gram"),
}


def needs_gradients(method: str) -> bool:
    """Return whether a method refuses statistics that were collected without a loss.

    **Arguments**

    - `method`: a key of `METHODS`.
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    try:
        METHODS[method](LayerStatistics(gram=one, tokens=1, mean=one[0], abs_mean=one[0]), one)
    except ValueError:
        return True
    return False
