"""Say how a model is compressed: method, storage, centring and the rule for ranks."""

from dataclasses import dataclass

from lowrank.factorization.methods import METHODS
from lowrank.factorization.storages import STORAGES
from lowrank.io.checks import require

ALLOCATIONS = ("uniform", "relative", "spectrum", "measured", "depth", "first_dense", "linear")


@dataclass(frozen=True)
class Configuration:
    """Describe how to compress a model.

    **Arguments**

    - `method`: the norm in which each weight is truncated, a key of `METHODS`.
    - `storage`: 'factors' or 'pivoted', see `STORAGES`.
    - `centre`: truncate in the norm of the centred inputs and let the bias restore the mean output; only layers with a bias.
    - `allocation`: what ranks are chosen by. 'uniform': every layer keeps the same share. 'relative': the share of its own
      one-sided energy that each layer discards. 'spectrum': the two-sided spectrum, which approximates the loss. 'measured':
      the same, with each layer scaled so that truncating it alone costs what was measured. 'depth': the same as 'spectrum', with
      the errors of early blocks raised as much as serves the whole model. 'first_dense': the first block stays dense, all other
      layers keep the same share. 'linear': the share follows a straight line over the blocks, whose slope serves the whole model.
    - `multiple`: int >= 1; every rank is a multiple of this, or the layer is stored dense. Default 1.

    **Raises**

    - `ValueError`: an unknown method, storage or allocation; a multiple below 1.
    """

    method: str = "whitened"
    storage: str = "factors"
    centre: bool = False
    allocation: str = "uniform"
    multiple: int = 1

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("storage", STORAGES), ("allocation", ALLOCATIONS)):
            require(getattr(self, name) in known, name, f"be one of {list(known)}", getattr(self, name))
        require(self.multiple >= 1, "multiple", "be at least 1", self.multiple)
