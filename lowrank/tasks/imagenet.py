"""ImageNet-1k, as a Hub data set or a folder of class folders, and any pretrained timm model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from lowrank.io.hashing import hash_options
from lowrank.io.hub import load_or_explain, load_splits
from lowrank.nn.targets import BLOCKS
from lowrank.tasks.images import Images
from lowrank.tasks.splits import halve
from lowrank.tasks.task import Samples, Task


def load(
    model: str = "vit_base_patch16_224",
    data: str = "ILSVRC/imagenet-1k",
    layers: list[str] | tuple[str, ...] = (*BLOCKS, "head"),
    pretrained: bool = True,
) -> Task:
    """Load ImageNet and a timm model. Images go through the transform that timm names for the model.

    The published test images have no labels: a hash of its row number on the Hub, or of its name in a folder, puts each
    published validation image into 'validation' or into 'test', about half of them each.

    **Arguments**

    - `model`: name of any timm model with pretrained weights; default 'vit_base_patch16_224'.
    - `data`: a folder with `train/` and `val/` of class folders, or a Hub name; default 'ILSVRC/imagenet-1k'.
    - `layers`: names or patterns of the targeted layers; default all inside blocks, and the head.
    - `pretrained`: whether to load weights. False gives new weights, and crops, flips and colours training images at random.
      Default True.
    """
    import timm  # noqa: PLC0415

    settings = timm.get_pretrained_cfg(model)
    if settings is None:
        raise ValueError(
            f"`model` must be a timm model with pretrained weights, got {model!r}; see timm.list_pretrained()."
        )
    transforms = _create_transforms(settings, augment=not pretrained)
    splits, hashes = (_read_folders if Path(data).exists() else _read_hub)(data, transforms)
    return Task(
        name="imagenet",
        splits=splits,
        make_model=lambda: load_or_explain(
            "timm model", model, lambda: timm.create_model(model, pretrained=pretrained)
        ),
        objective="classification",
        metrics=("accuracy",),
        layers=tuple(layers),
        fingerprints={"data": hashes, "weights": (settings.hf_hub_id or settings.url) if pretrained else None},
    )


def _create_transforms(settings: Any, augment: bool) -> dict[str, Any]:
    from timm.data.config import resolve_data_config  # noqa: PLC0415
    from timm.data.transforms_factory import create_transform  # noqa: PLC0415

    sizes = resolve_data_config(pretrained_cfg=settings.to_dict())
    return {"train": create_transform(**sizes, is_training=augment), "validation": create_transform(**sizes)}


def _read_hub(data: str, transforms: Mapping[str, Any]) -> tuple[dict[str, Samples], dict[str, str]]:
    """Return split -> samples, and split -> hash of its content."""
    source = load_splits(data)
    splits: dict[str, Samples] = {
        split: Images(source[split], transform) for split, transform in transforms.items() if split in source
    }
    hashes = {split: source[split]._fingerprint for split in splits}
    if "validation" in splits:
        splits |= _halve(splits["validation"], [str(row) for row in range(len(splits["validation"]))])
        hashes["test"] = hashes["validation"]
    return splits, hashes


def _read_folders(data: str, transforms: Mapping[str, Any]) -> tuple[dict[str, Samples], dict[str, str]]:
    """Return split -> samples, and split -> hash of its file names and sizes."""
    from torchvision.datasets import ImageFolder  # noqa: PLC0415

    root = Path(data)
    missing = [name for name in ("train", "val") if not (root / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"`data` must be a folder with train/ and val/ of class folders; {root} lacks {missing}."
        )
    folders = {"train": root / "train", "validation": root / "val"}
    images = {
        split: ImageFolder(str(folder), transform=transforms[split], target_transform=torch.tensor)
        for split, folder in folders.items()
    }
    names = [Path(path).relative_to(folders["validation"]).as_posix() for path, _ in images["validation"].samples]
    hashes = {split: _hash_sizes(folder) for split, folder in folders.items()}
    return {**images, **_halve(images["validation"], names)}, hashes | {"test": hashes["validation"]}


def _halve(images: Samples, names: list[str]) -> dict[str, Samples]:
    halves = zip(("validation", "test"), halve(names), strict=True)
    return {split: Subset(images, positions) for split, positions in halves}  # pyright: ignore[reportArgumentType]


def _hash_sizes(folder: Path) -> str:
    files = (file for file in folder.rglob("*") if file.is_file())
    return hash_options(sorted((str(file.relative_to(folder)), file.stat().st_size) for file in files))
