"""Evaluation of π³: a model that knows the truth is perfect, weights and pools by hand, sizes, and what does not count."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pi3_models import images, model
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from lowrank.pi3.data import Scene, rendered_scenes
from lowrank.pi3.evaluation import (
    GEOMETRY_TASKS,
    IMAGES_PER_PASS,
    PROTOCOLS,
    Protocol,
    evaluate_pi3,
    mono_depth_rows,
)
from lowrank.pi3.metrics.depth import ALIGNMENTS, depth_metrics
from lowrank.pi3.metrics.poses import angle_summary, pair_angles, pose_distance
from lowrank.pi3.predictions import predict, resize_depth, resize_points
from lowrank.pi3.scenes import Views, render_scene

MEDIAN = Protocol(mono="median", video="median")
METRIC = Protocol(mono="metric", video="metric")
SIDE, SCALE = 24, 3.0
FRAME = torch.eye(4)
FRAME[:3, :3] = torch.from_numpy(Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix()).float()
FRAME[:3, 3] = torch.tensor([5.0, -2.0, 1.0])


class Oracle(nn.Module):
    """Knows the rendered views it is shown, in another frame and unit; `worse` changes its poses and local points."""

    def __init__(
        self, shots: list[Views], worse: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda p, x: (p, x)
    ) -> None:
        super().__init__()
        self.known: dict[bytes, tuple[Tensor, Tensor]] = {}
        self.seen: list[tuple[int, ...]] = []
        for shot in shots:
            for image, pose, points in zip(shot.images, *worse(shot.poses, shot.local_points), strict=True):
                self.known[image.numpy().tobytes()] = pose, points

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.seen.append(tuple(images.shape))
        found = [self.known[image.numpy().tobytes()] for image in images.flatten(0, 1)]
        poses, local = (torch.stack(part).unflatten(0, tuple(images.shape[:2])) for part in zip(*found, strict=True))
        moved = FRAME @ poses
        moved[..., :3, 3] = SCALE * (FRAME[:3, :3] @ poses[..., :3, 3:]).squeeze(-1) + FRAME[:3, 3]
        local = SCALE * local
        points = torch.einsum("bnij,bnhwj->bnhwi", moved[..., :3, :3], local) + moved[:, :, None, None, :3, 3]
        return {
            "points": points,
            "local_points": local,
            "conf": torch.zeros_like(local[..., :1]),
            "camera_poses": moved,
        }


def shots(count: int = 2, views: int = 3) -> list[Views]:
    return [render_scene(seed, views, SIDE, SIDE) for seed in range(count)]


def scenes(count: int = 2, views: int = 3) -> list[Scene]:
    return list(rendered_scenes(0, count, views, SIDE))


def noisy(poses: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and rotations of views after the first, and the depth of every pixel, a little off."""
    generator = torch.Generator().manual_seed(len(poses))
    turns = 0.1 * torch.randn(len(poses), 3, generator=generator).double().numpy()
    poses = poses.clone()
    poses[1:, :3, :3] = poses[1:, :3, :3] @ torch.from_numpy(Rotation.from_rotvec(turns).as_matrix()[1:]).float()
    poses[1:, :3, 3] += 0.2 * torch.randn(len(poses) - 1, 3, generator=generator)
    return poses, local * (1 + 0.2 * torch.rand(*local.shape[:-1], 1, generator=generator))


# --- the truth, in another frame and unit -----------------------------------------------------------------------------


def test_the_truth_is_perfect_in_any_frame_and_unit() -> None:
    found = evaluate_pi3(Oracle(shots()), scenes(), MEDIAN)
    assert list(found) == list(GEOMETRY_TASKS)
    assert {task: rows["sequences"] for task, rows in found.items()} == dict.fromkeys(GEOMETRY_TASKS, 2)
    for task in ("mono_depth", "video_depth"):
        assert found[task]["abs_rel"] == pytest.approx(0, abs=1e-6)
        assert found[task]["delta_1"] == 1
        assert found[task]["valid_pixels"] == 2 * 3 * SIDE**2
    for name in ("ate", "rpe_trans"):
        assert found["pose"][name] == pytest.approx(0, abs=1e-5)
    assert found["pose"]["rpe_rot"] == pytest.approx(0, abs=1e-3)
    assert {found["pose"][name] for name in ("racc@5", "tacc@5", "auc@5", "racc@30", "tacc@30", "auc@30")} == {100.0}
    for name in ("acc_mean", "acc_median", "comp_mean", "comp_median"):
        assert found["points"][name] == pytest.approx(0, abs=1e-5)
    assert found["points"]["nc_mean"] == pytest.approx(1, abs=1e-3)


