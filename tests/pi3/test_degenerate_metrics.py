"""Metrics of geometry for collapsed predictions, far units and broken poses: finite numbers or an error by name."""

from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from lowrank.pi3.metrics.alignment import fit_similarity
from lowrank.pi3.metrics.depth import ALIGNMENTS, DEPTH_METRICS, depth_metrics
from lowrank.pi3.metrics.points import point_metrics
from lowrank.pi3.metrics.poses import angle_summary, pair_angles, pose_distance

GT = np.linspace(1, 4, 40)
PREDICTIONS = {
    "zero": np.zeros(40),
    "mostly zero": np.r_[np.zeros(25), np.ones(15)],
    "one pixel": np.r_[np.zeros(39), 1.0],
    "of mean zero": np.tile([1.0, -1.0], 20),
    "negative": -GT,
    "constant": np.full(40, 0.3),
    "almost of mean zero": np.tile([1.0, -1.0], 20) + 1e-18,
    "one outlier": np.r_[GT[:39], 1e15],
}
FAR = (1e-80, 1e-8, 1e8, 1e80)


@pytest.mark.parametrize("align", ALIGNMENTS)
@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_depth_of_any_prediction_has_finite_errors(align: str, name: str, unit: float) -> None:
    found = depth_metrics(PREDICTIONS[name] * unit, GT, align)
    assert all(np.isfinite(found[metric]) for metric in DEPTH_METRICS)
    if name == "zero" and align in ("median", "scale_irls", "metric"):
        assert found["abs_rel"] == 1.0  # no scale of zeros comes nearer
        assert found["delta_3"] == 0.0


@pytest.mark.parametrize("align", [name for name in ALIGNMENTS if name != "metric"])
@pytest.mark.parametrize("unit", FAR)
def test_the_unit_of_a_prediction_does_not_matter(align: str, unit: float) -> None:
    generator = np.random.default_rng(0)
    pred = GT * np.exp(0.1 * generator.normal(size=40))
    wanted, found = depth_metrics(pred, GT, align), depth_metrics(pred * unit, GT, align)
    assert found["abs_rel"] == pytest.approx(wanted["abs_rel"], rel=0.02)
    both = depth_metrics(pred * unit, GT * unit, align)
    assert both["abs_rel"] == pytest.approx(wanted["abs_rel"], rel=0.02)


@pytest.mark.parametrize("argument", ["max_depth", "post_clip_max"])
@pytest.mark.parametrize("bound", [float("nan"), 0, -1.0])
def test_bounds_that_leave_nothing_are_refused(argument: str, bound: float) -> None:
    with pytest.raises(ValueError, match=rf"`{argument}` must be None or > 0, got {bound}"):
        depth_metrics(GT, GT, **{argument: bound})


def test_numbers_whose_squares_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="`pred` must be at most 1e"):
        depth_metrics(GT * 1e120, GT)
    with pytest.raises(ValueError, match="`pred` must be comparable with `gt` in float64, got"):
        depth_metrics(GT * 1e90, GT * 1e-280, "metric")


def trajectory(generator: np.random.Generator, count: int = 5) -> np.ndarray:
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.random(count, rng=generator).as_matrix()
    poses[:, :3, 3] = generator.normal(size=(count, 3))
    return poses


@pytest.mark.parametrize("unit", FAR)
@pytest.mark.parametrize("true_unit", FAR)
def test_units_of_trajectories_matter_to_no_angle(unit: float, true_unit: float) -> None:
    generator = np.random.default_rng(0)
    pred, gt = trajectory(generator), trajectory(generator)
    before, angles = pose_distance(pred, gt), pair_angles(pred, gt)
    pred[:, :3, 3] *= unit
    gt[:, :3, 3] *= true_unit
    after = pose_distance(pred, gt)
    for name, scale in (("ate", true_unit), ("rpe_trans", true_unit), ("rpe_rot", 1.0)):
        assert after[name] == pytest.approx(before[name] * scale, rel=1e-9)
    for wanted, found in zip(angles, pair_angles(pred, gt), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-7)


def broken(change: Any) -> np.ndarray:
    poses = trajectory(np.random.default_rng(0))
    poses[2] = change(poses[2])
    return poses


BROKEN = {
    "zero": lambda pose: 0 * pose,
    "scaled": lambda pose: 2 * pose,
    "flattened": lambda pose: pose @ np.diag([1.0, 1.0, 0.0, 1.0]),
    "mirrored": lambda pose: pose @ np.diag([1.0, 1.0, -1.0, 1.0]),
    "transposed": lambda pose: pose.T,
    "huge": lambda pose: np.full((4, 4), 1e99),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("metric", [pose_distance, pair_angles])
def test_what_is_no_pose_is_refused(metric: Any, change: Any) -> None:
    good = trajectory(np.random.default_rng(1))
    with pytest.raises(ValueError, match=r"`pred` must be rigid motions.* at 2"):
        metric(broken(change), good)
    with pytest.raises(ValueError, match=r"`gt` must be rigid motions.* at 2"):
        metric(good, broken(change))


def test_poses_of_half_precision_are_poses() -> None:
    gt = trajectory(np.random.default_rng(0))
    rounded = gt.astype(np.float16).astype(np.float64)
    assert pose_distance(rounded, gt)["rpe_rot"] < 0.2


@pytest.mark.parametrize("unit", FAR)
@pytest.mark.parametrize("true_unit", FAR)
def test_units_of_clouds_scale_the_distances(unit: float, true_unit: float) -> None:
    generator = np.random.default_rng(0)
    gt = generator.normal(size=(60, 3))
    pred, mask = gt + 0.1 * generator.normal(size=(60, 3)), np.ones(60, dtype=bool)
    wanted = point_metrics(pred, gt, mask)
    found = point_metrics(pred * unit, gt * true_unit, mask, 0.1 * true_unit)
    assert found["acc_mean"] == pytest.approx(wanted["acc_mean"] * true_unit, rel=0.01)
    assert found["nc_mean"] == pytest.approx(wanted["nc_mean"], rel=0.01)  # ICP ends at 1e-6 of the unit
    scale, _, _ = fit_similarity(pred * unit, gt * true_unit)
    assert scale == pytest.approx(fit_similarity(pred, gt)[0] * true_unit / unit, rel=1e-9)


def test_clouds_without_extent_have_finite_errors() -> None:
    cloud, mask = np.random.default_rng(0).normal(size=(20, 3)), np.ones(20, dtype=bool)
    for pred, gt in ((0 * cloud, cloud), (cloud, 0 * cloud), (0 * cloud, 0 * cloud)):
        assert all(np.isfinite(value) for value in point_metrics(pred, gt, mask).values())
    for distance in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="`distance` must be > 0"):
            point_metrics(cloud, cloud, mask, distance)


def test_angles_that_are_none_are_refused() -> None:
    one = np.ones(3)
    with pytest.raises(ValueError, match="`rotation` must be finite"):
        angle_summary(one * np.nan, one)
    with pytest.raises(ValueError, match="`rotation` must have at least one pair, got 0"):
        angle_summary(one[:0], one[:0])
    with pytest.raises(ValueError, match=r"`direction` must have the shape of `rotation`, \(3,\), got \(2,\)"):
        angle_summary(one, one[:2])
