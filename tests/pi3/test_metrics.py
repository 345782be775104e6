"""Metrics of geometry: closed forms, invariances, a naive second method, and inputs without an answer."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from lowrank.pi3.metrics.alignment import fit_similarity
from lowrank.pi3.metrics.depth import ALIGNMENTS, depth_metrics
from lowrank.pi3.metrics.points import align_by_icp, estimate_normals, point_metrics
from lowrank.pi3.metrics.poses import angle_summary, pair_angles, pose_distance


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def trajectory(generator: np.random.Generator, count: int = 8) -> np.ndarray:
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.random(count, rng=generator).as_matrix()
    poses[:, :3, 3] = generator.normal(size=(count, 3))
    return poses


def turned(degrees: float, axis: Any = (0, 0, 1)) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * np.array(axis, dtype=float)).as_matrix()
    return pose


def moved(poses: np.ndarray, scale: float, rotation: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The same trajectory in another frame and unit."""
    own = poses.copy()
    own[:, :3, :3] = rotation @ poses[:, :3, :3]
    own[:, :3, 3] = scale * poses[:, :3, 3] @ rotation.T + shift
    return own


@pytest.mark.parametrize("align", [name for name in ALIGNMENTS if name not in ("metric", "lad2")])
@pytest.mark.parametrize("shape", [(40, 20), (20, 20), (3, 12, 30)])
def test_a_scaled_copy_is_perfect_under_scale_alignment(align: str, shape: tuple[int, ...], generator) -> None:
    gt = generator.uniform(1, 5, shape)
    found = depth_metrics(gt / 3.7, gt, align)
    assert found["abs_rel"] == pytest.approx(0, abs=1e-4 if align in ("lad", "scale_irls") else 1e-12)
    assert found["delta_1"] == found["delta_3"] == 1
    assert found["valid_pixels"] == gt.size


def test_depth_by_hand() -> None:
    gt, pred = np.array([1.0, 2.0, 4.0, 0.0, -1.0]), np.array([1.1, 3.0, 4.0, 9.0, 9.0])
    found = depth_metrics(torch.from_numpy(pred), torch.from_numpy(gt), "metric")
    assert found["valid_pixels"] == 3
    assert found["abs_rel"] == pytest.approx((0.1 + 0.5 + 0) / 3)
    assert found["sq_rel"] == pytest.approx((0.01 + 0.5 + 0) / 3)
    assert found["rmse"] == pytest.approx(math.sqrt((0.01 + 1) / 3))
    assert found["log_rmse"] == pytest.approx(math.sqrt((math.log(1.1) ** 2 + math.log(1.5) ** 2) / 3))
    assert (found["delta_1"], found["delta_2"], found["delta_3"]) == pytest.approx((2 / 3, 1, 1))
    capped = depth_metrics(pred, gt, "metric", max_depth=4, post_clip_max=2.5)
    assert capped["valid_pixels"] == 2
    assert capped["rmse"] == pytest.approx(math.sqrt((0.01 + 0.25) / 2))


def test_the_median_of_an_even_number_is_the_lower_one() -> None:
    gt, pred = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 1.0, 2.0, 2.0])
    assert depth_metrics(pred, gt, "median")["abs_rel"] == pytest.approx(np.mean([1, 0, 1 / 3, 0]))


def test_alignments_with_a_shift(generator) -> None:
    gt = generator.uniform(2, 6, 500)
    assert depth_metrics((gt - 1.5) / 2, gt, "lstsq")["rmse"] == pytest.approx(0, abs=1e-9)
    pred = (gt - 1.5) / 2
    false = np.where(np.arange(500) < 50, 90.0, gt)  # gross errors move least squares, not least absolute error
    by_absolute, by_squares = (ALIGNMENTS[name](pred, false) for name in ("lad", "lstsq"))
    assert by_absolute == pytest.approx((2, 1.5), abs=0.1)
    assert abs(by_squares[1] - 1.5) > 1
    near = gt * 1.01 + 0.02
    by_adam, without = (depth_metrics(near, gt, align)["abs_rel"] for align in ("lad2", "metric"))
    assert by_adam < without


def test_scale_of_least_absolute_error_beats_its_neighbours(generator) -> None:
    gt = generator.uniform(1, 5, 400)
    pred = gt * 0.4 * np.exp(0.3 * generator.standard_t(2, 400).clip(-4, 4))
    scale, _ = ALIGNMENTS["scale_irls"](pred, gt)
    errors = [np.abs(s * pred - gt).sum() for s in (0.97 * scale, scale, 1.03 * scale)]
    assert errors[1] == min(errors)


