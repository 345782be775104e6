"""Handwritten digits, 8x8 pixels, bundled with scikit-learn: 1,797 real images, ten classes; a small ViT."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lowrank.io.hashing import hash_tensors
from lowrank.tasks.task import Task

HELD_OUT_SAMPLES = 450  # of validation, and as many of test


def load(width: int = 64, depth: int = 3, heads: int = 4, patch: int = 2, dropout: float = 0.1) -> Task:
    """Load handwritten digits and a timm `VisionTransformer` with new weights.

    The splits are fixed and stratified: 897 images train, 450 choose, 450 are the test. The test images are carved from those
    that trained before there was a test split: the validation images stay what they were, because choices were made on them.

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
        fingerprints={"data": hash_tensors(images, 16)},
    )


def _read_splits() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return split -> images `(samples, 1, 8, 8)` and split -> classes `(samples,)`."""
    from sklearn.datasets import load_digits  # noqa: PLC0415
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0  # pyright: ignore
    targets = torch.tensor(bunch.target)  # pyright: ignore
    images = (images - 0.3) / 0.38  # about zero mean and unit variance
    options: dict[str, Any] = dict(test_size=HELD_OUT_SAMPLES, random_state=0)
    rest, validation = train_test_split(range(len(targets)), stratify=targets, **options)
    train, test = train_test_split(rest, stratify=targets[rest], **options)
    positions = {"train": train, "validation": validation, "test": test}
    return {s: images[rows] for s, rows in positions.items()}, {s: targets[rows] for s, rows in positions.items()}
