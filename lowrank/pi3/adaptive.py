"""Ranks that depend on the input: images with little content get smaller slices of the same nested factors.

A model is factored once. The first rows and columns of its factors are the factors at a smaller rank, so only slices of the
stored tensors change from one input to the next.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from lowrank.factorization.precision import with_float64
from lowrank.io.checks import require
from lowrank.nn.low_rank import LowRankLinear
from lowrank.nn.targets import find_linears

GRAY = (0.2989, 0.5870, 0.1140)
BINS = 256
STRETCH_QUANTILES, REGIME_QUANTILES = (0.05, 0.95), (0.25, 0.75)
KEEP_STEPS = (0.3, 0.2, 0.1)  # of low, middle and high entropy, below the share that the model is factored at


def image_entropy(images: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch"]:
    """Compute the Shannon entropy of the histogram of 256 levels of gray.

    **Arguments**

    - `images`: `(..., 3, H, W)`, in [0, 1].

    **Returns** `(...)`, bits: 0 for an image of one level, at most log2 255. The weights of the published gray add up to 0.9999,
    so white falls on level 254.

    **Raises**

    - `ValueError`: values outside [0, 1]; NaN.
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
    """Hold how entropies divide into three regimes.

    The score of an entropy is (entropy - `least`) / (`most` - `least`), clipped to [0, 1].

    **Arguments**

    - `least`, `most`: entropies with score 0 and 1, bits.
    - `low`: scores below belong to regime 0.
    - `high`: scores from here on belong to regime 2.
    """

    least: float
    most: float
    low: float
    high: float

    @classmethod
    def fit(cls, entropies: Float[Tensor, " images"]) -> "EntropyScale":
        """Fit the scale to calibration images: percentiles 5 and 95 of entropies, then quartiles of scores.

        **Arguments**

        - `entropies`: `(images,)`, bits, see `image_entropy`.

        **Raises**

        - `ValueError`: the percentiles are equal or NaN.
        """
        values = with_float64(entropies).double()
        least, most = (float(values.quantile(share)) for share in STRETCH_QUANTILES)
        if not most > least:
            raise ValueError(f"`entropies` must differ, got percentiles {least} and {most}.")
        scores = ((values - least) / (most - least)).clamp(0, 1)
        return cls(least, most, *(float(scores.quantile(share)) for share in REGIME_QUANTILES))

    def find_regimes(self, entropies: Float[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """Return the regime, 0, 1 or 2, of each entropy, `(...)`, in bits."""
        scores = ((with_float64(entropies).double() - self.least) / (self.most - self.least)).clamp(0, 1)
        return (scores >= self.low).long() + (scores >= self.high).long()


def slice_ranks(model: nn.Module, keep: float | int, base: float | int) -> dict[str, int]:
    """Compute the rank of each factored layer at a smaller share: round(rank * keep / base), at least 1.

    **Arguments**

    - `model`: has layers of two factors.
    - `keep`: the smaller share, in (0, `base`].
    - `base`: the share that the model is factored at.

    **Returns** layer -> rank.

    **Raises**

    - `ValueError`: `keep` out of its range; a model without layers of two factors.
    """
    require(0 < keep <= base, "keep", f"be in (0, {base}], the share that the model is factored at", keep)
    ranks = {name: layer.rank for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    if not ranks:
        raise ValueError("`model` must have layers of two factors, as lowrank.compress makes them, got none.")
    return {name: max(1, round(rank * keep / base)) for name, rank in ranks.items()}


def slice_factors(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Slice the factors of layers to smaller ranks.

    **Arguments**

    - `model`: has layers of two factors.
    - `ranks`: layer -> rank.

    **Returns** parameter -> view of it, for `torch.func.functional_call`.
    """
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
    """Run a compressed π³ at ranks that depend on the mean entropy of the views of each scene.

    The model is stored at the share `base`, and computes with one of three smaller slices of its factors. `regime_counts` says
    how many scenes went to each regime.

    **Arguments**

    - `model`: compressed with storage 'factors', whose terms are ordered.
    - `base`: the share that it is factored at, in (0.3, 1].
    - `scale`: fitted to the entropies of calibration images.

    **Raises**

    - `ValueError`: `base` out of its range; a model without layers of two factors.

    **Reference** the published regimes `base` - 0.3, - 0.2, - 0.1 of SVD^3, with raw images in calibration and use.
    """

    def __init__(self, model: nn.Module, base: float | int, scale: EntropyScale) -> None:
        super().__init__()
        require(KEEP_STEPS[0] < base <= 1, "base", f"be in ({KEEP_STEPS[0]}, 1]", base)
        self.model, self.base, self.scale = model, base, scale
        self.ranks = [slice_ranks(model, base - step, base) for step in KEEP_STEPS]
        self.regime_counts = [0] * len(KEEP_STEPS)

    def forward(self, images: Float[Tensor, "scenes views 3 height width"]) -> dict[str, Tensor]:
        """Compute the outputs of `Pi3` for images, `(scenes, views, 3, H, W)`, each scene in its regime."""
        regimes = self.scale.find_regimes(image_entropy(images).mean(1)).tolist()
        parts: dict[int, dict[str, Tensor]] = {}
        for regime in sorted(set(regimes)):
            scenes = [scene for scene, other in enumerate(regimes) if other == regime]
            self.regime_counts[regime] += len(scenes)
            outputs = self.run_regime(regime, images[scenes])
            parts |= {scene: {name: value[i] for name, value in outputs.items()} for i, scene in enumerate(scenes)}
        return {name: torch.stack([parts[scene][name] for scene in range(len(images))]) for name in parts[0]}

    def run_regime(self, regime: int, images: Tensor) -> dict[str, Tensor]:
        """Compute the outputs with the slices of one regime, whatever the entropy of the images is.

        **Arguments**

        - `regime`: 0, 1 or 2.
        - `images`: `(scenes, views, 3, H, W)`.
        """
        return functional_call(self.model, slice_factors(self.model, self.ranks[regime]), (images,))

    def count_saved(self, dense: nn.Module, regime: int) -> dict[str, int]:
        """Count the parameters of each dense weight that a regime does not multiply by, for `pi3_macs`.

        **Arguments**

        - `dense`: the model before compression.
        - `regime`: 0, 1 or 2.

        **Returns** layer -> parameters.
        """
        ranks = self.ranks[regime]
        shapes = {name: layer.weight.shape for name, layer in find_linears(dense, list(ranks)).items()}
        return {name: m * n - ranks[name] * (m + n) for name, (m, n) in shapes.items()}

    def summarise_costs(self, macs: Iterable[float | int]) -> dict[str, Any]:
        """Compute the mean costs of the scenes so far.

        **Arguments**

        - `macs`: multiply-accumulates of one scene in each regime.

        **Returns** `keep_stored`, the share that the model is stored at; `keep_computed`, the mean share of the regimes; `macs`,
        the mean; `scenes`, the number of scenes in each regime. Means are 0 before the first scene.
        """
        total = max(1, sum(self.regime_counts))
        shares = [self.base - step for step in KEEP_STEPS]

        def mean(values: Iterable[float | int]) -> float:
            return sum(n * v for n, v in zip(self.regime_counts, values, strict=True)) / total

        return {
            "keep_stored": self.base,
            "keep_computed": mean(shares),
            "macs": mean(macs),
            "scenes": list(self.regime_counts),
        }


class FixedRegimes(nn.Module):
    """Run an `AdaptiveRank` with regimes that the caller chooses: a control for the choice by entropy.

    **Arguments**

    - `adaptive`: the model; its `regime_counts` do not change.
    - `regimes`: one regime, 0, 1 or 2, for each scene in the order of the passes.
    """

    def __init__(self, adaptive: AdaptiveRank, regimes: Iterable[int]) -> None:
        super().__init__()
        self.adaptive, self.regimes = adaptive, iter(list(regimes))

    def forward(self, images: Float[Tensor, "scenes views 3 height width"]) -> dict[str, Tensor]:
        """Compute the outputs of `Pi3` for images, `(scenes, views, 3, H, W)`, in the next regimes.

        **Raises**

        - `ValueError`: more scenes than regimes.
        """
        regimes = list(islice(self.regimes, len(images)))
        if len(regimes) < len(images):
            missing = len(images) - len(regimes)
            raise ValueError(f"`regimes` must be one for each scene, got none for the last {missing}.")
        outputs = [self.adaptive.run_regime(regime, scene[None]) for regime, scene in zip(regimes, images, strict=True)]
        return {name: torch.cat([part[name] for part in outputs]) for name in outputs[0]}
