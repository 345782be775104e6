"""Run π³ on views without gradients, and bring its depth and points to another size."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank.nn.batches import device_of, eval_mode
from lowrank.pi3.model import autocast


def predict(model: nn.Module, images: Tensor, precision: str = "fp32") -> dict[str, Tensor]:
    """Compute the outputs of one forward pass, in evaluation mode and without gradients.

    **Arguments**

    - `model`: a π³; its mode is restored.
    - `images`: views of one scene, `(N, 3, H, W)`, or of B scenes, `(B, N, 3, H, W)`, in [0, 1].
    - `precision`: 'fp32', or 'bf16' for autocast to bfloat16, in which the heads stay in float32. Default 'fp32'.

    **Returns** the outputs of `Pi3` on the CPU, without the axis B if `images` have none.
    """
    device, single = device_of(model), images.dim() == 4
    with eval_mode(model), torch.no_grad(), autocast(device, precision):
        outputs = model((images[None] if single else images).to(device))
    return {name: (value[0] if single else value).cpu() for name, value in outputs.items()}


def resize_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize depth by the cubic kernel with a = -0.75, as in OpenCV, without antialiasing.

    **Arguments**

    - `depth`: `(N, H, W)`.
    - `size`: the new height and width.
    """
    if tuple(depth.shape[1:]) == size:
        return depth
    return functional.interpolate(depth[:, None], size=size, mode="bicubic", align_corners=False)[:, 0]


def resize_points(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map of points bilinearly, antialiased.

    **Arguments**

    - `points`: `(N, H, W, 3)`.
    - `size`: the new height and width.
    """
    if tuple(points.shape[1:3]) == size:
        return points
    channels = points.permute(0, 3, 1, 2)
    resized = functional.interpolate(channels, size=size, mode="bilinear", align_corners=False, antialias=True)
    return resized.permute(0, 2, 3, 1)
