"""Pruning: in every linear layer the weights of lowest score are set to exactly zero.

A method is `(weight, statistics) -> scores`; a mask is made of scores alone and is True where a weight goes. Counts are exact
and ties go to the lower position. (The published magnitude code prunes all that is <= the value at sorted index
int(numel * ratio): at least one weight too many, and more where values tie.)
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lowrank.factorization.moments import LayerStatistics, all_finite, checked_gram
from lowrank.nn.targets import BLOCKS, find_linears, shared_weights


def magnitude(weight: Float[Tensor, "out in"], statistics: LayerStatistics | None = None) -> Float[Tensor, "out in"]:
    """|W|, in float64; no statistics are looked at."""
    if not all_finite(weight):
        raise ValueError("`weight` must be finite, got NaN or infinity.")
    wide = torch.float32 if weight.device.type == "mps" else torch.float64  # that device has no float64
    return weight.detach().to(wide).abs()


def wanda(weight: Float[Tensor, "out in"], statistics: LayerStatistics) -> Float[Tensor, "out in"]:
    """|W_ij| sqrt(a_j), in float64, with a_j = G_jj / N the mean square of input j over the calibration tokens.

    Where inputs are uncorrelated, the squared scores of the pruned weights sum to the mean squared change of the output. A
    factor common to all inputs changes no mask: the published sum over tokens ranks as this mean does.

    **Raises:** `ValueError`: a weight or moments that are not finite, no tokens, another number of inputs.

    **Reference:** Sun et al., A simple and effective pruning approach for LLMs, ICLR 2024, arXiv:2306.11695, eq. 1.
    """
    scores, squares = magnitude(weight), checked_gram(statistics).diagonal() / statistics.tokens
    if len(squares) != weight.shape[1]:
        raise ValueError(
            f"`statistics` must have moments of {weight.shape[1]} inputs for a weight of shape {tuple(weight.shape)}, got "
            f"{len(squares)}."
        )
    return scores * squares.clamp_min(0.0).sqrt().to(scores.dtype).to(scores.device)  # centred ones may round below 0


METHODS: dict[str, Callable[..., Tensor]] = {"magnitude": magnitude, "wanda": wanda}
NEEDS_STATISTICS = ("wanda",)
PER = ("row", "matrix")


def pruning_mask(scores: Float[Tensor, "out in"], ratio: float | int, per: str = "row") -> Bool[Tensor, "out in"]:
    """True for round(numel * ratio) weights of lowest score.

    **Arguments:** `ratio`: in [0, 1). `per`: 'matrix' ranks all weights together; 'row' ranks them within each output, as
    Wanda does: each row loses floor(total / rows), and the rest goes one by one from the rows where one more weight has the
    lowest score.

    **Raises:** `ValueError`: `ratio` or `per` out of range, scores that are not finite.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"`ratio` must be in [0, 1), got {ratio}.")
    if per not in PER:
        raise ValueError(f"`per` must be one of {PER}, got {per!r}.")
    groups = scores if per == "row" else scores.reshape(1, -1)
    return _lowest(groups, round(scores.numel() * ratio)).view(scores.shape)


def pattern_mask(scores: Float[Tensor, "out in"], pattern: tuple[int, int]) -> Bool[Tensor, "out in"]:
    """True for the n weights of lowest score in every m consecutive inputs, with `pattern` = (n, m): (2, 4) is 2:4.

    **Raises:** `ValueError`: not 1 <= n < m, inputs that m does not divide, scores that are not finite.
    """
    n, m = _checked(pattern)
    if scores.shape[1] % m:
        raise ValueError(f"`pattern` {pattern} needs a multiple of {m} inputs, got {scores.shape[1]}.")
    groups = scores.reshape(-1, m)
    return _lowest(groups, n * len(groups)).view(scores.shape)