def test_no_valid_pixel_and_refused_depth() -> None:
    empty = depth_metrics(np.ones(4), np.zeros(4))
    assert set(empty.values()) == {0}
    with pytest.raises(ValueError, match="`align` must be one of"):
        depth_metrics(np.ones(3), np.ones(3), "scale")
    with pytest.raises(ValueError, match=r"`pred` must have the shape of `gt`, \(3,\), got \(4,\)"):
        depth_metrics(np.ones(4), np.ones(3))
    with pytest.raises(ValueError, match="`pred` must be finite"):
        depth_metrics(np.array([1.0, np.nan]), np.ones(2))


def test_a_moved_and_scaled_trajectory_is_perfect(generator) -> None:
    gt = trajectory(generator)
    rotation = Rotation.random(rng=generator).as_matrix()
    found = pose_distance(torch.from_numpy(moved(gt, 3.0, rotation, np.array([1.0, -2.0, 5.0]))), torch.from_numpy(gt))
    assert found == pytest.approx({"ate": 0, "rpe_trans": 0, "rpe_rot": 0}, abs=1e-6)


def test_similarity_is_the_least_squares_one(generator) -> None:
    source, target = generator.normal(size=(30, 3)), generator.normal(size=(30, 3))
    scale, rotation, shift = fit_similarity(source, target)
    assert np.linalg.det(rotation) == pytest.approx(1)

    def error(scale: float, rotation: np.ndarray, shift: np.ndarray) -> float:
        return float(((scale * source @ rotation.T + shift - target) ** 2).sum())

    best = error(scale, rotation, shift)
    for _ in range(200):
        step = Rotation.from_rotvec(0.05 * generator.normal(size=3)).as_matrix()
        other = error(scale * (1 + 0.05 * generator.normal()), step @ rotation, shift + 0.05 * generator.normal(size=3))
        assert other >= best


def test_motion_errors_by_hand() -> None:
    """A straight path with one camera turned by 10 degrees: two motions are 10 degrees off, positions are right."""
    gt = np.tile(np.eye(4), (5, 1, 1))
    gt[:, :3, 3] = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [2, 1, 1]]
    pred = gt.copy()
    pred[2] = pred[2] @ turned(10, (1, 0, 0))
    found = pose_distance(pred, gt)
    assert found["ate"] == pytest.approx(0, abs=1e-12)
    assert found["rpe_rot"] == pytest.approx(math.sqrt(2 * 100 / 4))
    assert found["rpe_trans"] == pytest.approx(
        math.sqrt((2 * math.sin(math.radians(5))) ** 2 / 4)
    )  # seen from the turned one


def test_trajectories_without_extent_and_refused_ones(generator) -> None:
    gt = trajectory(generator, 4)
    still = np.tile(np.eye(4), (4, 1, 1))
    spread = math.sqrt(((gt[:, :3, 3] - gt[:, :3, 3].mean(0)) ** 2).sum(1).mean())
    assert pose_distance(still, gt)["ate"] == pytest.approx(spread)
    assert pose_distance(gt, still)["ate"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="`pred` must be at least two poses"):
        pose_distance(gt[:1], gt[:1])
    with pytest.raises(ValueError, match="`pred` must be as many poses as `gt`, 4, got 3"):
        pose_distance(gt[:3], gt)
    with pytest.raises(ValueError, match="`gt` must be at least two poses"):
        pose_distance(gt, gt[:, :3])


@pytest.mark.parametrize("degrees", [1e-6, 3.0, 90.0, 179.5])
def test_a_known_rotation_gives_its_angle(degrees: float, generator) -> None:
    gt = trajectory(generator, 2)
    pred = gt.copy()
    pred[1] = turned(degrees, (0, 1, 0)) @ pred[1]
    rotation, _ = pair_angles(pred, gt)
    assert rotation == pytest.approx([degrees], rel=1e-6)


def test_angles_against_a_loop_over_pairs(generator) -> None:
    gt, pred = trajectory(generator, 6), trajectory(generator, 6)
    rotation, direction = pair_angles(pred, gt)
    pairs = list(itertools.combinations(range(6), 2))
    for index, (i, j) in enumerate(pairs):
        one, two = (poses[j] @ np.linalg.inv(poses[i]) for poses in (pred, gt))
        assert rotation[index] == pytest.approx(
            math.degrees(Rotation.from_matrix(one[:3, :3].T @ two[:3, :3]).magnitude())
        )
        u, v = one[:3, 3], two[:3, 3]
        assert direction[index] == pytest.approx(
            math.degrees(math.acos(abs(u @ v) / np.linalg.norm(u) / np.linalg.norm(v)))
        )
    assert len(rotation) == len(pairs)
    assert pair_angles(gt, gt)[1].max() < 1e-6


