"""Rendered scenes: exact geometry, the same every time, and surfaces that look the same from everywhere."""

import numpy as np
import pytest
import torch

from lowrank.pi3.scenes import look_at, pixel_rays, render_scene
from lowrank.pi3.solids import ball_hits, box_hits


@pytest.mark.parametrize("seed", range(5))
def test_points_poses_and_depth_are_of_one_scene(seed: int) -> None:
    shot = render_scene(seed, views=3, height=24, width=32)
    moved = torch.einsum("nij,nhwj->nhwi", shot.poses[:, :3, :3], shot.local_points) + shot.poses[:, None, None, :3, 3]
    torch.testing.assert_close(moved, shot.points, atol=1e-5, rtol=0)
    assert torch.equal(shot.local_points[..., 2], shot.depth)
    assert 0.05 < shot.depth.min() < shot.depth.max() < 12
    assert 0 <= shot.images.min() < shot.images.max() <= 1
    rotation = shot.poses[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(3, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(3))


def test_a_seed_gives_the_same_scene_and_another_one_another() -> None:
    one, two, other = render_scene(3), render_scene(3), render_scene(4)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.poses, two.poses)
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize("seed", range(3))
def test_views_agree_where_they_see_the_same_point(seed: int) -> None:
    """Points of one view, projected into the next: where its depth says that they are seen, colours agree."""
    shot = render_scene(seed, views=2, height=64, width=64)
    world = shot.points[0].reshape(-1, 3).double()
    into = torch.linalg.inv(shot.poses[1].double())
    local = world @ into[:3, :3].T + into[:3, 3]
    pixels = (local[:, :2] / local[:, 2:] * shot.focal + 32).floor().long()
    inside = (local[:, 2] > 0) & ((pixels >= 0) & (pixels < 64)).all(1)
    x, y = pixels[inside].T
    seen = (shot.depth[1][y, x].double() - local[inside, 2]).abs() < 0.02
    assert seen.float().mean() > 0.2
    first = shot.images[0].flatten(1).T[inside][seen]
    second = shot.images[1][:, y, x].T[seen]
    assert (first - second).abs().median() < 0.05


def test_hits_by_hand() -> None:
    straight = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]])
    origin = np.zeros(3)
    np.testing.assert_allclose(ball_hits(origin, straight, np.array([0.0, 0.0, 5.0]), 2.0), [3, np.inf, np.inf])
    low, high = np.array([-1.0, -1.0, 2.0]), np.array([1.0, 1.0, 4.0])
    np.testing.assert_allclose(box_hits(origin, straight, low, high, inside=False), [2, np.inf, np.inf])
    np.testing.assert_allclose(box_hits(origin, straight, -high, high, inside=True), [4, 1, 4])


def test_rays_and_cameras() -> None:
    directions = pixel_rays(4, 6, focal=3.0)
    np.testing.assert_allclose(directions.mean((0, 1)), [0, 0, 1], atol=1e-12)
    assert directions[0, 1, 0] - directions[0, 0, 0] == pytest.approx(1 / 3)
    pose = look_at(np.array([0.0, 0.0, -2.0]), np.zeros(3))
    np.testing.assert_allclose(pose[:3, :3], np.eye(3), atol=1e-12)
    assert np.linalg.det(look_at(np.array([1.0, 0.3, -2.0]), np.zeros(3), 0.4)[:3, :3]) == pytest.approx(1)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`views` must be >= 1, got 0"):
        render_scene(0, views=0)
    with pytest.raises(ValueError, match="`height` must be >= 1, got 0"):
        render_scene(0, height=0)


def test_cameras_find_a_place_beside_things_that_fill_theirs() -> None:
    """A scene in which the arc of the cameras lies within a box."""
    shot = render_scene(1093572, 4, 8, 8)
    assert shot.depth.min() > 0.05
    assert len(shot.poses) == 4
