"""Rules that choose the ranks of all layers within a budget: each is a function, and `RULES` names them all.

A rule asks an `Allocator` for what it needs. `compress` and the sweeps of the report use the same rules.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from lowrank.compression.allocator import Allocator
from lowrank.compression.configuration import Configuration
from lowrank.compression.depth import block_positions, depth_weights, spectrum_for_share
from lowrank.io.checks import require
from lowrank.nn.batches import Batch, count_samples

HELD_OUT = 32  # calibration samples on which a rule measures
# (alpha, gamma) of 'depth'. The first is 'spectrum'.
DEPTH_TERMS = ((0.0, 0.0), *((alpha, gamma) for alpha in (0.0, 1.0, 3.0) for gamma in (0.5, 2.0, 7.0)))
# Of 'linear': the first block keeps 1 + this times the mean share, the last 1 - this times. The first is 'uniform'.
STEEPNESS = (0.0, -0.25, 0.25, 0.5, 0.75)


class Rule(NamedTuple):
    """Describe a rule for ranks.

    **Arguments**

    - `choose`: (allocator, configuration, keep) -> ranks.
    - `methods`: keys of `METHODS` whose spectra it asks for.
    - `measures`: whether it measures compressed copies of the model on batches held out.
    """

    choose: Callable[[Allocator, Configuration, float], dict[str, int]]
    methods: tuple[str, ...] = ()
    measures: bool = False


def choose_ranks(allocator: Allocator, configuration: Configuration, keep: float | int) -> dict[str, int]:
    """Choose the rank of every layer within a budget, by the rule that the configuration names.

    **Arguments**

    - `allocator`: of the dense model.
    - `configuration`: how to compress; its allocation names the rule.
    - `keep`: share of the targeted parameters to keep, in (0, 1].

    **Returns** layer name -> rank.

    **Raises**

    - `ValueError`: as for `allocate_ranks`; no probes for a rule that measures; layers outside numbered blocks for a rule that
      follows depth.
    """
    rule = RULES[configuration.allocation]
    text = f"hold batches for allocation {configuration.allocation!r}, which measures"
    require(len(allocator.probes) > 0 or not rule.measures, "probes", text, list(allocator.probes))
    return rule.choose(allocator, configuration, keep)


def hold_out(batches: Iterable[Batch], samples: int = HELD_OUT) -> tuple[list[Batch], Iterator[Batch]]:
    """Hold the first batches out for the rules that measure.

    **Arguments**

    - `batches`: batches, see `lowrank.nn.batches`.
    - `samples`: at least so many are held out, in whole batches. Default 32.

    **Returns** the batches held out, and an iterator over the others.

    **Raises**

    - `ValueError`: nothing is left.
    """
    rest, held, count = iter(batches), [], 0
    while count < samples and (batch := next(rest, None)) is not None:
        held.append(batch)
        count += count_samples(batch)
    following = next(rest, None)
    text = f"hold more than the first {samples} samples, which are held out to choose ranks, in a batch of their own"
    require(following is not None, "batches", text, f"{count} in {len(held)} batches")
    return held, chain([] if following is None else [following], rest)


def _uniform(allocator: Allocator, configuration: Configuration, keep: float) -> dict[str, int]:
    return allocator.spend(configuration, keep)


def _relative(allocator: Allocator, configuration: Configuration, keep: float) -> dict[str, int]:
    spectra = allocator.spectra("whitened")
    weights = {name: 1 / sigma.square().sum().item() for name, sigma in spectra.items()}
    return allocator.spend(configuration, keep, spectra=spectra, weights=weights)


def _spectrum(allocator: Allocator, configuration: Configuration, keep: float) -> dict[str, int]:
    return allocator.spend(configuration, keep, spectra=allocator.spectra("two_sided", configuration.centre))


def _measured(allocator: Allocator, configuration: Configuration, keep: float) -> dict[str, int]:
    spectra = allocator.spectra("two_sided", configuration.centre)
    return allocator.spend(configuration, keep, spectra=spectra, weights=allocator.scales)


def _depth(allocator: Allocator, configuration: Configuration, keep: float) -> dict[str, int]:
    spectra, positions = allocator.spectra("two_sided", configuration.centre), block_positions(allocator.shapes)
    candidates = []
    for alpha, gamma in DEPTH_TERMS:
        by_block = depth_weights(max(positions.values()) + 1, alpha, gamma).tolist()
        weights = {name: by_block[position] for name, position in positions.items()}
        ranks = allocator.spend(configuration, keep, spectra=spectra, weights=weights)
        candidates.append(({"alpha": alpha, "gamma": gamma}, ranks))
    return allocator.best(configuration, keep, candidates)


def _first_dense(allocator: Allocator, configuration: Configuration, keep: float) -> dict[str, int]:
    first = [name for name, position in block_positions(allocator.shapes).items() if position == 0]
    return allocator.spend(configuration, keep, dense=first)


def _linear(allocator: Allocator, configuration: Configuration, keep: float) -> dict[str, int]:
    positions = block_positions(allocator.shapes)
    last = max(*positions.values(), 1)
    candidates = []
    for steepness in STEEPNESS:
        targets = {  # from 1 + 2 keep steepness down to 1, or up from 1 as far
            name: 1 + keep * (abs(steepness) + steepness * (1 - 2 * position / last))
            for name, position in positions.items()
        }
        spectra = {
            name: spectrum_for_share(shape, configuration.storage, targets[name])
            for name, shape in allocator.shapes.items()
        }
        candidates.append(({"steepness": steepness}, allocator.spend(configuration, keep, spectra=spectra)))
    return allocator.best(configuration, keep, candidates)


RULES = {
    "uniform": Rule(_uniform),
    "relative": Rule(_relative, methods=("whitened",)),
    "spectrum": Rule(_spectrum, methods=("two_sided",)),
    "measured": Rule(_measured, methods=("two_sided",), measures=True),
    "depth": Rule(_depth, methods=("two_sided",), measures=True),
    "first_dense": Rule(_first_dense),
    "linear": Rule(_linear, measures=True),
}
