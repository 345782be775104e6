"""ImageNet-1k, as a Hub data set or a folder of class folders, and any pretrained timm model."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.io.hashing import hash_options
from lowrank.io.hub import found, load_splits
from lowrank.nn.targets import BLOCKS
from lowrank.tasks.images import Images
from lowrank.tasks.task import Samples, Task


def load(
    model: str = "vit_base_patch16_224",
    data: str = "ILSVRC/imagenet-1k",
    layers: list[str] | tuple[str, ...] = (*BLOCKS, "head"),
    pretrained: bool = True,
) -> Task:
    """Which of the classes? Images go through the transform that timm names for the model.

    **Arguments:** `model`: any timm model with pretrained weights. `data`: a folder with `train/` and `val/` of class
    folders, or a Hub name. `layers`: targeted layers, by default those inside blocks and the head. `pretrained`: False for new
    weights, and training images that are cropped, flipped and coloured at random.
    """
    import timm  # noqa: PLC0415
    from timm.data.config import resolve_data_config  # noqa: PLC0415
    from timm.data.transforms_factory import create_transform  # noqa: PLC0415

    def make_model() -> nn.Module:
        return found("timm model", model, lambda: timm.create_model(model, pretrained=pretrained))

    settings = timm.get_pretrained_cfg(model)
    if settings is None:
        raise ValueError(
            f"`model` must be a timm model with pretrained weights, got {model!r}; see timm.list_pretrained()."
        )
    sizes = resolve_data_config(pretrained_cfg=settings.to_dict())
    transforms: dict[str, Any] = {
        "train": create_transform(**sizes, is_training=not pretrained),
        "validation": create_transform(**sizes),
    }
    if Path(data).exists():
        splits, content = _folders(Path(data), transforms)
    else:
        source = load_splits(data)
        splits = {name: Images(source[name], transform) for name, transform in transforms.items() if name in source}
        content = {split: source[split]._fingerprint for split in splits}
    return Task(
        name="imagenet",
        splits=splits,
        make_model=make_model,
        objective="classification",
        metrics=("accuracy",),
        identity={
            "task": "imagenet",
            "data": content,
            "model": model,
            "weights": (settings.hf_hub_id or settings.url) if pretrained else None,
        },
        layers=tuple(layers),
    )


def _folders(root: Path, transforms: dict[str, Any]) -> tuple[dict[str, Samples], dict[str, str]]:
    """An ImageFolder per split, and a hash of the file names and sizes of each."""
    from torchvision.datasets import ImageFolder  # noqa: PLC0415

    missing = [name for name in ("train", "val") if not (root / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"`data` must be a folder with train/ and val/ of class folders; {root} lacks {missing}."
        )
    folders = {"train": root / "train", "validation": root / "val"}
    splits: dict[str, Samples] = {
        name: ImageFolder(str(path), transform=transforms[name], target_transform=torch.tensor)
        for name, path in folders.items()
    }
    content = {
        name: hash_options(sorted((str(f.relative_to(path)), f.stat().st_size) for f in path.rglob("*") if f.is_file()))
        for name, path in folders.items()
    }
    return splits, content
