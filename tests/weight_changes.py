"""Changes of weights for tests: a model that is a mere dict of tensors, and the spectrum of one change."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank.lora.deltas import DeltaSpectrum, delta_spectra


def spectrum_of(delta: Tensor, weight: Tensor | None = None) -> DeltaSpectrum:
    base = {"blocks.0.weight": torch.zeros_like(delta) if weight is None else weight}
    tuned = {"blocks.0.weight": base["blocks.0.weight"] + delta}
    return delta_spectra(Tensors(base), Tensors(tuned), [".*"], progress=False)["blocks.0"]


class Tensors(nn.Module):
    """A model that is nothing but its state."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = state

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.state
