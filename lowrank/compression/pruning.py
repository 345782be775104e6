"""Prune a model: set the weights of lowest score in every linear layer to exactly zero.

A pruning method is `(weight, statistics) -> scores`. A mask depends on scores only and is True at pruned weights. Counts are
exact, and of equal scores the one at the lower position goes first. (The published magnitude code prunes all values up to and
including the value at sorted index int(numel * ratio): at least one weight too many, and more if values are equal.)
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lowrank.factorization.moments import LayerStatistics, all_finite, read_gram
from lowrank.factorization.precision import float64_device
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.hashing import check_in_memory
from lowrank.io.tensor_places import count_elements
from lowrank.io.weights import warn_of_stacks
from lowrank.nn.plain import has_own_weight
from lowrank.nn.targets import BLOCKS, find_left_out, find_linears, find_shared_weights, find_stacks

Ratios = float | int | Mapping[str, float | int]


def magnitude(weight: Float[Tensor, "out in"], statistics: LayerStatistics | None = None) -> Float[Tensor, "out in"]:
    """Score weights by |W|.

    **Arguments**

    - `weight`: `(out, in)`, any floating-point dtype.
    - `statistics`: not used.

    **Returns** scores, `(out, in)`, float64 (float32 on a device without it).

    **Raises**

    - `ValueError`: NaN or infinity in the weight.
    """
    if not all_finite(weight):
        raise ValueError("`weight` must be finite, got NaN or infinity.")
    wide = torch.float64 if float64_device(weight.device) == weight.device else torch.float32
    return weight.detach().to(wide).abs()


def wanda(weight: Float[Tensor, "out in"], statistics: LayerStatistics) -> Float[Tensor, "out in"]:
    """Score weights by |W_ij| sqrt(G_jj / N): magnitude times root mean square of the input.

    If inputs are uncorrelated, the squared scores of the pruned weights sum to the mean squared change of the output. A factor
    common to all inputs changes no mask, so the published sum over tokens ranks weights as this mean does.

    **Arguments**

    - `weight`: `(out, in)`, any floating-point dtype.
    - `statistics`: of the layer; the second moments G, `(in, in)`, and the number of tokens N are used.

    **Returns** scores, `(out, in)`, float64 (float32 on a device without it), on the device of the weight.

    **Raises**

    - `ValueError`: NaN or infinity in weight or moments; no tokens; another number of inputs.

    **Reference** Sun et al., A simple and effective pruning approach for LLMs, ICLR 2024, arXiv:2306.11695, eq. 1.
    """
    scores, squares = magnitude(weight), read_gram(statistics).diagonal() / statistics.tokens
    if len(squares) != weight.shape[1]:
        raise ValueError(
            f"`statistics` must have moments of {weight.shape[1]} inputs for a weight of shape {tuple(weight.shape)}, got "
            f"{len(squares)}."
        )
    return scores * squares.clamp_min(0.0).sqrt().to(scores.dtype).to(scores.device)  # centred ones may round below 0


PRUNING_METHODS: dict[str, Callable[..., Tensor]] = {"magnitude": magnitude, "wanda": wanda}
NEEDS_STATISTICS = ("wanda",)
GROUPS = ("row", "matrix")


def pruning_mask(scores: Float[Tensor, "out in"], ratio: float | int, per: str = "row") -> Bool[Tensor, "out in"]:
    """Select the round(numel * ratio) weights of lowest score.

    **Arguments**

    - `scores`: `(out, in)`, finite.
    - `ratio`: share of weights to prune, in [0, 1).
    - `per`: 'matrix' ranks all weights together. 'row' (default) ranks them within each output, as Wanda does: every row loses
      floor(total / rows) weights, and the remainder is taken from the rows whose next weight has the lowest score.

    **Returns** mask, `(out, in)`, True at pruned weights.

    **Raises**

    - `ValueError`: `ratio` or `per` out of range; NaN or infinity in the scores.
    """
    require(0 <= ratio < 1, "ratio", "be in [0, 1)", ratio)
    require(per in GROUPS, "per", f"be one of {GROUPS}", per)
    groups = scores if per == "row" else scores.reshape(1, -1)
    return _select_lowest(groups, round(scores.numel() * ratio)).view(scores.shape)


def pattern_mask(scores: Float[Tensor, "out in"], pattern: tuple[int, int]) -> Bool[Tensor, "out in"]:
    """Select the n weights of lowest score among every m consecutive inputs.

    **Arguments**

    - `scores`: `(out, in)`, finite.
    - `pattern`: (n, m) with 1 <= n < m; (2, 4) is the 2:4 pattern of sparse tensor cores.

    **Returns** mask, `(out, in)`, True at pruned weights.

    **Raises**

    - `ValueError`: not 1 <= n < m; a number of inputs that m does not divide; NaN or infinity in the scores.
    """
    n, m = _check_pattern(pattern)
    if scores.shape[1] % m:
        raise ValueError(f"`pattern` {pattern} needs a multiple of {m} inputs, got {scores.shape[1]}.")
    groups = scores.reshape(-1, m)
    return _select_lowest(groups, n * len(groups)).view(scores.shape)


def _check_pattern(pattern: tuple[int, int]) -> tuple[int, int]:
    require(1 <= pattern[0] < pattern[1], "pattern", "be (n, m) with 1 <= n < m", pattern)
    return pattern


def _select_lowest(scores: Float[Tensor, "groups size"], count: int) -> Bool[Tensor, "groups size"]:
    """Select `count` scores: the lowest of every group in equal numbers, and the remainder by the next-lowest of each group."""
    if not all_finite(scores):
        raise ValueError("`scores` must be finite, got NaN or infinity.")
    each, rest = divmod(count, len(scores))
    order = scores.argsort(dim=1, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :each], True)
    if rest:
        following = order[:, each]
        groups = scores.gather(1, following[:, None])[:, 0].argsort(stable=True)[:rest]
        mask[groups, following[groups]] = True
    return mask


@check_arguments
def prune(
    model: nn.Module,
    ratios: Ratios | None = None,
    method: str = "wanda",
    statistics: Mapping[str, LayerStatistics] | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    per: str = "row",
    layers: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Set the weights of lowest score in linear layers to zero, in place.

    All masks are computed before the first weight is written, at one byte per weight. So an error leaves the model as it was,
    and statistics on demand see the dense model. No mask is kept: later training fills the zeros again.

    **Arguments**

    - `model`: any PyTorch module; it is changed.
    - `ratios`: share of weights to prune in each layer, in [0, 1): one number, or layer -> number.
    - `method`: a key of `PRUNING_METHODS`, 'magnitude' or 'wanda' (default).
    - `statistics`: layer -> `LayerStatistics`; 'magnitude' needs none.
    - `pattern`: (n, m) instead of `ratios`: n zeros among every m consecutive inputs.
    - `per`: 'row' (default) or 'matrix', see `pruning_mask`; not used with `pattern`.
    - `layers`: names or patterns; default: the layers that `ratios` names, else all inside numbered blocks.

    **Returns** one row per layer, in the order of the model: `layer`; `ratio` as passed; `pruned`, the number of weights in the
    mask; `weights`, the number of all weights; `sparsity`, the measured share of zeros; `share_of_model`, the weights as a share
    of all parameters of the model.

    **Raises**

    - `ValueError`, before anything is changed: both or none of `ratios` and `pattern`, or a value out of range; unknown layers,
      method or `per`; missing statistics, or of other layers; a weight that is not finite, computed from
      other parameters, or shared with another module.

    **Warns**

    - `UserWarning`: layers that only look linear, see `lowrank.nn.plain`, and are left out.
    - `LeftOutWarning`: stacks of matrices, such as the experts of a mixture, that stay as they are.

    **Reference** Sun et al., ICLR 2024, arXiv:2306.11695.
    """
    default = ratios if isinstance(ratios, Mapping) else BLOCKS
    require(len(default) > 0, "ratios", "name at least one layer", ratios)
    names = default if layers is None else layers if isinstance(layers, str) else list(layers)
    linears = find_linears(model, names)
    _refuse_computed(model, names)
    shares = _share_per_layer(list(linears), ratios, pattern)
    _check_layers(model, linears, method, statistics)
    masks: dict[str, Tensor] = {}
    for name, layer in linears.items():
        moments = statistics[name] if statistics and method in NEEDS_STATISTICS else None
        try:
            scores = PRUNING_METHODS[method](layer.weight, moments)
            masks[name] = pruning_mask(scores, shares[name], per) if pattern is None else pattern_mask(scores, pattern)
        except ValueError as error:
            raise ValueError(f"{error} (layer {name!r})") from error
    whole = count_elements(model.parameters())
    share = sum(layer.weight.numel() for layer in linears.values()) / whole
    warn_of_stacks(find_stacks(model, BLOCKS if layers is None else layers), share)
    rows = [_set_to_zero(name, layer.weight, shares[name], masks.pop(name)) for name, layer in linears.items()]
    return [row | {"share_of_model": row["weights"] / whole} for row in rows]


