"""The loss π³ is trained with: exact scales, what it does not depend on, and a training that lowers it."""

import json

import pytest
import torch
from torch import Tensor

from lowrank.pi3.loss import absolute_scale, geometry_loss, relative_poses
from lowrank.pi3.scenes import render_scene
from lowrank.pi3.small import SMALL, small_pi3, training_batches
from lowrank.pretrain import main
from lowrank.training import Recipe


@pytest.mark.parametrize("seed", range(10))
def test_the_scale_is_of_least_weighted_absolute_error(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y, w = (torch.randn(3, 41, generator=generator, dtype=torch.float64) for _ in range(3))
    w, x[:, :5] = w.abs(), 0.0
    found = absolute_scale(x, y, w)
    error = lambda s: (w * (s[:, None] * x - y).abs()).sum(1)  # noqa: E731
    tried = [error(y[:, i] / x[:, i]) for i in range(5, 41)]  # the optimum is at one of these
    torch.testing.assert_close(error(found), torch.stack(tried).min(0).values)


def truth(seed: int = 0, views: int = 3) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    shot = render_scene(seed, views, 16, 16)
    points, poses = shot.local_points[None], shot.poses[None]
    return (
        {"local_points": points, "camera_poses": poses, "conf": torch.full((1, views, 16, 16, 1), 40.0)},
        points,
        poses,
    )


def test_the_truth_has_no_loss_in_any_frame_and_scale() -> None:
    outputs, points, poses = truth()
    assert geometry_loss(outputs, points, poses) == pytest.approx(0.0, abs=1e-4)
    frame = render_scene(7, 1, 4, 4).poses[0]
    moved = frame @ poses
    moved[..., :3, 3] *= 2.5
    scaled = {**outputs, "local_points": 2.5 * points, "camera_poses": moved}
    assert geometry_loss(scaled, points, poses) == pytest.approx(0.0, abs=1e-4)


def test_each_part_counts() -> None:
    outputs, points, poses = truth()
    turned = poses.clone()
    turned[:, 1] = poses[:, 2]
    doubtful = torch.zeros_like(outputs["conf"])
    for name, value in (
        ("local_points", points * torch.linspace(0.5, 1.5, 16)[:, None]),
        ("camera_poses", turned),
        ("conf", doubtful),
    ):
        assert geometry_loss({**outputs, name: value}, points, poses) > 0.02


def test_relative_poses_are_of_one_camera_in_the_frame_of_another() -> None:
    poses = render_scene(1, 3, 4, 4).poses[None].double()
    expected = torch.linalg.inv(poses)[:, :, None] @ poses[:, None]
    torch.testing.assert_close(relative_poses(poses), expected, atol=1e-6, rtol=0)


def test_batches_hold_new_scenes_in_every_step_and_are_the_same_again() -> None:
    recipe = Recipe(steps=3, batch_size=8)
    one, again = list(training_batches(0, recipe)), list(training_batches(1, recipe))
    assert len(one) == 3
    assert all(batch[0].shape[0] * batch[0].shape[1] <= 8 for batch in one)
    assert torch.equal(one[1][0], again[0][0])
    assert not torch.equal(one[0][0][0, 0], one[1][0][0, 0])


def test_the_command_trains_and_what_it_wrote_is_read(tmp_path) -> None:
    assert main(["--folder", str(tmp_path), "--steps", "2", "--frames", "4"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "run.json"]
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["recipe"]["steps"] == 2
    assert small_pi3(tmp_path).config == SMALL
