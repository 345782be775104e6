"""The training loss of π³, distillation from a teacher, and a loss whose gradients give the Fisher information.

The training loss adds relative errors of points up to one scale, errors of relative poses, and the loss of the confidence.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

ROTATION_WEIGHT = TRANSLATION_WEIGHT = 0.3  # the weight of points is 1
CONFIDENCE_WEIGHT = 0.05
SURE = 0.1  # the confidence of a point should be high if its relative error is below


def absolute_scale(
    source: Float[Tensor, "scenes n"], target: Float[Tensor, "scenes n"], weights: Float[Tensor, "scenes n"]
) -> Float[Tensor, " scenes"]:
    """Compute the scale s of each scene that minimises sum w |s x - y|: a weighted median of y / x.

    **Arguments**

    - `source`: the values x, `(scenes, n)`; a value 0 does not count.
    - `target`: the values y, `(scenes, n)`.
    - `weights`: the weights w, `(scenes, n)`, >= 0.

    **Returns** `(scenes,)`.
    """
    ratio = target / torch.where(source == 0, 1.0, source)
    ratio, order = ratio.sort(-1)
    total = (weights * source.abs()).gather(-1, order).cumsum(-1)
    middle = (total < total[:, -1:] / 2).sum(-1, keepdim=True).clamp(max=source.shape[1] - 1)
    return ratio.gather(-1, middle).squeeze(-1)


def relative_poses(poses: Float[Tensor, "scenes views 4 4"]) -> Float[Tensor, "scenes views views 4 4"]:
    """Compute P_i^-1 P_j, the pose of camera j in the frame of camera i, from camera-to-world poses P."""
    transposed = poses[..., :3, :3].mT
    back = torch.cat([transposed, -transposed @ poses[..., :3, 3:]], -1)  # (3, 4): the last row does not change
    motion = back[:, :, None] @ poses[:, None]
    return torch.cat([motion, poses[:, None, :, 3:].expand_as(motion[..., :1, :])], -2)


def geometry_loss(
    outputs: dict[str, Tensor],
    local_points: Float[Tensor, "scenes views height width 3"],
    poses: Float[Tensor, "scenes views 4 4"],
) -> Tensor:
    """Compute the training loss of π³: errors of points and relative poses under the best scale of each scene.

    It is a weighted sum of four means. Points: |s q - p| / z over pixels, with z the true depth and s the scale that minimises
    its sum. Rotations: the Frobenius norm of the difference, over all pairs of views. Translations: the Huber loss at the scale
    s, over the same pairs. Confidence: the cross-entropy with a target that says if the relative error of the point is below
    `SURE`.

    **Arguments**

    - `outputs`: of `Pi3`.
    - `local_points`: the true points p, `(scenes, views, height, width, 3)`, in the frame of each camera, z > 0.
    - `poses`: the true poses, `(scenes, views, 4, 4)`, camera to world.

    **Returns** a scalar.

    **Reference** Wang et al., π³, 2025, arXiv:2507.13347, section 3.3, with the exact scale.
    """
    predicted, depth = outputs["local_points"], local_points[..., 2:]
    weights = (1 / depth).expand_as(predicted)
    with torch.no_grad():
        flat = (values.flatten(1) for values in (predicted, local_points, weights))
        scale = absolute_scale(*flat).clamp(1e-3, 1e3)[:, None, None, None]
    relative = (scale[..., None] * predicted - local_points).abs() / depth
    motion, true_motion = relative_poses(outputs["camera_poses"]), relative_poses(poses)
    turn = (motion[..., :3, :3] - true_motion[..., :3, :3]).square().sum((-1, -2)).add(1e-9).sqrt().mean()
    shift = functional.smooth_l1_loss(scale * motion[..., :3, 3], true_motion[..., :3, 3], beta=0.1)
    sure = (relative.detach().mean(-1, keepdim=True) < SURE).float()
    trust = functional.binary_cross_entropy_with_logits(outputs["conf"], sure)
    return relative.mean() + ROTATION_WEIGHT * turn + TRANSLATION_WEIGHT * shift + CONFIDENCE_WEIGHT * trust


def distillation_loss(teacher: nn.Module) -> Callable[[nn.Module, Any], Tensor]:
    """Build a loss that needs images only: `geometry_loss` against the outputs of a teacher.

    **Arguments**

    - `teacher`: a π³; it gets no gradients.

    **Returns** `(model, batch) -> scalar`. The batch is images `(scenes, views, 3, H, W)`, or a sequence that starts with them.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        images = batch if isinstance(batch, Tensor) else batch[0]
        with torch.no_grad():
            targets = teacher(images)
        return geometry_loss(model(images), targets["local_points"], targets["camera_poses"])

    return loss


def sampled_loss(seed: int) -> Callable[[nn.Module, Any], Tensor]:
    """Build a loss whose squared gradients are the true Fisher information of the model.

    Its targets are random samples from the predictions, so it needs images only. Relative local points and poses have normal
    errors of variance 1/2 about the outputs. The confidence is the probability of a coin.

    **Arguments**

    - `seed`: of the samples; each call of the loss draws new ones.

    **Returns** `(model, batch) -> scalar`, summed over the batch, for `lowrank.calibration.collect.collect_statistics`. The batch
    is images `(scenes, views, 3, H, W)`, or a sequence that starts with them.

    **Reference** Martens and Grosse, KFAC, ICML 2015, arXiv:1503.05671, section 2.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(values: Tensor) -> Tensor:
        return 0.5**0.5 * torch.randn(values.shape, generator=generator).to(values)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch if isinstance(batch, Tensor) else batch[0])
        points, poses = outputs["local_points"], outputs["camera_poses"][..., :3, :]
        depth = points[..., 2:].detach()
        extent = depth.mean((1, 2, 3, 4))[:, None, None, None]
        relative = torch.cat([poses[..., :3], poses[..., 3:] / extent], -1)
        conf = outputs["conf"]
        coin = torch.rand(conf.shape, generator=generator).to(conf) < conf.detach().sigmoid()
        total = functional.binary_cross_entropy_with_logits(conf, coin.to(conf.dtype), reduction="sum")
        for values in (points / depth, relative):
            total = total + (values - (values.detach() + noise(values))).square().sum()
        return total

    return loss
