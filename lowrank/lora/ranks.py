"""Choose LoRA ranks from the spectra of weight changes: an energy threshold, rounding, smoothing, a budget."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import inf

import torch
from torch import Tensor

from lowrank.io.checks import require, whole_number
from lowrank.lora.deltas import DeltaSpectrum

MIN_RANK, MAX_RANK = 4, 128  # the published bounds
_TIE = 1e-12  # relative; so that rounding errors of sums decide nothing


def _check_bounds(min_rank: int, max_rank: int) -> tuple[int, int]:
    """Return the bounds of a rank as whole numbers in order."""
    require(1 <= min_rank <= max_rank, "min_rank", f"be in [1, `max_rank`] for `max_rank` {max_rank}", min_rank)
    return whole_number(min_rank, "min_rank"), whole_number(max_rank, "max_rank")


def _check_budget(parameters: float | int, least: int) -> int:
    """Return the budget rounded down."""
    require(parameters >= least, "parameters", f"be >= {least}", parameters)
    require(parameters < inf, "parameters", "be finite", parameters)
    return int(parameters)


def rank_for_delta(
    singular_values: Tensor | Sequence[float],
    threshold: float | int,
    min_rank: int = MIN_RANK,
    max_rank: int = MAX_RANK,
) -> int:
    """Return the smallest rank whose share of ||Delta||_F^2 reaches a threshold, within bounds.

    **Arguments**

    - `singular_values`: all of Delta, `(k,)`, k >= 1, >= 0, in any order.
    - `threshold`: in (0, 1]. 1 asks for the numerical rank: the number of values above k eps sigma_1, eps of float32.
    - `min_rank`, `max_rank`: bounds of the rank, 1 <= min_rank <= max_rank.

    **Returns** a rank in [min_rank, max_rank], at most k; 0 if Delta is zero.

    **Raises**

    - `ValueError`: a number out of its range; singular values that are negative or not finite.
    """
    values = torch.as_tensor(singular_values).double().flatten().sort(descending=True).values
    require(0 < threshold <= 1, "threshold", "be in (0, 1]", threshold)
    min_rank, max_rank = _check_bounds(min_rank, max_rank)
    if not len(values) or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("`singular_values` must be finite and >= 0, at least one.")
    largest = float(values[0])
    if largest == 0:
        return 0
    if threshold == 1:
        rank = int((values > len(values) * torch.finfo(torch.float32).eps * largest).sum())
    else:
        energy = (values / largest).square().cumsum(0)  # divided first: tiny values must not vanish when squared
        rank = int((energy < threshold * float(energy[-1]) * (1 - _TIE)).sum()) + 1
    return min(max(min_rank, min(rank, max_rank)), len(values))


def nearest_power_of_two(rank: int, min_rank: int = MIN_RANK, max_rank: int = MAX_RANK) -> int:
    """Round a rank above 16 to the nearest power of two on a log scale, within bounds.

    The result may be below the rank that a threshold asks for.

    **Arguments**

    - `rank`: int >= 0; ranks of at most 16 are not rounded, and 0 stays 0.
    - `min_rank`, `max_rank`: bounds of the result, 1 <= min_rank <= max_rank.

    **Raises**

    - `ValueError`: a number out of its range.
    """
    rank, (min_rank, max_rank) = whole_number(rank, "rank", 0), _check_bounds(min_rank, max_rank)
    rounded = 2 ** round(torch.tensor(float(rank), dtype=torch.float64).log2().item()) if rank > 16 else rank
    return max(min_rank, min(rounded, max_rank)) if rank else 0


def layer_type(name: str) -> str:
    """Return the last part of a module's name: `model.layers.3.mlp.up_proj` -> `up_proj`."""
    return name.rpartition(".")[2]


def smooth_ranks(ranks: Mapping[str, int], groups: Mapping[str, str], factor: float | int) -> dict[str, int]:
    """Move ranks towards the mean of their group: int(factor * mean + (1 - factor) * rank).

    If all ranks are within bounds, so are the smoothed ones. Ranks of 0 (nothing changed) stay 0 and count in no mean.

    **Arguments**

    - `ranks`: module -> rank, int >= 0.
    - `groups`: module -> group, for example its `layer_type`.
    - `factor`: in [0, 1]. 0 changes nothing, 1 gives equal ranks in a group.

    **Returns** module -> smoothed rank, in the order of `ranks`.

    **Raises**

    - `ValueError`: a factor or a rank out of its range; a module without a group.
    """
    require(0 <= factor <= 1, "factor", "be in [0, 1]", factor)
    if missing := sorted(ranks.keys() - groups.keys()):
        raise ValueError(f"`groups` must name a group for every layer, got none for {missing[0]!r}.")
    ranks = {name: whole_number(rank, f"ranks[{name!r}]", 0) for name, rank in ranks.items()}
    members: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        if rank:
            members.setdefault(groups[name], []).append(rank)
    means = {group: Fraction(sum(others), len(others)) for group, others in members.items()}
    share = Fraction(str(factor))  # the decimal as written, so that 0.8 * 36 + 0.2 * 4 is not rounded below an integer
    return {name: int(share * means[groups[name]] + (1 - share) * rank) if rank else 0 for name, rank in ranks.items()}


