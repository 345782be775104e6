"""The loss that π³ is trained with: relative errors of points up to one scale, of relative poses, and of its confidence."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

ROTATION = TRANSLATION = 0.3  # weights beside that of points, 1
CONFIDENCE = 0.05
SURE = 0.1  # a point is meant to be trusted where its relative error is below


def absolute_scale(
    source: Float[Tensor, "scenes n"], target: Float[Tensor, "scenes n"], weights: Float[Tensor, "scenes n"]
) -> Float[Tensor, " scenes"]:
    """The scale s of least sum w |s x - y|, exactly: a weighted median of y / x. Weights >= 0; where x is 0 it has none."""
    ratio = target / torch.where(source == 0, 1.0, source)
    ratio, order = ratio.sort(-1)
    total = (weights * source.abs()).gather(-1, order).cumsum(-1)
    middle = (total < total[:, -1:] / 2).sum(-1, keepdim=True).clamp(max=source.shape[1] - 1)
    return ratio.gather(-1, middle).squeeze(-1)


def relative_poses(poses: Float[Tensor, "scenes views 4 4"]) -> Float[Tensor, "scenes views views 4 4"]:
    """The pose of camera j in the frame of camera i, of camera-to-world poses: P_i^-1 P_j."""
    turned = poses[..., :3, :3].mT
    back = torch.cat([turned, -turned @ poses[..., :3, 3:]], -1)  # (3, 4): the last row stays as it is
    motion = back[:, :, None] @ poses[:, None]
    return torch.cat([motion, poses[:, None, :, 3:].expand_as(motion[..., :1, :])], -2)


def geometry_loss(
    outputs: dict[str, Tensor],
    local_points: Float[Tensor, "scenes views height width 3"],
    poses: Float[Tensor, "scenes views 4 4"],
) -> Tensor:
    """Mean relative error of the local points under the best scale of each scene, plus that of the relative poses.

    |s q - p| / z over pixels, z the true depth, with the s of the least sum; the Frobenius norm of what relative rotations
    differ by, and the Huber loss of relative translations at that scale, over all pairs of views; and the cross-entropy of the
    confidence, whose target is whether the relative error of its point is below `SURE`.

    **Reference:** Wang et al., π³, 2025, arXiv:2507.13347, section 3.3, with the scale found exactly.
    """
    found, depth = outputs["local_points"], local_points[..., 2:]
    weights = (1 / depth).expand_as(found)
    with torch.no_grad():
        flat = (values.flatten(1) for values in (found, local_points, weights))
        scale = absolute_scale(*flat).clamp(1e-3, 1e3)[:, None, None, None]
    relative = (scale[..., None] * found - local_points).abs() / depth
    own, true = relative_poses(outputs["camera_poses"]), relative_poses(poses)
    turn = (own[..., :3, :3] - true[..., :3, :3]).square().sum((-1, -2)).add(1e-9).sqrt().mean()
    shift = functional.smooth_l1_loss(scale * own[..., :3, 3], true[..., :3, 3], beta=0.1)
    sure = (relative.detach().mean(-1, keepdim=True) < SURE).float()
    trust = functional.binary_cross_entropy_with_logits(outputs["conf"], sure)
    return relative.mean() + ROTATION * turn + TRANSLATION * shift + CONFIDENCE * trust


def distillation(teacher: nn.Module) -> Callable[[nn.Module, Any], Tensor]:
    """`geometry_loss` against the outputs of a teacher: a loss to refine with where nothing but images is known.

    The batch is images, or begins with them.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        images = batch if isinstance(batch, Tensor) else batch[0]
        with torch.no_grad():
            wanted = teacher(images)
        return geometry_loss(model(images), wanted["local_points"], wanted["camera_poses"])

    return loss


def sampled_loss(seed: int) -> Callable[[nn.Module, Any], Tensor]:
    """A loss under targets that the model draws itself, whose squared gradients are its true Fisher information: relative local
    points and poses have normal errors of variance 1/2 about the outputs, trust is a coin of the confidence's probability. No
    truth is used.

    Summed over the batch, as `lowrank.calibration.collect.collect_statistics` takes it.

    **Reference:** Martens and Grosse, KFAC, ICML 2015, arXiv:1503.05671, section 2.
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
