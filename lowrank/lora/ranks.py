"""Rules that make LoRA ranks of the spectra of weight deltas: an energy threshold, rounding, smoothing, a budget."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from lowrank.lora.deltas import DeltaSpectrum

MIN_RANK, MAX_RANK, THRESHOLD, SMOOTHING = 4, 128, 0.9, 0.8
TIE = 1e-12  # relative: rounding of sums decides nothing


def rank_for_delta(
    singular_values: Tensor | Sequence[float],
    threshold: float | int,
    min_rank: int = MIN_RANK,
    max_rank: int = MAX_RANK,
    total: float | None = None,
) -> int:
    """The smallest rank whose share of ||Delta||_F^2 reaches a threshold, within bounds.

    **Arguments:** `singular_values`: `(k,)`, any order; all of them, or the largest with `total`. `threshold`: in (0, 1]; 1 asks
    for the numerical rank, the number of values above k eps sigma_1 with float32's eps. `min_rank`, `max_rank`: 1 <= min <= max.
    `total`: ||Delta||_F^2 where only the largest values are given; without it their own energy would pass for all there is.

    **Returns:** an int in [min_rank, max_rank], never more than there are values where `total` is not given; 0 for a zero delta.
    Where the values given do not reach the threshold: `max_rank`.

    **Raises:** `ValueError`: a number out of its range, values that are negative or not finite, a total below their energy.
    """
    values = torch.as_tensor(singular_values).double().flatten().sort(descending=True).values
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be in (0, 1], got {threshold}.")
    if not 1 <= min_rank <= max_rank:
        raise ValueError(f"`min_rank` must be in [1, `max_rank`], got {min_rank} with `max_rank` {max_rank}.")
    if not len(values) or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("`singular_values` must be finite and >= 0, at least one.")
    largest = float(values[0])
    if largest == 0:
        return 0
    energy = (values / largest).square().cumsum(0)  # tiny deltas must not vanish when squared
    whole = float(energy[-1]) if total is None else total / largest / largest
    if whole < float(energy[-1]) * (1 - 1e-6):
        raise ValueError(
            f"`total` must be at least the energy of the values, {float(energy[-1]) * largest**2}, got {total}."
        )
    if threshold == 1 and total is None:
        raw = int((values > len(values) * torch.finfo(torch.float32).eps * largest).sum())
    else:
        raw = int((energy < threshold * whole * (1 - TIE)).sum()) + 1
    bounded = max(min_rank, min(raw, max_rank))
    return bounded if total is not None else min(bounded, len(values))


def power_of_two(rank: int, min_rank: int = MIN_RANK, max_rank: int = MAX_RANK) -> int:
    """The power of two that is nearest on a log scale, for ranks above 16, within bounds; others as they are. May go below what
    a threshold asks for."""
    rounded = 2 ** round(torch.tensor(float(rank), dtype=torch.float64).log2().item()) if rank > 16 else rank
    return max(min_rank, min(rounded, max_rank)) if rank else 0


def layer_type(name: str) -> str:
    """The last part of a module's name: `model.layers.3.mlp.up_proj` -> `up_proj`."""
    return name.rpartition(".")[2]


def smooth_ranks(ranks: Mapping[str, int], groups: Mapping[str, str], factor: float | int) -> dict[str, int]:
    """Draws ranks towards the mean of their group: int(factor * mean + (1 - factor) * rank).

    A mean of bounded ranks is within the bounds. Ranks of 0 (nothing changed) stay 0 and count in no mean.

    **Arguments:** `groups`: name -> group, for instance its `layer_type`. `factor`: in [0, 1]; 0 changes nothing, 1 gives equal
    ranks in a group.

    **Raises:** `ValueError`: a factor out of its range; a name without a group.
    """
    if not 0 <= factor <= 1:
        raise ValueError(f"`factor` must be in [0, 1], got {factor}.")
    if lacking := sorted(ranks.keys() - groups.keys()):
        raise ValueError(f"`groups` must name a group for every layer, got none for {lacking[0]!r}.")
    members: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        if rank:
            members.setdefault(groups[name], []).append(rank)
    share = Fraction(str(factor))  # as written: 0.8 * 36 + 0.2 * 4 must not fall short of an integer by rounding
    return {
        name: int(share * Fraction(sum(own), len(own)) + (1 - share) * rank)
        if rank and (own := members[groups[name]])
        else 0
        for name, rank in ranks.items()
    }


