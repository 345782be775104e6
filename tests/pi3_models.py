"""Small π³ models with random weights that matter everywhere, and images for them."""

from typing import Any

import torch
from torch import Tensor

from lowrank.pi3.model import Pi3, Pi3Config

TINY = dict(
    patch_size=4, encoder_dim=32, encoder_depth=1, encoder_heads=2, encoder_registers=2, pos_grid=3, decoder_dim=32,
    decoder_depth=4, decoder_heads=2, decoder_registers=3, head_dim=24, head_depth=1, head_heads=2, point_out=16, camera_out=12,
)  # fmt: skip


def model(seed: int = 0, **changes: Any) -> Pi3:
    """Random weights that matter everywhere."""
    torch.manual_seed(seed)
    made = Pi3(Pi3Config(**TINY | changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