def test_what_is_off_is_worse_in_every_task() -> None:
    good, bad = (evaluate_pi3(oracle, scenes(), MEDIAN) for oracle in (Oracle(shots()), Oracle(shots(), noisy)))
    for task, name in (
        ("mono_depth", "abs_rel"),
        ("video_depth", "abs_rel"),
        ("pose", "ate"),
        ("pose", "rpe_rot"),
        ("points", "acc_mean"),
        ("points", "comp_mean"),
    ):
        assert bad[task][name] > 0.01 + good[task][name], (task, name)
    assert bad["pose"]["auc@30"] < good["pose"]["auc@30"]
    assert bad["points"]["nc_mean"] < good["points"]["nc_mean"]


def test_depth_of_single_images_is_aligned_one_by_one_and_of_videos_at_once() -> None:
    """Each view in a unit of its own: nothing that single images see, and not what one scale can repair."""

    def units(poses: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        return poses, local * torch.tensor([1.0, 2.0, 0.5])[:, None, None, None]

    found = evaluate_pi3(Oracle(shots(), units), scenes(), MEDIAN, ["mono_depth", "video_depth"])
    assert found["mono_depth"]["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert found["video_depth"]["abs_rel"] > 0.2


def test_each_of_the_two_tasks_of_depth_has_its_alignment() -> None:
    for protocol, off in ((Protocol("metric", "median"), "mono_depth"), (Protocol("median", "metric"), "video_depth")):
        found = evaluate_pi3(Oracle(shots(1)), scenes(1), protocol, ["mono_depth", "video_depth"])
        for task, rows in found.items():
            assert rows["abs_rel"] == pytest.approx(SCALE - 1 if task == off else 0, abs=1e-5)


def test_protocols_name_known_alignments_and_what_they_cut_is_cut() -> None:
    assert {name for own in PROTOCOLS.values() for name in (own.mono, own.video)} <= set(ALIGNMENTS)
    oracle, own = Oracle(shots(1), noisy), scenes(1)
    near = float(own[0].depth.quantile(0.5))  # pyright: ignore
    plain = evaluate_pi3(oracle, own, MEDIAN)
    cut = evaluate_pi3(oracle, own, Protocol("median", "median", max_depth=near))
    for task in ("mono_depth", "video_depth"):
        assert cut[task]["valid_pixels"] == int((own[0].depth < near).sum()) < plain[task]["valid_pixels"]  # pyright: ignore
    clipped = evaluate_pi3(oracle, own, Protocol("median", "median", post_clip_max=0.01))
    assert clipped["mono_depth"]["delta_3"] == clipped["video_depth"]["delta_3"] == 0
    reach = (
        evaluate_pi3(oracle, own, Protocol(distance=1e-9), ["points"]),
        evaluate_pi3(oracle, own, MEDIAN, ["points"]),
    )
    assert reach[0]["points"]["acc_mean"] != reach[1]["points"]["acc_mean"]


# --- weights, pools and means -----------------------------------------------------------------------------------------


def constant(depths: list[float]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Views of which each has one depth, in the unit of the truth."""
    z = torch.tensor(depths)[:, None, None, None] / SCALE
    return lambda poses, local: (poses, torch.cat([local[..., :2], z.expand_as(local[..., 2:])], -1))


def half_known() -> Scene:
    """Two views: 10 pixels at depth 2, 30 at depth 4; the others are not known."""
    own = scenes(1, 2)[0]
    depth = torch.zeros(2, SIDE, SIDE)
    depth[0, 0, :10], depth[1, 1, :20], depth[1, 2, :10] = 2.0, 4.0, 4.0
    return Scene(own.name, own.images, depth)


@pytest.mark.parametrize("task", ["mono_depth", "video_depth"])
def test_depth_is_weighted_by_valid_pixels(task: str) -> None:
    found = evaluate_pi3(Oracle(shots(1, 2), constant([2.2, 5.0])), [half_known()], METRIC, [task])[task]
    assert found["valid_pixels"] == 40
    assert found["abs_rel"] == pytest.approx((10 * 0.1 + 30 * 0.25) / 40)
    assert found["sq_rel"] == pytest.approx((10 * 0.2**2 / 2 + 30 * 1 / 4) / 40, rel=1e-5)
    assert found["delta_2"] == 1
    one_by_one = (10 * 0.2 + 30 * 1.0) / 40  # a root mean square for each image
    together = ((10 * 0.2**2 + 30 * 1.0) / 40) ** 0.5
    assert found["rmse"] == pytest.approx(one_by_one if task == "mono_depth" else together, rel=1e-5)


def test_videos_are_weighted_by_valid_pixels() -> None:
    own, first = scenes(2, 2), half_known()
    depth = torch.full((2, SIDE, SIDE), 2.0)
    oracle = Oracle(shots(2, 2), constant([2.2, 5.0]))
    found = evaluate_pi3(oracle, [first, Scene("b", own[1].images, depth)], METRIC, ["video_depth"])["video_depth"]
    number = 2 * SIDE**2
    errors = (10 * 0.1 + 30 * 0.25) / 40, (0.1 + 1.5) / 2
    assert found["abs_rel"] == pytest.approx((40 * errors[0] + number * errors[1]) / (40 + number), rel=1e-6)
    assert found["valid_pixels"] == 40 + number


def test_images_without_a_valid_pixel_weigh_nothing() -> None:
    own = half_known()
    oracle, number = Oracle(shots(1, 2), constant([2.2, 5.0])), 10
    assert own.depth is not None
    own.depth[1] = 0
    found = evaluate_pi3(oracle, [own], METRIC, ["mono_depth"])["mono_depth"]
    assert (found["abs_rel"], found["valid_pixels"]) == (pytest.approx(0.1), number)
    own.depth[0] = 0
    found = evaluate_pi3(oracle, [own], METRIC, ["mono_depth"])["mono_depth"]
    assert set(found.values()) == {0.0, 1}
    assert found["sequences"] == 1


def test_angles_are_of_all_pairs_of_all_sequences_and_distances_are_means() -> None:
    seen = [render_scene(0, 2, SIDE, SIDE), render_scene(1, 5, SIDE, SIDE)]
    own = [*rendered_scenes(0, 1, 2, SIDE), *rendered_scenes(1, 1, 5, SIDE)]
    oracle = Oracle(seen, noisy)
    found = evaluate_pi3(oracle, own, MEDIAN, ["pose"])["pose"]
    pairs, distances = [], []
    for scene in own:
        predicted, true = predict(oracle, scene.images)["camera_poses"].double(), scene.poses.double()  # pyright: ignore
        pairs.append(pair_angles(torch.linalg.inv(predicted), torch.linalg.inv(true)))
        distances.append(pose_distance(predicted, true))
    rotation, direction = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    assert len(rotation) == 1 + 10
    pooled = angle_summary(rotation, direction)
    assert {name: found[name] for name in pooled} == pytest.approx(pooled)
    for name in ("ate", "rpe_trans", "rpe_rot"):
        assert found[name] == pytest.approx((distances[0][name] + distances[1][name]) / 2)
    apart = [angle_summary(*pair)["auc@30"] for pair in pairs]
    assert found["auc@30"] != pytest.approx(np.mean(apart))  # not a mean over sequences


def test_points_are_means_over_sequences() -> None:
    oracle = Oracle(shots(), noisy)
    both, *alone = (
        evaluate_pi3(oracle, own, MEDIAN, ["points"])["points"] for own in (scenes(), scenes()[:1], scenes()[1:])
    )
    for name, value in both.items():
        if name != "sequences":
            assert value == pytest.approx((alone[0][name] + alone[1][name]) / 2), name
    assert alone[0]["acc_mean"] != alone[1]["acc_mean"]


# --- what counts ------------------------------------------------------------------------------------------------------


def test_sequences_without_truth_do_not_count() -> None:
    full = scenes(1)[0]
    single = next(rendered_scenes(0, 1, 1, SIDE))
    own = [
        full,
        Scene("images alone", full.images),
        Scene("depth alone", full.images, full.depth),
        Scene("no depth", full.images, poses=full.poses, intrinsics=full.intrinsics),
        single,
    ]
    oracle = Oracle([*shots(1), render_scene(0, 1, SIDE, SIDE)])
    found = evaluate_pi3(oracle, iter(own), MEDIAN)
    assert {name: rows["sequences"] for name, rows in found.items()} == {
        "mono_depth": 3,
        "video_depth": 2,
        "pose": 2,
        "points": 2,
    }
    assert found["mono_depth"]["valid_pixels"] == (3 + 3 + 1) * SIDE**2


def test_a_sequence_passes_once_and_only_where_it_is_needed() -> None:
    oracle = Oracle(shots(1))
    evaluate_pi3(oracle, scenes(1), MEDIAN, ["points", "pose", "video_depth"])
    assert oracle.seen == [(1, 3, 3, SIDE, SIDE)]
    evaluate_pi3(oracle, scenes(1), MEDIAN, ["mono_depth"])
    assert oracle.seen[1:] == [(3, 1, 3, SIDE, SIDE)]
    evaluate_pi3(oracle, [*scenes(1), Scene("no truth", torch.rand(2, 3, SIDE, SIDE))], MEDIAN, ["pose"])
    assert len(oracle.seen) == 3


def test_single_images_pass_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, oracle = Oracle(shots(1), noisy), Oracle(shots(1), noisy)
    at_once = mono_depth_rows(whole, scenes(1)[0], MEDIAN)
    monkeypatch.setattr("lowrank.pi3.evaluation.IMAGES_PER_PASS", 2)
    assert mono_depth_rows(oracle, scenes(1)[0], MEDIAN) == at_once
    assert IMAGES_PER_PASS >= 3
    assert [shape[:2] for shape in whole.seen] == [(3, 1)]
    assert [shape[:2] for shape in oracle.seen] == [(2, 1), (1, 1)]


@pytest.mark.parametrize(
    ("task", "own"),
    [
        ("mono_depth", [Scene("a", torch.rand(2, 3, SIDE, SIDE))]),
        ("video_depth", list(rendered_scenes(0, 1, 1, SIDE))),
        ("pose", list(rendered_scenes(0, 1, 1, SIDE))),
        ("points", [Scene("a", torch.rand(2, 3, SIDE, SIDE), poses=torch.eye(4).repeat(2, 1, 1))]),
        ("pose", []),
    ],
)
def test_a_task_without_truth_is_refused(task: str, own: list[Scene]) -> None:
    oracle = Oracle([render_scene(0, 1, SIDE, SIDE)])
    with pytest.raises(ValueError, match=f"`scenes` must hold a sequence with the truth that task '{task}' needs"):
        evaluate_pi3(oracle, own, MEDIAN, [task])


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`tasks` must be among \[.*'video_depth'\], got \['depth', 'normals'\]"):
        evaluate_pi3(Oracle([]), [], MEDIAN, ["pose", "normals", "depth"])


# --- sizes ------------------------------------------------------------------------------------------------------------


def cubic(values: list[float], size: int, a: float = -0.75) -> list[float]:
    """A row in another size, by the kernel written out; beyond the ends the last value goes on."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    found = []
    for index in range(size):
        at = (index + 0.5) * len(values) / size - 0.5
        near = range(int(np.floor(at)) - 1, int(np.floor(at)) + 3)
        found.append(sum(kernel(at - i) * values[min(max(i, 0), len(values) - 1)] for i in near))
    return found


@pytest.mark.parametrize("size", [4, 9, 12])
def test_depth_is_resized_by_the_cubic_kernel(size: int) -> None:
    row = [1.0, 4.0, 2.0, 8.0, 5.0, 7.0]
    wide = torch.tensor(row).expand(2, 5, 6)
    torch.testing.assert_close(resize_depth(wide, (5, size)), torch.tensor(cubic(row, size)).expand(2, 5, size))
    tall = torch.tensor(row)[:, None].expand(1, 6, 5)
    torch.testing.assert_close(
        resize_depth(tall, (size, 5)), torch.tensor(cubic(row, size))[:, None].expand(1, size, 5)
    )
    assert not torch.allclose(torch.tensor(cubic(row, size)), torch.tensor(cubic(row, size, a=-0.5)))


def test_points_are_averaged_over_what_a_smaller_pixel_covers() -> None:
    """By a triangle as wide as the step between pixels to either side: 1, 3, 3, 1 of 8 at half the size."""
    row = torch.tensor([0.0, 0, 0, 8, 0, 0, 0, 0, 0, 0])
    points = row[:, None].expand(1, 2, 10, 3)
    found = resize_points(points, (2, 5))
    torch.testing.assert_close(found, torch.tensor([0.0, 3, 1, 0, 0])[:, None].expand(1, 2, 5, 3))
    torch.testing.assert_close(resize_points(points.transpose(1, 2), (5, 2)), found.transpose(1, 2))


def test_what_has_the_size_stays_as_it_is() -> None:
    depth, points = torch.rand(2, 5, 6), torch.rand(2, 5, 6, 3)
    assert resize_depth(depth, (5, 6)) is depth
    assert resize_points(points, (5, 6)) is points


def slope(height: int, width: int) -> Tensor:
    """The depth of a slanted surface at the centres of pixels of any size."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return 2 + 0.5 * x + 1.5 * y


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (32, 40)])
def test_a_plane_stays_that_plane(size: tuple[int, int]) -> None:
    level = torch.full((2, 16, 24), 2.5)
    torch.testing.assert_close(resize_depth(level, size), torch.full((2, *size), 2.5))
    found, wanted = resize_depth(slope(16, 24)[None], size)[0], slope(*size)
    inner = (slice(2, -2), slice(2, -2)) if size[0] < 16 else (slice(4, -4), slice(4, -4))
    exact = size == (8, 12)  # where the kernel is read at halves; elsewhere it is off by up to 0.05 of a pixel's slope
    torch.testing.assert_close(
        found[inner], wanted[inner], atol=1e-6 if exact else 0.05 * (0.5 / 24 + 1.5 / 16), rtol=0
    )
    torch.testing.assert_close(
        resize_points(slope(16, 24)[None, :, :, None], (8, 12))[0, 1:-1, 1:-1, 0], slope(8, 12)[1:-1, 1:-1]
    )


def test_predictions_of_another_size_are_brought_to_that_of_the_truth() -> None:
    """Two walls at right angles to their cameras, seen at 24 x 24, known at 12 x 12 within a margin."""
    own, poses = shots(1, 2)[0], torch.eye(4).repeat(2, 1, 1)
    poses[1, :3, :3], poses[1, :3, 3] = FRAME[:3, :3].T, torch.tensor([0.3, 0.1, 0.0])

    def walls(side: int) -> tuple[Tensor, Tensor]:
        """Depth and local points; the focal length is the width."""
        depth = torch.tensor([2.0, 3.0])[:, None, None].expand(2, side, side).clone()
        at = (torch.arange(side) + 0.5) / side - 0.5
        y, x = torch.meshgrid(at, at, indexing="ij")
        return depth, torch.stack([x, y, torch.ones_like(x)], -1) * depth[..., None]

    depth, _ = walls(12)
    depth[:, [0, -1]], depth[:, :, [0, -1]] = 0.0, 0.0
    camera = torch.tensor([[12.0, 0, 6], [0, 12, 6], [0, 0, 1]]).expand(2, 3, 3)
    oracle = Oracle([Views(own.images, *walls(24), walls(24)[1], poses, 24.0)])
    found = evaluate_pi3(oracle, [Scene("walls", own.images, depth, poses, camera)], MEDIAN)
    assert found["mono_depth"]["valid_pixels"] == found["video_depth"]["valid_pixels"] == 2 * 100
    assert found["mono_depth"]["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert found["video_depth"]["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert found["pose"]["ate"] == pytest.approx(0, abs=1e-5)
    assert found["points"]["acc_mean"] == pytest.approx(0, abs=1e-5)
    assert found["points"]["comp_mean"] == pytest.approx(0, abs=1e-5)


# --- a real model -----------------------------------------------------------------------------------------------------


def test_one_scene_or_several_are_predicted_and_modes_stay() -> None:
    made, views = model(), images(2, 3, 3, 16, 24)
    made.train()
    made.decoder.eval()
    before = [module.training for module in made.modules()]
    several, single = predict(made, views), predict(made, views[1])
    assert [module.training for module in made.modules()] == before
    assert True in before
    assert False in before
    with torch.no_grad():
        wanted = made.eval()(views)
    assert several.keys() == single.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(several[name], value)
        torch.testing.assert_close(single[name], value[1], atol=1e-5, rtol=1e-4)
        assert not several[name].requires_grad


@pytest.mark.parametrize(("precision", "low"), [("fp32", False), ("bf16", True)])
def test_predictions_are_in_the_precision_asked_for_and_of_a_model_in_evaluation_mode(
    precision: str, low: bool
) -> None:
    class Recorder(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            states.append((torch.is_autocast_enabled("cpu"), self.training, torch.is_grad_enabled()))
            return {"product": images @ images.mT}

    states: list[tuple[bool, bool, bool]] = []
    found = predict(Recorder().train(), images(2, 3, 8, 8), precision)["product"]
    assert states == [(low, False, False)]
    assert found.dtype == (torch.bfloat16 if low else torch.float32)
    assert found.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_of_random_weights_is_evaluated_in_all_tasks(precision: str) -> None:
    own = scenes(1, 2)
    found = evaluate_pi3(model(), own, PROTOCOLS["scenes"], precision=precision)
    assert list(found) == list(GEOMETRY_TASKS)
    assert all(np.isfinite(value) for rows in found.values() for value in rows.values())
    outputs = predict(model(), own[0].images, precision)
    assert own[0].depth is not None
    wanted = depth_metrics(outputs["local_points"][..., 2], own[0].depth, "lad2")
    assert {name: found["video_depth"][name] for name in wanted} == pytest.approx(wanted)


def test_a_precision_that_is_none() -> None:
    with pytest.raises(ValueError, match="`precision` must be 'fp32' or 'bf16', got 'fp16'"):
        predict(model(), images(2, 3, 8, 8), "fp16")