def ranks_for_budget(
    spectra: Mapping[str, DeltaSpectrum],
    parameters: int,
    *,
    min_rank: int = 0,
    max_rank: int | None = None,
) -> dict[str, int]:
    """Ranks that keep the most energy sum sigma^2 over all layers within a number of adapter parameters, r (out + in) each.

    The globally largest sigma^2 per parameter come first; energies are absolute, so that a layer that barely changed gets little,
    whatever the shape of its spectrum. What the next value in order no longer fits into goes to smaller ones that do.

    **Arguments:** `parameters`: >= what `min_rank` costs. `min_rank`: of every layer that changed. `max_rank`: None for no bound
    but the shape's.

    **Returns:** layer -> rank, in the order of `spectra`; 0 where none is worth it.

    **Raises:** `ValueError`: a budget below the minimum, with what that is.
    """
    alive = {name: s for name, s in spectra.items() if s.total > 0}
    caps = {name: min(len(s.sigma), max_rank or len(s.sigma)) for name, s in alive.items()}
    ranks = dict.fromkeys(spectra, 0) | {name: min(min_rank, caps[name]) for name in alive}
    left = parameters - sum(rank * sum(spectra[name].shape) for name, rank in ranks.items())
    if parameters < 1 or left < 0:
        raise ValueError(
            f"`parameters` must be at least {max(1, parameters - left)} for `min_rank` {min_rank}, got {parameters}."
        )
    steps = [
        (-(float(sigma) ** 2) / sum(s.shape), name, index, sum(s.shape))
        for name, s in alive.items()
        for index, sigma in enumerate(s.sigma[: caps[name]].tolist())
        if index >= ranks[name]
    ]
    closed: set[str] = set()
    for _, name, index, cost in sorted(steps):
        if name in closed or cost > left:
            closed.add(name)  # a later value of a layer counts only on top of the earlier ones
            continue
        ranks[name], left = index + 1, left - cost
    return ranks


def uniform_ranks(shapes: Mapping[str, tuple[int, int]], parameters: int) -> dict[str, int]:
    """One rank for all layers, the largest within a number of adapter parameters; what is left goes to the first layers."""
    rank = parameters // sum(map(sum, shapes.values()))
    return _filled(dict.fromkeys(shapes, rank), shapes, parameters, rank + 1)


def random_ranks(shapes: Mapping[str, tuple[int, int]], parameters: int, generator: torch.Generator) -> dict[str, int]:
    """Ranks at random within a number of adapter parameters, a control: the shares of the layers are uniform on the simplex."""
    draws = -torch.rand(len(shapes), generator=generator, dtype=torch.float64).log()
    shares = (draws / draws.sum()).tolist()
    ranks = {name: int(share * parameters / sum(shapes[name])) for name, share in zip(shapes, shares, strict=True)}
    return _filled(ranks, shapes, parameters)


def _filled(
    ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], parameters: int, max_rank: int | None = None
) -> dict[str, int]:
    """Ranks that the shapes allow; what is left of the parameters goes in turn to the layers that can take it."""
    caps = {name: min(max_rank or min(shape), *shape) for name, shape in shapes.items()}
    filled = {name: min(rank, caps[name]) for name, rank in ranks.items()}
    left = parameters - sum(rank * sum(shapes[name]) for name, rank in filled.items())
    takers = list(shapes)
    while takers := [name for name in takers if filled[name] < caps[name] and sum(shapes[name]) <= left]:
        for name in takers:
            if sum(shapes[name]) <= left:
                filled[name], left = filled[name] + 1, left - sum(shapes[name])
    return filled