@torch.no_grad()
def _set_to_zero(name: str, weight: Tensor, ratio: float | int, mask: Tensor) -> dict[str, Any]:
    weight.masked_fill_(mask, 0.0)
    zeros = weight.numel() - int(weight.count_nonzero())
    row = {"layer": name, "ratio": ratio, "pruned": int(mask.sum()), "weights": weight.numel()}
    return row | {"sparsity": zeros / weight.numel()}


def _share_per_layer(
    names: list[str], ratios: Ratios | None, pattern: tuple[int, int] | None
) -> dict[str, float | int]:
    if (ratios is None) == (pattern is None):
        raise ValueError(f"`ratios` or `pattern` must be passed, and not both, got {ratios} and {pattern}.")
    share = ratios if pattern is None else _check_pattern(pattern)[0] / pattern[1]
    shares: dict[str, Any] = dict(share) if isinstance(share, Mapping) else dict.fromkeys(names, share)
    if other := sorted(shares.keys() ^ set(names)):
        raise ValueError(f"`ratios` must have exactly the layers to prune, by their whole names, not so {other[0]!r}.")
    for name, ratio in shares.items():
        if not 0 <= ratio < 1:
            raise ValueError(f"`ratios` must be in [0, 1), got {ratio} for layer {name!r}.")
    return shares


def _refuse_computed(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers whose weight is computed, where zeros would be lost, and tell of others that are left out."""
    for name, reason in find_left_out(model, names).items():
        if not has_own_weight(model.get_submodule(name)):
            raise ValueError(f"`layers` must leave out {name!r}: {reason}, and zeros would be lost.")
        warnings.warn(f"layer {name!r} is left out: {reason}.", stacklevel=3)


def _check_layers(
    model: nn.Module, layers: Mapping[str, nn.Linear], method: str, statistics: Mapping[str, LayerStatistics] | None
) -> None:
    """Find errors that need no mask."""
    require(method in PRUNING_METHODS, "method", f"be one of {sorted(PRUNING_METHODS)}", method)
    check_in_memory(model.state_dict())
    for name, aliases in find_shared_weights(model, layers).items():
        raise ValueError(
            f"`ratios` must leave out layer {name!r}: its weight is shared ({', '.join(aliases)}), so zeros in one layer would "
            "appear in the other."
        )
    for name in layers if method in NEEDS_STATISTICS else ():
        if name not in (statistics or {}):
            raise ValueError(
                f"`statistics` must have every layer for method {method!r}, got none for layer {name!r}: see "
                "lowrank.calibration.collect.collect_statistics."
            )
