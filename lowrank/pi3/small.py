"""The small π³ of the embedded report: its sizes, and how `python -m lowrank.pi3.pretrain` trains it on rendered scenes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.pi3.loss import geometry_loss
from lowrank.pi3.model import Pi3, Pi3Config
from lowrank.pi3.scenes import render_scene
from lowrank.training.loop import Recipe

SIDE, MOST_VIEWS = 64, 6
FIRST_SEED = 10**6  # of the scenes to train on; smaller seeds are for calibration and evaluation
SMALL = Pi3Config(
    patch_size=8,
    encoder_dim=96,
    encoder_depth=2,
    encoder_heads=4,
    encoder_registers=2,
    pos_grid=SIDE // 8,
    decoder_dim=96,
    decoder_depth=8,
    decoder_heads=4,
    head_dim=96,
    head_depth=1,
    head_heads=4,
    point_out=96,
    camera_out=48,
)
RECIPE = Recipe(steps=4500, batch_size=32, learning_rate=1.5e-3, weight_decay=0.01, warmup=0.05)


def fresh_small_pi3(seed: int) -> Pi3:
    """The small π³ before its training. The scales in its decoder start at 1: from .01 on, as in the large one, so short a
    training leaves the decoder with little to do."""
    torch.manual_seed(seed)
    model = Pi3(SMALL)
    with torch.no_grad():
        for name, scale in model.decoder.named_parameters():
            if name.endswith("gamma"):
                scale.fill_(1.0)
    return model


def scene_batch(first: int, scenes: int, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, local points and poses of the scenes of seeds `first` and up, `views` of each."""
    shots = [render_scene(first + scene, views, SIDE, SIDE) for scene in range(scenes)]
    images, points, poses = (
        torch.stack([getattr(shot, part) for shot in shots]) for part in ("images", "local_points", "poses")
    )
    return images, points, poses


def training_batches(done: int, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """New scenes in every step: as many views in all as the recipe's batch, of scenes of one to `MOST_VIEWS` views each."""
    for step in range(done, recipe.steps):
        views = int(np.random.default_rng([recipe.seed, step]).integers(1, MOST_VIEWS + 1))
        yield scene_batch(FIRST_SEED + step * recipe.batch_size, max(1, recipe.batch_size // views), views)


def scene_loss(model: nn.Module, batch: Any) -> Tensor:
    """`geometry_loss` of a batch (images, local points, poses)."""
    images, points, poses = batch
    return geometry_loss(model(images), points, poses)