def _checked(pattern: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= pattern[0] < pattern[1]:
        raise ValueError(f"`pattern` must be (n, m) with 1 <= n < m, got {pattern}.")
    return pattern


def _lowest(scores: Float[Tensor, "groups size"], count: int) -> Bool[Tensor, "groups size"]:
    """True for `count` scores: the lowest of every group, equally many, and the rest where one more is lowest."""
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


def prune(
    model: nn.Module,
    ratios: float | int | Mapping[str, float | int] | None = None,
    method: str = "wanda",
    statistics: Mapping[str, LayerStatistics] | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    per: str = "row",
    layers: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Sets the weights of lowest score in linear layers to zero, in place. No mask is kept: training would fill them again.

    All masks are made before the first weight is written, at one byte per weight, so that an error leaves the model as it
    was, and statistics on demand see the dense model.

    **Arguments:** `ratios`: the share to prune in each layer, in [0, 1): one number, or layer -> number. `method`: a key of
    `METHODS`. `statistics`: layer -> `LayerStatistics`; magnitude needs none. `pattern`: (n, m), in the place of `ratios`: n
    zeros in every m consecutive inputs. `per`: 'row' or 'matrix', see `pruning_mask`; not for a pattern. `layers`: names or
    patterns of names, by default those that `ratios` names, else all inside numbered blocks.

    **Returns:** one row per layer, in the order of the model: `layer`, `ratio` as asked, `pruned`: how many the mask took,
    `weights` in all, `sparsity`: the share of zeros measured afterwards.

    **Raises:** `ValueError`, before anything is changed: both or none of `ratios` and `pattern`, or out of range; unknown
    layers, method or `per`; statistics missing or of other layers; a weight that is not finite or that another module shares.

    **Reference:** Sun et al., ICLR 2024, arXiv:2306.11695.
    """
    named = ratios if isinstance(ratios, Mapping) else BLOCKS
    linears = find_linears(model, named if layers is None else layers)
    asked = _asked(linears, ratios, pattern)
    _check(model, linears, method, statistics)
    masks: dict[str, Tensor] = {}
    for name, layer in linears.items():
        moments = statistics[name] if statistics and method in NEEDS_STATISTICS else None
        try:
            scores = METHODS[method](layer.weight, moments)
            masks[name] = pruning_mask(scores, asked[name], per) if pattern is None else pattern_mask(scores, pattern)
        except ValueError as error:
            raise ValueError(f"{error} (layer {name!r})") from error
    return [_set_to_zero(name, layer.weight, asked[name], masks.pop(name)) for name, layer in linears.items()]


@torch.no_grad()
def _set_to_zero(name: str, weight: Tensor, ratio: float | int, mask: Tensor) -> dict[str, Any]:
    weight.masked_fill_(mask, 0.0)
    zeros = weight.numel() - int(weight.count_nonzero())
    row = {"layer": name, "ratio": ratio, "pruned": int(mask.sum()), "weights": weight.numel()}
    return row | {"sparsity": zeros / weight.numel()}


def _asked(
    linears: Iterable[str], ratios: float | int | Mapping[str, float | int] | None, pattern: tuple[int, int] | None
) -> dict[str, float | int]:
    """layer -> the share to prune."""
    names = list(linears)
    if (ratios is None) == (pattern is None):
        raise ValueError(f"`ratios` must be given or `pattern`, and not both, got {ratios} and {pattern}.")
    each = ratios if pattern is None else _checked(pattern)[0] / pattern[1]
    asked: dict[str, Any] = dict(each) if isinstance(each, Mapping) else dict.fromkeys(names, each)
    if not asked:
        raise ValueError("`ratios` must be for at least one layer, got none.")
    if other := sorted(asked.keys() ^ set(names)):
        raise ValueError(f"`ratios` must have exactly the layers to prune, by their whole names, not so {other[0]!r}.")
    for name, ratio in asked.items():
        if not 0 <= ratio < 1:
            raise ValueError(f"`ratios` must be in [0, 1), got {ratio} for layer {name!r}.")
    return asked


def _check(
    model: nn.Module, linears: Mapping[str, nn.Linear], method: str, statistics: Mapping[str, LayerStatistics] | None
) -> None:
    """What can be known to be wrong before a mask is made."""
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {sorted(METHODS)}, got {method!r}.")
    for name, held in shared_weights(model, linears).items():
        raise ValueError(
            f"`ratios` must leave out layer {name!r}: its weight is shared ({', '.join(held)}), and zeros meant for one layer "
            "would be in the other."
        )
    for name in linears if method in NEEDS_STATISTICS else ():
        if name not in (statistics or {}):
            raise ValueError(
                f"`statistics` must hold every layer for method {method!r}, got none for layer {name!r}: see "
                "lowrank.calibration.collect.collect_statistics."
            )
