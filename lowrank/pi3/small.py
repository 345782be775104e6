"""The small π³ of the embedded report: its sizes, and the rendered scenes that `python -m lowrank.pi3.pretrain` trains it on."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.pi3.loss import geometry_loss
from lowrank.pi3.model import Pi3, Pi3Config
from lowrank.pi3.scenes import SPLIT_SEEDS, render_scene
from lowrank.training.loop import Recipe

SIDE, MOST_VIEWS = 64, 6
SMALL_CONFIG = Pi3Config(
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
SMALL_RECIPE = Recipe(
    steps=4500, batch_size=32, learning_rate=1.5e-3, weight_decay=0.01, warmup=0.05, checkpoint_every=250
)


def build_small_pi3(seed: int) -> Pi3:
    """Build the small π³ with random weights.

    The scales in its decoder start at 1. If they started at 0.01, as in the large model, a training this short would leave the
    decoder with little effect.

    **Arguments**

    - `seed`: of the weights; it seeds torch.
    """
    torch.manual_seed(seed)
    model = Pi3(SMALL_CONFIG)
    with torch.no_grad():
        for name, scale in model.decoder.named_parameters():
            if name.endswith("gamma"):
                scale.fill_(1.0)
    return model


def scene_batch(first: int, scenes: int, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Render a batch of scenes.

    **Arguments**

    - `first`: seed of the first scene; the next has `first` + 1.
    - `scenes`: number of scenes.
    - `views`: views per scene.

    **Returns** images `(scenes, views, 3, SIDE, SIDE)`, local points `(scenes, views, SIDE, SIDE, 3)` and poses
    `(scenes, views, 4, 4)`, float32.
    """
    shots = [render_scene(first + scene, views, SIDE, SIDE) for scene in range(scenes)]
    images, points, poses = (
        torch.stack([getattr(shot, part) for shot in shots]) for part in ("images", "local_points", "poses")
    )
    return images, points, poses


def scene_batches(done: int, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Render the training batches of the steps that follow, with new scenes in every step.

    All scenes of a batch have the same number of views, 1 to `MOST_VIEWS` at random.

    **Arguments**

    - `done`: steps done before, >= 0.
    - `recipe`: its `batch_size` is the number of views of all scenes together, its `seed` decides the numbers of views.

    **Returns** an iterator over batches, see `scene_batch`.
    """
    first = SPLIT_SEEDS["pretraining"].start
    for step in range(done, recipe.steps):
        views = int(np.random.default_rng([recipe.seed, step]).integers(1, MOST_VIEWS + 1))
        yield scene_batch(first + step * recipe.batch_size, max(1, recipe.batch_size // views), views)


def scene_loss(model: nn.Module, batch: Any) -> Tensor:
    """Compute `geometry_loss` of a batch.

    **Arguments**

    - `model`: a π³.
    - `batch`: images, local points, poses, see `scene_batch`.
    """
    images, points, poses = batch
    return geometry_loss(model(images), points, poses)
