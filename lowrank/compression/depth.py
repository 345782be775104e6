"""Where a layer stands in the depth of a model, and what that says about its share of the parameters."""

from collections.abc import Iterable

import numpy as np

from lowrank.factorization.rank_allocation import Shape
from lowrank.factorization.storages import STORAGES
from lowrank.io.checks import require
from lowrank.nn.targets import split_block


def block_positions(layers: Iterable[str]) -> dict[str, int]:
    """Return layer name -> position of its block among the blocks of all layers, from 0, in the order in which they come.

    **Arguments**

    - `layers`: names of layers, in the order of the model. Blocks are those of `lowrank.nn.targets.split_block`; the blocks of a
      decoder follow those of its encoder.

    **Raises**

    - `ValueError`: a layer outside numbered blocks.
    """
    blocks: dict[str, int] = {}
    positions = {}
    for name in layers:
        block, _ = split_block(name)
        if not block:
            raise ValueError(f"`layers` must be inside numbered blocks for ranks that follow depth, got {name!r}.")
        positions[name] = blocks.setdefault(block, len(blocks))
    return positions


def depth_weights(blocks: int, alpha: float, gamma: float) -> np.ndarray:
    """Compute how much the squared error of each block counts: 1 + gamma t_b / max t, with t_b = sum_{k=b}^{B-1} (k+1)^-alpha.

    An early error travels through all later blocks. The term is scaled so that the largest, that of the first block, is 1: the
    first block counts 1 + gamma times and all others less, the less the larger alpha is.

    **Arguments**

    - `blocks`: B, int >= 1.
    - `alpha`: >= 0; 0 makes the term fall along a straight line, from 1 to 1 / B.
    - `gamma`: >= 0; 0 makes all blocks count alike.

    **Returns** `(blocks,)`, float64, falling.

    **Raises**

    - `ValueError`: an argument out of range.

    **Reference** LEMS, https://github.com/lems-svd/lems; it says 'normalised', and dividing by the largest is ours.
    """
    require(blocks >= 1, "blocks", "be at least 1", blocks)
    for name, value in (("alpha", alpha), ("gamma", gamma)):
        require(0.0 <= value < float("inf"), name, "be finite and >= 0", value)
    later = (np.arange(1, blocks + 1) ** -float(alpha))[::-1].cumsum()[::-1]
    return 1 + gamma * later / later[0]


def spectrum_for_share(shape: Shape, storage: str, target: float) -> np.ndarray:
    """Make singular values with which `allocate_ranks` keeps shares that differ between layers as their targets do.

    What they discard at the share s is (target - s)^2 per parameter, up to a constant. The least sum over layers within a budget
    has target - s alike in all of them, wherever that lies between rank 1 and dense.

    **Arguments**

    - `shape`: (out, in).
    - `storage`: a key of `STORAGES`.
    - `target`: >= 1. Only differences between layers matter.

    **Returns** `(min(out, in),)`, float64, descending.
    """
    require(target >= 1.0, "target", "be at least 1", target)
    out, inputs = shape
    costs = STORAGES[storage].parameters(out, inputs, np.arange(min(shape) + 1))
    shares = np.minimum(costs / (out * inputs), 1.0)
    return np.sqrt(np.diff(-((target - shares) ** 2)) * out * inputs)
