"""CIFAR-10 and a mini ViT, as in the OIALR seed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank.io.hub import load_splits
from lowrank.tasks.images import Images
from lowrank.tasks.task import Task

MEAN, SPREAD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images, per channel


def load(
    data: str = "uoft-cs/cifar10",
    width: int = 192,
    depth: int = 6,
    heads: int = 6,
    patch: int = 4,
    qkv_bias: bool = True,
    train_samples: int = 50000,
) -> Task:
    """Which of ten classes? 32x32 colour images; a timm `VisionTransformer` trained from scratch.

    **Arguments:** `data`: Hub name or folder. `width`, `depth`, `heads`, `patch`, `qkv_bias`: of the ViT. `train_samples`: the
    first so many training images (the data set is shuffled as published).
    """
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    source = load_splits(data)
    if not 1 <= train_samples <= len(source["train"]):
        raise ValueError(f"`train_samples` must be in [1, {len(source['train'])}], got {train_samples}.")
    mean, spread = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, SPREAD))

    def transform(image: object) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0
        return (pixels - mean) / spread

    options: dict[str, Any] = dict(
        img_size=32,
        patch_size=patch,
        num_classes=10,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        qkv_bias=qkv_bias,
    )

    parts = {"train": source["train"].select(range(train_samples)), "validation": source["test"]}
    return Task(
        name="cifar10",
        splits={name: Images(rows, transform) for name, rows in parts.items()},
        make_model=lambda: VisionTransformer(**options),
        objective="classification",
        metrics=("accuracy",),
        identity={
            "task": "cifar10",
            "data": {split: source[split]._fingerprint for split in ("train", "test")},
            "train_samples": train_samples,
            "model": {"width": width, "depth": depth, "heads": heads, "patch": patch, "qkv_bias": qkv_bias},
        },
        base={"timm": "VisionTransformer", "options": options},
    )
