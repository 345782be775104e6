"""Say how a model is compressed: method, storage, centring and the rule for ranks."""

from dataclasses import dataclass
from pathlib import Path

from lowrank.factorization.methods import METHODS
from lowrank.factorization.storages import STORAGES
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require

ALLOCATIONS = ("uniform", "relative", "spectrum", "measured", "depth", "first_dense", "linear")


@check_arguments
@dataclass(frozen=True)
class Retargeting:
    """Describe how layers are aimed at the outputs of the dense model, see `retarget_layers`.

    **Arguments**

    - `ridges`: relative to the mean square of the inputs, > 0; one is chosen on held-out tokens. Default 1e-4 to 1e-1.
    - `blends`: shares of the least-squares solution in the target, in [0, 1]; one is chosen with the ridge. 0 is the dense
      weight. Default 0, .5 and 1.
    - `held_out`: share of the tokens of each batch, its last ones, that ridge and blend are chosen on, in (0, 1). All tokens
      count for the solution with the chosen ones. Default .2.
    - `residual`: whether layers that add their output to hidden states repair those too. Default True.
    - `folder`: keeps each block that is done, so that a run that was stopped goes on with the next. Default None.

    **Raises**

    - `ValueError`: a value out of its range.
    """

    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    blends: tuple[float, ...] = (0.0, 0.5, 1.0)
    held_out: float = 0.2
    residual: bool = True
    folder: Path | str | None = None

    def __post_init__(self) -> None:
        positive = len(self.ridges) > 0 and all(0 < ridge < float("inf") for ridge in self.ridges)
        require(positive, "ridges", "be finite, > 0 and at least one", self.ridges)
        shares = len(self.blends) > 0 and all(0 <= blend <= 1 for blend in self.blends)
        require(shares, "blends", "be in [0, 1] and at least one", self.blends)
        require(0 < self.held_out < 1, "held_out", "be in (0, 1)", self.held_out)


@check_arguments
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
    - `retarget`: aim each layer at the outputs of the dense model, given the inputs that the layers in front leave it. True
      stands for `Retargeting()`, False for None. Default None: each layer stands for itself.

    **Raises**

    - `ValueError`: an unknown method, storage or allocation; a multiple below 1; a `retarget` of another kind.
    """

    method: str = "whitened"
    storage: str = "factors"
    centre: bool = False
    allocation: str = "uniform"
    multiple: int = 1
    retarget: Retargeting | bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.retarget, bool):
            object.__setattr__(self, "retarget", Retargeting() if self.retarget else None)
        for name, known in (("method", METHODS), ("storage", STORAGES), ("allocation", ALLOCATIONS)):
            require(getattr(self, name) in known, name, f"be one of {list(known)}", getattr(self, name))
        require(self.multiple >= 1, "multiple", "be at least 1", self.multiple)
