"""Handwritten digits, 8x8 pixels, bundled with scikit-learn: 1,797 real images, ten classes; a small ViT."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lowrank.io.hashing import hash_tensors
from lowrank.tasks.task import Task

TEST_SHARE = 0.25


def load(width: int = 64, depth: int = 3, heads: int = 4, patch: int = 2, dropout: float = 0.1) -> Task:
    """Load handwritten digits and a timm `VisionTransformer` with new weights.

    The split is fixed and stratified, with three quarters of the images to train on.

    **Arguments**

    - `width`: embedding size; default 64.
    - `depth`: blocks; default 3.
    - `heads`: attention heads, a divisor of `width`; default 4.
    - `patch`: pixels per patch side, a divisor of 8; default 2.
    - `dropout`: probability in [0, 1), the same for positions, projections, attention and whole paths; default 0.1.
    """
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    images, targets = _read_splits()
    options: dict[str, Any] = dict(
        img_size=8,
        patch_size=patch,
        in_chans=1,
        num_classes=10,
        global_pool="avg",
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        pos_drop_rate=dropout,
        proj_drop_rate=dropout,
        attn_drop_rate=dropout,
        drop_path_rate=dropout,
    )
    return Task(
        name="digits",
        splits={split: TensorDataset(images[split], targets[split]) for split in images},
        make_model=lambda: VisionTransformer(**options),
        objective="classification",
        metrics=("accuracy",),
        base={"timm": "VisionTransformer", "options": options},
        fingerprints={"data": hash_tensors({"images": images["train"], "held_out": images["validation"]})},
    )


def _read_splits() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return split -> images `(samples, 1, 8, 8)` and split -> classes `(samples,)`."""
    from sklearn.datasets import load_digits  # noqa: PLC0415
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0  # pyright: ignore
    targets = torch.tensor(bunch.target)  # pyright: ignore
    images = (images - 0.3) / 0.38  # about zero mean and unit variance
    train, validation = train_test_split(range(len(targets)), test_size=TEST_SHARE, stratify=targets, random_state=0)
    positions = {"train": train, "validation": validation}
    return {s: images[rows] for s, rows in positions.items()}, {s: targets[rows] for s, rows in positions.items()}
