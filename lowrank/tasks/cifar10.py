"""CIFAR-10 and a mini ViT."""

from functools import partial
from typing import Any

from lowrank.io.checks import require
from lowrank.io.hub import load_splits
from lowrank.tasks.images import Images, normalise
from lowrank.tasks.task import Task

# Of the training images, per channel.
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

PUBLISHED, VALIDATION_SAMPLES = 50_000, 5_000  # training images, and the last of them, which choose


def load(
    data: str = "uoft-cs/cifar10",
    width: int = 192,
    depth: int = 6,
    heads: int = 6,
    patch: int = 4,
    qkv_bias: bool = True,
    train_samples: int = PUBLISHED - VALIDATION_SAMPLES,
) -> Task:
    """Load CIFAR-10, 32x32 colour images in ten classes, and a timm `VisionTransformer` with new weights.

    'validation' is the last 5,000 published training images, whose order is shuffled; 'test' is the published test split.

    **Arguments**

    - `data`: Hub name or folder; default 'uoft-cs/cifar10'.
    - `width`: embedding size; default 192.
    - `depth`: blocks; default 6.
    - `heads`: attention heads, a divisor of `width`; default 6.
    - `patch`: pixels per patch side, a divisor of 32; default 4.
    - `qkv_bias`: whether queries, keys and values have a bias; default True.
    - `train_samples`: the first training images to use, in [1, 45000]; default 45000.
    """
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    rows = split_rows(load_splits(data), train_samples)
    options: dict[str, Any] = dict(
        img_size=32,
        patch_size=patch,
        num_classes=10,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        qkv_bias=qkv_bias,
    )
    return Task(
        name="cifar10",
        splits={
            split: Images(part, partial(normalise, mean=MEAN, deviation=DEVIATION)) for split, part in rows.items()
        },
        make_model=lambda: VisionTransformer(**options),
        objective="classification",
        metrics=("accuracy",),
        base={"timm": "VisionTransformer", "options": options},
        fingerprints={"data": {split: part._fingerprint for split, part in rows.items()}},
    )


def split_rows(source: Any, train_samples: int | None = None, evaluation_samples: int | None = None) -> dict[str, Any]:
    """Return split -> rows: of the published training images the last 5,000, whose order is shuffled, are 'validation'.

    **Arguments**

    - `source`: the published splits.
    - `train_samples`: how many of the first training images to keep. Default None, all that are left.
    - `evaluation_samples`: how many of the first images of 'validation' and of 'test' to keep. Default None, all.

    **Raises**

    - `ValueError`: a number that is not in [1, images of the split].
    """
    size = len(source["train"]) - VALIDATION_SAMPLES
    kept = size if train_samples is None else train_samples
    require(1 <= kept <= size, "train_samples", f"be in [1, {size}]", kept)
    rows = {"validation": source["train"].select(range(size, len(source["train"]))), "test": source["test"]}
    if evaluation_samples is not None:
        least = min(map(len, rows.values()))
        require(1 <= evaluation_samples <= least, "evaluation_samples", f"be in [1, {least}]", evaluation_samples)
        rows = {split: part.select(range(evaluation_samples)) for split, part in rows.items()}
    return {"train": source["train"].select(range(kept)), **rows}