def ranks_for_budget(
    spectra: Mapping[str, DeltaSpectrum], parameters: int, *, max_rank: int | None = None
) -> dict[str, int]:
    """Choose the ranks that keep the most energy, sum sigma^2 over all layers, within a budget of adapter parameters.

    A rank of a layer costs out + in parameters. The largest sigma^2 per parameter of all layers come first. If the next one does
    not fit the remaining budget, cheaper ones are tried. Energies are absolute, so that a layer that hardly changes gets
    little, whatever the shape of its spectrum.

    **Arguments**

    - `spectra`: layer -> spectrum of its change.
    - `parameters`: the budget, >= 1.
    - `max_rank`: largest rank of a layer, >= 1; None for min(out, in).

    **Returns** layer -> rank, in the order of `spectra`; 0 for a layer without a value worth its cost.

    **Raises**

    - `ValueError`: a budget or a largest rank below 1.
    """
    parameters = _check_budget(parameters, 1)
    max_rank = None if max_rank is None else whole_number(max_rank, "max_rank")
    alive = {name: spectrum for name, spectrum in spectra.items() if spectrum.total > 0}
    steps = [
        (-(float(sigma) ** 2) / sum(spectrum.shape), name, index, sum(spectrum.shape))
        for name, spectrum in alive.items()
        for index, sigma in enumerate(spectrum.sigma[:max_rank].tolist())
    ]
    ranks, left = dict.fromkeys(spectra, 0), parameters
    closed: set[str] = set()
    for _, name, index, cost in sorted(steps):
        if name in closed or cost > left:
            closed.add(name)  # a later value of a layer counts only on top of the earlier ones
            continue
        ranks[name], left = index + 1, left - cost
    return ranks


def uniform_ranks(shapes: Mapping[str, tuple[int, int]], parameters: int) -> dict[str, int]:
    """Give all layers one rank, the largest within a budget; the first layers get one more from the rest.

    **Arguments**

    - `shapes`: layer -> (out, in).
    - `parameters`: the budget of adapter parameters, r (out + in) for each layer; >= 0.

    **Returns** layer -> rank in [0, min(out, in)].

    **Raises**

    - `ValueError`: a shape that is none; a budget below 0.
    """
    shapes, parameters = _check_shapes(shapes), _check_budget(parameters, 0)
    rank = parameters // max(1, sum(map(sum, shapes.values())))
    return _spend_rest(dict.fromkeys(shapes, rank), shapes, parameters, rank + 1)


def random_ranks(shapes: Mapping[str, tuple[int, int]], parameters: int, generator: torch.Generator) -> dict[str, int]:
    """Draw random ranks within a budget, as a control: the shares of the layers are uniform on the simplex.

    **Arguments**

    - `shapes`: layer -> (out, in).
    - `parameters`: the budget of adapter parameters, r (out + in) for each layer; >= 0.
    - `generator`: source of the random numbers, on the CPU.

    **Returns** layer -> rank in [0, min(out, in)].

    **Raises**

    - `ValueError`: a shape that is none; a budget below 0.
    """
    shapes, parameters = _check_shapes(shapes), _check_budget(parameters, 0)
    exponentials = -torch.rand(len(shapes), generator=generator, dtype=torch.float64).log()
    shares = (exponentials / exponentials.sum()).tolist()
    ranks = {name: int(share * parameters / sum(shapes[name])) for name, share in zip(shapes, shares, strict=True)}
    return _spend_rest(ranks, shapes, parameters)


def _check_shapes(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return the shapes in Python integers, whose sums do not overflow."""
    return {
        name: (whole_number(out, f"shapes[{name!r}]"), whole_number(inputs, f"shapes[{name!r}]"))
        for name, (out, inputs) in shapes.items()
    }


def _spend_rest(
    ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], parameters: int, max_rank: int | None = None
) -> dict[str, int]:
    """Cut ranks to the shapes, then add ranks in turn to the layers that can take one within the budget."""
    caps = {name: min(max_rank or min(shape), *shape) for name, shape in shapes.items()}
    filled = {name: min(rank, caps[name]) for name, rank in ranks.items()}
    left = parameters - sum(rank * sum(shapes[name]) for name, rank in filled.items())
    takers = list(shapes)
    while takers := [name for name in takers if filled[name] < caps[name] and sum(shapes[name]) <= left]:
        for name in takers:
            if sum(shapes[name]) <= left:
                filled[name], left = filled[name] + 1, left - sum(shapes[name])
    return filled
