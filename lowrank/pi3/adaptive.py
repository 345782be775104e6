"""The rank of every layer by the input: images with little in them get less of the same nested factors.

A model is factored once; the leading rows and columns of its factors are the factors at a smaller rank, so that a slice of the
stored tensors is all that changes from one input to the next.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from lowrank.nn.low_rank import LowRankLinear
from lowrank.nn.targets import find_linears

GRAY = (0.2989, 0.5870, 0.1140)
BINS = 256
PERCENTILES, QUANTILES = (0.05, 0.95), (0.25, 0.75)
STEPS = (0.3, 0.2, 0.1)  # below the keep at which the model is factored, for low, middle and high scores


def image_entropy(images: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy, in bits, of the histogram of 256 levels of gray; images in [0, 1].

    0 for an image of one level; at most log2 255, since the weights of the published gray add up to .9999 and white falls on 254.

    **Raises:** `ValueError`: values outside [0, 1], NaN.
    """
    low, high = (float(value) for value in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`images` must be in [0, 1] and without NaN, got values from {low} to {high}.")
    gray = torch.einsum("...chw,c->...hw", images, images.new_tensor(GRAY)).clamp(0, 1)
    levels = (255 * gray).long().flatten(-2)
    counts = torch.zeros(*levels.shape[:-1], BINS, device=levels.device)
    shares = counts.scatter_add_(-1, levels, torch.ones_like(levels, dtype=counts.dtype)) / levels.shape[-1]
    return torch.special.entr(shares).sum(-1) / torch.log(torch.tensor(2.0))


@dataclass(frozen=True)
class EntropyScale:
    """Where scores lie: entropies are stretched from their percentiles 5 and 95 to [0, 1] and cut at the ends; `low` and `high`
    are the quartiles of that."""

    least: float
    most: float
    low: float
    high: float

    @classmethod
    def of(cls, entropies: Float[Tensor, " images"]) -> "EntropyScale":
        """The scale of calibration images.

        **Raises:** `ValueError`: entropies that do not differ.
        """
        values = entropies.double()
        least, most = (float(values.quantile(share)) for share in PERCENTILES)
        if not most > least:
            raise ValueError(f"`entropies` must differ, got percentiles {least} and {most}.")
        scores = ((values - least) / (most - least)).clamp(0, 1)
        return cls(least, most, *(float(scores.quantile(share)) for share in QUANTILES))

    def regime(self, entropies: Float[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """0 below the lower quartile, 2 from the upper one on, 1 between."""
        scores = ((entropies.double() - self.least) / (self.most - self.least)).clamp(0, 1)
        return (scores >= self.low).long() + (scores >= self.high).long()


def sliced_ranks(model: nn.Module, keep: float | int, base: float | int) -> dict[str, int]:
    """layer -> round(rank * keep / base), at least 1, of every layer of two factors.

    **Raises:** `ValueError`: `keep` not in (0, base]; a model without such layers.
    """
    if not 0 < keep <= base:
        raise ValueError(f"`keep` must be in (0, {base}], the share that the model is factored at, got {keep}.")
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    if not found:
        raise ValueError(
            "`model` must have layers of two factors, as lowrank.compression.compress.compress makes them, got none."
        )
    return {name: max(1, round(layer.rank * keep / base)) for name, layer in found.items()}


def sliced(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """The leading part of each layer's factors, as views of them: for `torch.func.functional_call`."""
    tensors = dict(model.named_parameters())
    return {
        key: value
        for name, rank in ranks.items()
        for key, value in (
            (f"{name}.right.weight", tensors[f"{name}.right.weight"][:rank]),
            (f"{name}.left.weight", tensors[f"{name}.left.weight"][:, :rank]),
        )
    }


class AdaptiveRank(nn.Module):
    """A compressed π³ whose ranks depend on the scene: by the mean entropy of its views, one of three slices of its factors.

    What is stored is the model at `base`; what is computed is less. `spent` says what: how many scenes went to each regime.

    **Arguments:** `model`: from `compress` with storage 'factors', whose terms are ordered. `base`: the share it was factored
    at, above .3. `scale`: from the entropies of calibration images.

    **Raises:** `ValueError`: a base that leaves nothing for the lowest regime.

    **Reference:** the published regimes base - .3, - .2, - .1 of SVD^3, with raw images in calibration and use.
    """

    def __init__(self, model: nn.Module, base: float | int, scale: EntropyScale) -> None:
        super().__init__()
        if not STEPS[0] < base <= 1:
            raise ValueError(f"`base` must be in ({STEPS[0]}, 1], got {base}.")
        self.model, self.base, self.scale = model, base, scale
        self.ranks = [sliced_ranks(model, base - step, base) for step in STEPS]
        self.spent = [0] * len(STEPS)

    def forward(self, images: Float[Tensor, "scenes views 3 height width"]) -> dict[str, Tensor]:
        regimes = self.scale.regime(image_entropy(images).mean(1)).tolist()
        parts: dict[int, dict[str, Tensor]] = {}
        for regime in sorted(set(regimes)):
            own = [scene for scene, other in enumerate(regimes) if other == regime]
            self.spent[regime] += len(own)
            found = self.at(regime, images[own])
            parts |= {scene: {name: value[i] for name, value in found.items()} for i, scene in enumerate(own)}
        return {name: torch.stack([parts[scene][name] for scene in range(len(images))]) for name in parts[0]}

    def at(self, regime: int, images: Tensor) -> dict[str, Tensor]:
        """Outputs with the slice of one regime, whatever the images are."""
        return functional_call(self.model, sliced(self.model, self.ranks[regime]), (images,))

    def saved(self, dense: nn.Module, regime: int) -> dict[str, int]:
        """layer -> parameters of the dense model's weight that a regime does not multiply by, for `pi3_macs`."""
        ranks = self.ranks[regime]
        shapes = {name: layer.weight.shape for name, layer in find_linears(dense, list(ranks)).items()}
        return {name: m * n - ranks[name] * (m + n) for name, (m, n) in shapes.items()}

    def realised(self, macs: Iterable[float | int]) -> dict[str, Any]:
        """What the scenes so far have cost on average.

        **Arguments:** `macs`: of a scene in each regime.

        **Returns:** `keep_stored`, at which the model is stored; `keep_computed`, the mean of the regimes' shares; `macs`, the
        mean; `scenes` of each regime.
        """
        total = max(1, sum(self.spent))
        shares = [self.base - step for step in STEPS]
        mean = lambda values: sum(n * v for n, v in zip(self.spent, values, strict=True)) / total  # noqa: E731
        return {
            "keep_stored": self.base,
            "keep_computed": mean(shares),
            "macs": mean(macs),
            "scenes": list(self.spent),
        }


class InOrder(nn.Module):
    """The slices of an `AdaptiveRank` in an order of one's own, one for each scene: a control of what its order is worth."""

    def __init__(self, adaptive: AdaptiveRank, regimes: Iterable[int]) -> None:
        super().__init__()
        self.adaptive, self.regimes = adaptive, iter(list(regimes))

    def forward(self, images: Float[Tensor, "scenes views 3 height width"]) -> dict[str, Tensor]:
        own = list(islice(self.regimes, len(images)))
        if len(own) < len(images):
            raise ValueError(f"`regimes` must be one for each scene, got none for the last {len(images) - len(own)}.")
        found = [self.adaptive.at(regime, scene[None]) for regime, scene in zip(own, images, strict=True)]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}
