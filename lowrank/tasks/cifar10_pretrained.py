"""CIFAR-10 and a pretrained vision transformer of transformers, with a linear head fitted to its frozen features."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Resampling
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lowrank.io.cache import load_or_build
from lowrank.io.checks import require
from lowrank.io.hub import load_pretrained, load_splits
from lowrank.nn.targets import BLOCKS
from lowrank.tasks.cifar10 import split_rows
from lowrank.tasks.images import Images, normalise
from lowrank.tasks.task import Task
from lowrank.tasks.wheels import find_model, model_revision

CLASSES = 10
PENALTY = 0.01  # half of it times the squared norm of the head is added to its mean loss, on features of variance 1
BATCH = 50


def load(
    model: str = "facebook/dinov2-small",
    data: str = "uoft-cs/cifar10",
    size: int = 112,
    head_samples: int = 2000,
    train_samples: int | None = None,
    evaluation_samples: int | None = None,
    layers: list[str] | tuple[str, ...] = BLOCKS,
) -> Task:
    """Load CIFAR-10 and a pretrained model, whose head is fitted once to features of training images and cached.

    The head is a logistic regression on what the model would give to its classifier. Nothing else is trained, so that what
    compression costs is measured on features as they were published. Splits are those of the task 'cifar10'.

    **Arguments**

    - `model`: Hub name, folder or `packaged:NAME` of any model with an image classification class whose head is a linear layer
      named `classifier`; default 'facebook/dinov2-small'.
    - `data`: Hub name or folder; default 'uoft-cs/cifar10'.
    - `size`: pixels per side that images are enlarged to, at least 32 and a multiple of the model's patch; default 112.
    - `head_samples`: the first training images, which the head is fitted to; at least 10, default 2000.
    - `train_samples`: the first training images to calibrate and train with. Default None: all 45,000.
    - `evaluation_samples`: the first images of validation and of test to evaluate on. Default None: all.
    - `layers`: names or patterns of the targeted layers; default all inside blocks.

    **Raises**

    - `ValueError`: a value out of its range; a model without such a head.
    """
    require(size >= 32, "size", "be at least 32, that of the images", size)
    rows = split_rows(load_splits(data), train_samples, evaluation_samples)
    require(
        CLASSES <= head_samples <= len(rows["train"]), "head_samples", f"be in [10, {len(rows['train'])}]", head_samples
    )
    splits = {split: Images(part, partial(_enlarge, size=size)) for split, part in rows.items()}
    folder = find_model(model)
    fingerprints = {
        "data": {split: part._fingerprint for split, part in rows.items()},
        "revision": model_revision(model),
    }

    known = {"data": fingerprints["data"]["train"], "model": fingerprints["revision"]}
    key = {"size": size, "samples": head_samples, **known}
    return Task(
        name="cifar10_pretrained",
        splits=splits,
        make_model=partial(_make_model, folder, key, splits["train"]),
        objective="classification",
        metrics=("accuracy",),
        layers=tuple(layers),
        fingerprints=fingerprints,
    )


def _make_model(folder: str, key: dict[str, Any], images: Images) -> nn.Module:
    """Load a model, and give it the head that was fitted once for a key."""
    options = {"num_labels": CLASSES, "torch_dtype": torch.float32}
    model = load_pretrained("AutoModelForImageClassification", folder, **options).eval()
    head = getattr(model, "classifier", None)
    require(isinstance(head, nn.Linear), "model", "have a linear head named `classifier`", type(head).__name__)
    found = load_or_build("heads", key, Path(__file__), partial(_fit_head, model, images, key["samples"]))
    model.classifier.load_state_dict(load_file(found / "head.safetensors"))
    return model


def _enlarge(image: Any, size: int) -> Tensor:
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: PLC0415

    enlarged = image.resize((size, size), Resampling.BICUBIC)
    return normalise(enlarged, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _fit_head(model: Any, images: Images, samples: int, folder: Path) -> None:
    """Fit the head to the features of the first images, and write its weights."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    features: list[Tensor] = []
    labels: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].double()))
    try:
        with torch.no_grad():
            for pixels, classes in DataLoader(Subset(images, range(samples)), batch_size=BATCH):
                model(pixel_values=pixels)
                labels.append(classes)
    finally:
        hook.remove()
    x, y = torch.cat(features).numpy(), torch.cat(labels).numpy()
    center, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    fitted = LogisticRegression(C=1 / (PENALTY * samples), tol=1e-8, max_iter=5000).fit((x - center) / scale, y)
    require(len(fitted.classes_) == CLASSES, "head_samples", "hold images of all ten classes", samples)
    weight = torch.from_numpy(fitted.coef_ / scale)
    bias = torch.from_numpy(fitted.intercept_ - fitted.coef_ @ (center / scale))
    save_file({"weight": weight.float().contiguous(), "bias": bias.float()}, folder / "head.safetensors")