def test_thresholds_and_area_by_definition() -> None:
    rotation, direction = np.array([0.5, 4.0, 5.0, 20.0]), np.array([0.2, 4.9, 1.0, 31.0])
    found = angle_summary(rotation, direction)
    assert (found["racc@5"], found["tacc@5"], found["racc@30"], found["tacc@30"]) == (50, 75, 100, 75)
    worst = np.maximum(rotation, direction)
    for top in (5, 15, 30):
        shares = [(worst < k).mean() for k in range(1, top)] + [(worst <= top).mean()]
        assert found[f"auc@{top}"] == pytest.approx(100 * np.mean(shares))
    same = np.tile(np.eye(4), (3, 1, 1))
    assert set(angle_summary(*pair_angles(same, same)).values()) == {100.0}


def plane(side: int = 24) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / 4
    return np.stack([x, y, 0.3 * np.sin(x) * np.cos(y)], -1)


def test_a_moved_and_scaled_cloud_is_perfect(generator) -> None:
    gt = plane()
    pred = 0.2 * gt @ Rotation.random(rng=generator).as_matrix().T + np.array([3.0, 1.0, -2.0])
    found = point_metrics(torch.from_numpy(pred), torch.from_numpy(gt), torch.ones(gt.shape[:2]).bool())
    for name in ("acc", "comp"):
        assert found[f"{name}_mean"] == pytest.approx(0, abs=1e-8)
    assert found["nc_mean"] == pytest.approx(1, abs=1e-6)


def test_what_the_mask_leaves_out_does_not_count(generator) -> None:
    gt, mask = plane(), np.ones((24, 24), dtype=bool)
    mask[:6] = False
    pred = gt.copy()
    pred[:6] = np.nan
    assert point_metrics(pred, gt, mask)["acc_mean"] == pytest.approx(0, abs=1e-9)


def test_distances_and_normals_against_a_naive_search(generator) -> None:
    gt = plane(12)
    pred = gt + 0.02 * generator.normal(size=gt.shape)
    found = point_metrics(pred, gt, np.ones((12, 12), dtype=bool), distance=1e-9)  # nothing is near enough for ICP
    scale, rotation, shift = fit_similarity(pred.reshape(-1, 3), gt.reshape(-1, 3))
    p, g = scale * pred.reshape(-1, 3) @ rotation.T + shift, gt.reshape(-1, 3)
    between = np.linalg.norm(p[:, None] - g[None], axis=-1)
    assert found["acc_mean"] == pytest.approx(between.min(1).mean(), rel=1e-9)
    assert found["comp_median"] == pytest.approx(np.median(between.min(0)), rel=1e-9)
    near = g[np.argsort(np.linalg.norm(g - g[5], axis=1), kind="stable")[:30]]
    direction = np.linalg.svd(near - near.mean(0))[2][2]
    assert abs(estimate_normals(g)[5] @ direction) == pytest.approx(
        1, abs=1e-3
    )  # ties of the grid may pick another neighbour


def test_a_shifted_plane_gives_its_distance() -> None:
    flat = plane() * np.array([1, 1, 0])
    shifted = flat + np.array([0, 0, 0.05])
    np.testing.assert_allclose(
        align_by_icp(shifted.reshape(-1, 3), flat.reshape(-1, 3), 0.1), flat.reshape(-1, 3), atol=1e-9
    )
    two = np.concatenate([flat, flat + np.array([0, 0, 5])])
    one_off = np.concatenate([flat, flat + np.array([0, 0, 5.04])])  # a gap that no similarity closes wholly
    found = point_metrics(one_off, two, np.ones(two.shape[:2], dtype=bool), distance=1e-9)
    assert 0 < found["acc_mean"] < 0.04
    np.testing.assert_array_equal(
        align_by_icp(shifted.reshape(-1, 3), flat.reshape(-1, 3), 0.01), shifted.reshape(-1, 3)
    )


def test_clouds_that_are_refused() -> None:
    gt = plane(4)
    with pytest.raises(ValueError, match="`mask` must keep at least three points, got 0"):
        point_metrics(gt, gt, np.zeros((4, 4), dtype=bool))
    with pytest.raises(ValueError, match="of one shape"):
        point_metrics(gt[:3], gt, np.ones((4, 4), dtype=bool))
