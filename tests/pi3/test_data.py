"""Sequences for π³: one rendered scene written in every published layout comes back from it, and what is missing is named."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from lowrank.pi3.calibration import load_source, split_of
from lowrank.pi3.data import load_scenes, rendered_scenes
from lowrank.pi3.layouts import LAYOUTS
from lowrank.pi3.scenes import SPLIT_SEEDS, Views, look_at, render_scene
from lowrank.pi3.sintel import read_sintel_camera, read_sintel_depth
from lowrank.pi3.small import SMALL_RECIPE

HEIGHT, WIDTH = 28, 42
NUMBERS = (0, 2, 10)  # of views: in another order by name than by number
TAG = np.float32(202021.25).tobytes()
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


def shot(seed: int) -> Views:
    return render_scene(seed, len(NUMBERS), HEIGHT, WIDTH)


def camera(views: Views) -> np.ndarray:
    return np.array([[views.focal, 0, WIDTH / 2], [0, views.focal, HEIGHT / 2], [0, 0, 1]])


def save_images(views: Views, names: list[str], folder: Path) -> None:
    for name, image in zip(names, views.images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / name, quality=98, subsampling=0)


def save_png(path: Path, depth: np.ndarray, unit: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((unit * depth).round().astype(np.uint16)).save(path)


def save_depth(views: Views, names: list[str], folder: Path, unit: float) -> None:
    for name, depth in zip(names, views.depth.double().numpy(), strict=True):
        save_png(folder / name, depth, unit)


def save_dpt(path: Path, depth: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = depth.shape
    path.write_bytes(TAG + np.array([width, height], "<i4").tobytes() + depth.astype("<f4").tobytes())


def save_cam(path: Path, intrinsics: np.ndarray, pose: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    into = np.linalg.inv(pose.astype(np.float64))[:3]
    intrinsics = intrinsics - np.array(
        [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
    )  # pixel centres are at whole numbers there
    path.write_bytes(TAG + intrinsics.astype("<f8").tobytes() + into.astype("<f8").tobytes())


def write_sintel(folder: Path, name: str, views: Views) -> str:
    training = folder / "training"
    save_images(views, [f"final/{name}/frame_{number:04d}.png" for number in NUMBERS], training)
    for number, depth, pose in zip(NUMBERS, views.depth.numpy(), views.poses.numpy(), strict=True):
        save_dpt(training / "depth" / name / f"frame_{number:04d}.dpt", depth)
        save_cam(training / "camdata_left" / name / f"frame_{number:04d}.cam", camera(views), pose)
    return name


def write_tum(folder: Path, name: str, views: Views) -> str:
    """Lists in the reverse order of time, whose times differ by a little."""
    names = [f"{1305031102 + number / 10:.6f}.png" for number in NUMBERS]
    save_images(views, [f"rgb/{file}" for file in names], folder / name)
    save_depth(views, [f"depth/{file}" for file in names], folder / name, 5000)
    images, depths, poses = [], [], []
    for number, pose in reversed(list(zip(NUMBERS, views.poses.double().numpy(), strict=True))):
        time = 1305031102 + number / 10
        images.append(f"{time:.6f} rgb/{time:.6f}.png")
        depths.append(f"{time + 0.015:.6f} depth/{time:.6f}.png")
        quaternion = Rotation.from_matrix(pose[:3, :3]).as_quat()
        poses.append(" ".join(f"{value:.7f}" for value in (time - 0.015, *pose[:3, 3], *quaternion)))
    for file, rows in {"rgb": images, "depth": depths, "groundtruth": poses}.items():
        (folder / name / f"{file}.txt").write_text("\n".join(["# a list", f"# of {file}", *rows, ""]))
    return name


def write_kitti(folder: Path, name: str, views: Views) -> str:
    drive = f"2011_09_26_drive_{name}_sync"
    save_images(views, [f"image/{drive}_image_{number:010d}_image_02.png" for number in NUMBERS], folder)
    names = [f"groundtruth_depth/{drive}_groundtruth_depth_{number:010d}_image_02.png" for number in NUMBERS]
    save_depth(views, names, folder, 256)
    return drive


def write_seven_scenes(folder: Path, name: str, views: Views) -> str:
    """Two sequences, of which the split names the second."""
    for sequence in ("seq-01", "seq-03"):
        stems = [f"{sequence}/frame-{number:06d}" for number in NUMBERS]
        save_images(views, [f"{stem}.color.png" for stem in stems], folder / name)
        save_depth(views, [f"{stem}.depth.png" for stem in stems], folder / name, 1000)
        for stem, pose in zip(stems, views.poses.numpy(), strict=True):
            np.savetxt(folder / name / f"{stem}.pose.txt", pose, delimiter="\t ")
    (folder / name / "TestSplit.txt").write_text("sequence3\n")
    return f"{name}/seq-03"


def write_nrgbd(folder: Path, name: str, views: Views) -> str:
    """Poses of all numbers up to the last, of which only some have views."""
    save_images(views, [f"images/img{number}.png" for number in NUMBERS], folder / name)
    save_depth(views, [f"depth/depth{number}.png" for number in NUMBERS], folder / name, 1000)
    poses = np.full((max(NUMBERS) + 1, 4, 4), np.nan)
    poses[list(NUMBERS)] = views.poses.double().numpy() @ OPENGL
    np.savetxt(folder / name / "poses.txt", poses.reshape(-1, 4))
    (folder / name / "focal.txt").write_text(f"{views.focal}\n")
    return name


def write_scannet(folder: Path, name: str, views: Views) -> str:
    save_images(views, [f"color/{number}.jpg" for number in NUMBERS], folder / name)
    save_depth(views, [f"depth/{number}.png" for number in NUMBERS], folder / name, 1000)
    intrinsics = np.eye(4)
    intrinsics[:3, :3] = camera(views)
    files = {f"pose/{number}.txt": pose for number, pose in zip(NUMBERS, views.poses.numpy(), strict=True)}
    for file, matrix in {**files, "intrinsic/intrinsic_depth.txt": intrinsics}.items():
        (folder / name / file).parent.mkdir(exist_ok=True)
        np.savetxt(folder / name / file, matrix)
    return name


def write_pictures(folder: Path, name: str, views: Views) -> str:
    save_images(views, [f"{number:02d}.png" for number in NUMBERS], folder / name)
    return name


@dataclass(frozen=True)
class Written:
    """How a sequence is written, the most that its depth is off by, and what belongs to it."""

    write: Callable[[Path, str, Views], str]
    step: float = 0.0
    poses: bool = True
    intrinsics: bool = True
    depth: bool = True


WRITTEN = {
    "sintel": Written(write_sintel),
    "bonn": Written(write_tum, 1 / 5000, intrinsics=False),
    "tum": Written(write_tum, 1 / 5000, intrinsics=False),
    "kitti": Written(write_kitti, 1 / 256, poses=False, intrinsics=False),
    "7scenes": Written(write_seven_scenes, 1 / 1000),
    "nrgbd": Written(write_nrgbd, 1 / 1000),
    "scannet": Written(write_scannet, 1 / 1000),
    "pictures": Written(write_pictures, poses=False, intrinsics=False, depth=False),
}


def test_every_layout_is_written_here() -> None:
    assert set(WRITTEN) == set(LAYOUTS)


@pytest.mark.parametrize("layout", WRITTEN)
def test_sequences_come_back_as_written(layout: str, tmp_path: Path) -> None:
    form, shots = WRITTEN[layout], {}
    for seed, name in enumerate(("0005", "0002")):
        shots[form.write(tmp_path, name, shot(seed))] = shot(seed)
    found = list(load_scenes(layout, tmp_path, width=WIDTH))
    assert [scene.name for scene in found] == sorted(shots)
    for scene in found:
        views = shots[scene.name]
        assert scene.images.shape == (3, 3, HEIGHT, WIDTH)
        assert (scene.images - views.images).abs().max() < (0.15 if layout == "scannet" else 0.003)  # JPEG
        assert [part is not None for part in (scene.depth, scene.poses, scene.intrinsics)] == [
            form.depth,
            form.poses,
            form.intrinsics,
        ]
        if scene.depth is not None:
            torch.testing.assert_close(scene.depth, views.depth.double(), atol=0.51 * form.step, rtol=0)
        if scene.poses is not None:
            torch.testing.assert_close(scene.poses, views.poses.double(), atol=1e-6, rtol=0)
        if scene.intrinsics is not None:
            own = [[525, 0, 320], [0, 525, 240], [0, 0, 1]] if layout == "7scenes" else camera(views)
            np.testing.assert_allclose(scene.intrinsics, np.broadcast_to(own, (3, 3, 3)), rtol=1e-12)
        assert (scene.points is not None) == form.intrinsics
        if scene.points is not None and layout != "7scenes":  # whose camera is not the rendered one
            torch.testing.assert_close(scene.points, views.points.double(), atol=form.step + 1e-5, rtol=0)


@pytest.mark.parametrize("layout", WRITTEN)
def test_images_are_by_default_in_the_size_that_users_load(layout: str, tmp_path: Path) -> None:
    WRITTEN[layout].write(tmp_path, "0005", shot(0))
    (scene,) = load_scenes(layout, tmp_path, most=1)
    assert scene.images.shape == (1, 3, 406, 616)
    (scene,) = load_scenes(layout, tmp_path, most=1, patch=16)
    assert scene.images.shape == (1, 3, 400, 624)


@pytest.mark.parametrize("layout", WRITTEN)
def test_a_sequence_is_read_when_it_is_asked_for(layout: str, tmp_path: Path) -> None:
    names = sorted(WRITTEN[layout].write(tmp_path, name, shot(seed)) for seed, name in enumerate(("0002", "0005")))
    for path in tmp_path.rglob("*.*g"):
        if "0005" in str(path):
            path.write_bytes(path.read_bytes()[:100])
    scenes = load_scenes(layout, tmp_path, width=WIDTH)
    assert next(scenes).name == names[0]
    with pytest.raises(ValueError, match="must be an image that can be read, got .*0005"):
        next(scenes)
    assert [scene.name for scene in load_scenes(layout, tmp_path, width=WIDTH, sequences=names[:1])] == names[:1]


@pytest.mark.parametrize("layout", WRITTEN)
def test_an_unknown_sequence_is_named_with_those_that_there_are(layout: str, tmp_path: Path) -> None:
    name = WRITTEN[layout].write(tmp_path, "0005", shot(0))
    with pytest.raises(FileNotFoundError, match=rf"must be among \['{name}'\] of .*, got \['other'\]"):
        load_scenes(layout, tmp_path, sequences=[name, "other"])


def test_sequences_come_in_the_order_asked_for(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        write_scannet(tmp_path, name, shot(seed))
    found = load_scenes("scannet", tmp_path, width=WIDTH, sequences=("c", "a"), most=1)
    assert [scene.name for scene in found] == ["c", "a"]


@pytest.mark.parametrize(
    ("layout", "missing"),
    [
        ("sintel", "training/final"),
        ("sintel", "training/final/0005"),
        ("tum", "0005/rgb.txt"),
        ("tum", "0005/depth.txt"),
        ("tum", "0005/groundtruth.txt"),
        ("tum", "0005/rgb/1305031102.200000.png"),
        ("bonn", "0005/depth/1305031102.200000.png"),
        ("kitti", "image"),
        ("kitti", "groundtruth_depth"),
        ("7scenes", "0005/TestSplit.txt"),
        ("7scenes", "0005/seq-03"),
        ("7scenes", "0005/seq-03/frame-000002.pose.txt"),
        ("7scenes", "0005/seq-03/frame-000002.depth.png"),
        ("nrgbd", "0005/images"),
        ("nrgbd", "0005/depth"),
        ("nrgbd", "0005/poses.txt"),
        ("nrgbd", "0005/focal.txt"),
        ("nrgbd", "0005/depth/depth2.png"),
        ("scannet", "0005/color"),
        ("scannet", "0005/depth"),
        ("scannet", "0005/pose"),
        ("scannet", "0005/intrinsic/intrinsic_depth.txt"),
        ("scannet", "0005/depth/2.png"),
        ("scannet", "0005/pose/2.txt"),
    ],
)
def test_what_is_missing_is_named(layout: str, missing: str, tmp_path: Path) -> None:
    WRITTEN[layout].write(tmp_path, "0005", shot(0))
    assert len(list(load_scenes(layout, tmp_path, width=WIDTH))) == 1
    path = tmp_path / missing
    (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    named = {
        "training/final/0005": f"none in {tmp_path}",  # the only one
        "0005/rgb.txt": "<sequence>/rgb.txt is missing",
    }.get(missing, missing)
    with pytest.raises(FileNotFoundError, match=re.escape(named)):
        list(load_scenes(layout, tmp_path, width=WIDTH))


@pytest.mark.parametrize(
    ("layout", "folder"), [("sintel", "training/final/0005"), ("kitti", "image"), ("pictures", ".")]
)
def test_a_folder_without_images_is_named(layout: str, folder: str, tmp_path: Path) -> None:
    WRITTEN[layout].write(tmp_path, "0005", shot(0))
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=f"must hold images .*, got none in {tmp_path / folder}"):
        list(load_scenes(layout, tmp_path))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_without_sequences_is_named(layout: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        list(load_scenes(layout, tmp_path))


def test_a_sequence_without_views_is_named(tmp_path: Path) -> None:
    write_seven_scenes(tmp_path, "chess", shot(0))
    for path in tmp_path.rglob("*.color.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="sequence 'chess/seq-03' must have at least one view"):
        next(load_scenes("7scenes", tmp_path))


def test_arguments_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`layout` must be one of \['7scenes', .*'tum'\], got 'vkitti'"):
        load_scenes("vkitti", tmp_path)
    for name in ("every", "most"):
        with pytest.raises(ValueError, match=f"`{name}` must be >= 1, got 0"):
            load_scenes("pictures", tmp_path, **{name: 0})
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(FileNotFoundError, match=f"`folder` must be a folder .*'sintel', got {tmp_path / name}"):
            load_scenes("sintel", tmp_path / name)


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, [0, 1, 2, 3, 4]), ({"every": 2}, [0, 2, 4]), ({"most": 2}, [0, 1]), ({"every": 2, "most": 2}, [0, 2])],
)
@pytest.mark.parametrize("inner", [".", "inner"])
def test_every_so_many_views_and_at_most_so_many(options: dict, kept: list[int], inner: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / inner).mkdir(parents=True)
    (folder / "empty").mkdir()
    for level in range(5):
        Image.new("L", (WIDTH, HEIGHT), level).save(folder / inner / f"{level}.png")
    (scene,) = load_scenes("pictures", str(folder), width=WIDTH, **options)
    assert scene.name == ("pictures" if inner == "." else "inner")
    assert (255 * scene.images.mean((1, 2, 3))).round().tolist() == kept


@pytest.mark.parametrize(
    ("layout", "file", "lost"),
    [
        ("sintel", "training/depth/0005/frame_0002.dpt", {"depth"}),
        ("sintel", "training/camdata_left/0005/frame_0002.cam", {"poses", "intrinsics"}),
        ("kitti", "groundtruth_depth/2011_09_26_drive_0005_sync_groundtruth_depth_0000000002_image_02.png", {"depth"}),
    ],
)
def test_what_one_view_lacks_is_left_out_of_its_sequence(layout: str, file: str, lost: set, tmp_path: Path) -> None:
    WRITTEN[layout].write(tmp_path, "0005", shot(0))
    (whole,) = load_scenes(layout, tmp_path, width=WIDTH)
    (tmp_path / file).unlink()
    (scene,) = load_scenes(layout, tmp_path, width=WIDTH)
    assert len(scene.images) == len(NUMBERS)
    there = {name for name in ("depth", "poses", "intrinsics") if getattr(whole, name) is not None}
    assert {name for name in there if getattr(scene, name) is None} == lost
    assert scene.points is None
    (first,) = load_scenes(layout, tmp_path, width=WIDTH, most=1)  # which lacks nothing
    assert all(getattr(first, name) is not None for name in there)


@pytest.mark.parametrize("layout", ["scannet", "nrgbd"])
def test_views_without_a_finite_pose_are_left_out(layout: str, tmp_path: Path) -> None:
    WRITTEN[layout].write(tmp_path, "0005", shot(0))
    if layout == "scannet":
        (tmp_path / "0005/pose/2.txt").write_text("-inf -inf -inf -inf\n" * 4)
    else:
        poses = np.loadtxt(tmp_path / "0005/poses.txt").reshape(-1, 4, 4)
        poses[2] = np.nan
        np.savetxt(tmp_path / "0005/poses.txt", poses.reshape(-1, 4))
    (scene,) = load_scenes(layout, tmp_path, width=WIDTH)
    views, kept = shot(0), [0, 2]
    assert scene.images.shape[0] == scene.intrinsics.shape[0] == 2
    torch.testing.assert_close(scene.depth, views.depth[kept].double(), atol=6e-4, rtol=0)
    torch.testing.assert_close(scene.poses, views.poses[kept].double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("7scenes", "seq-03/frame-000002.depth.png"),
        ("7scenes", "seq-03/frame-000002.depth.proj.png"),
        ("nrgbd", "depth/depth2.png"),
    ],
)
def test_depth_that_is_not_known_is_zero(layout: str, file: str, tmp_path: Path) -> None:
    """Registered depth, where there is some, is what is read."""
    WRITTEN[layout].write(tmp_path, "0005", shot(0))
    depth = np.full((HEIGHT, WIDTH), 3.25)
    depth[0, :5] = 65.535, 10.001, 10, 0.001, 0
    save_png(tmp_path / "0005" / file, depth, 1000)
    (scene,) = load_scenes(layout, tmp_path, width=WIDTH)
    assert scene.depth[1, 0, :6].tolist() == [0, 0, 10, 0.001, 0, 3.25]
    assert (scene.depth[1, 1:] == 3.25).all()
    torch.testing.assert_close(scene.depth[[0, 2]], shot(0).depth[[0, 2]].double(), atol=6e-4, rtol=0)


@pytest.mark.parametrize(
    ("layout", "file", "unit"),
    [
        ("kitti", "groundtruth_depth/2011_09_26_drive_0005_sync_groundtruth_depth_0000000002_image_02.png", 256),
        ("tum", "0005/depth/1305031102.200000.png", 5000),
        ("scannet", "0005/depth/2.png", 1000),
    ],
)
def test_depth_of_other_layouts_has_no_bound(layout: str, file: str, unit: int, tmp_path: Path) -> None:
    WRITTEN[layout].write(tmp_path, "0005", shot(0))
    depth = np.full((HEIGHT, WIDTH), 13.0)
    depth[3, 4] = 0
    save_png(tmp_path / file, depth, unit)
    (scene,) = load_scenes(layout, tmp_path, width=WIDTH)
    np.testing.assert_array_equal(scene.depth[1], depth)


def test_pictures_and_truth_belong_together_by_time(tmp_path: Path) -> None:
    views = render_scene(0, 5, HEIGHT, WIDTH)
    names = [f"{number}.png" for number in range(5)]
    save_images(views, [f"rgb/{name}" for name in names], tmp_path / "desk")
    save_depth(views, [f"depth/{name}" for name in names], tmp_path / "desk", 5000)
    lists = {
        "rgb": [(number, f"rgb/{number}.png") for number in range(5)],
        # 1 is too far from its depth, 3 from its pose; of 4, another one is near, but less so
        "depth": [(number + (0.021, 0.021, -0.019, 0, 0.004)[number], f"depth/{number}.png") for number in range(5)],
        "groundtruth": [],
    }
    lists["depth"] += [(0.002, "depth/0.png"), (4.01, "depth/1.png"), (3.99, "depth/1.png")]
    for number, pose in enumerate(views.poses.double().numpy()):
        time = number + (0, 0, 0.018, 0.03, -0.01)[number]
        lists["groundtruth"].append((time, *pose[:3, 3], *Rotation.from_matrix(pose[:3, :3]).as_quat()))
    for name, rows in lists.items():
        (tmp_path / "desk" / f"{name}.txt").write_text("\n".join(" ".join(map(str, row)) for row in rows))
    (tmp_path / "notes").mkdir()
    (scene,) = load_scenes("tum", tmp_path, width=WIDTH)
    kept = [0, 2, 4]
    assert (scene.images - views.images[kept]).abs().max() < 0.003
    torch.testing.assert_close(scene.depth, views.depth[kept].double(), atol=2e-4, rtol=0)
    torch.testing.assert_close(scene.poses, views.poses[kept].double(), atol=1e-6, rtol=0)
    (tmp_path / "desk" / "depth.txt").write_text("# nothing\n")
    with pytest.raises(FileNotFoundError, match="sequence 'desk' must have at least one view"):
        next(load_scenes("tum", tmp_path))


def test_quaternions_by_hand(tmp_path: Path) -> None:
    """A quarter turn about z takes x to y; its length does not count."""
    write_tum(tmp_path, "desk", shot(0))
    (tmp_path / "desk" / "groundtruth.txt").write_text("1305031102.0 1 2 3 0 0 0.5 0.5\n")
    (scene,) = load_scenes("tum", tmp_path, width=WIDTH)
    turned = [[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]
    np.testing.assert_allclose(scene.poses, [turned], atol=1e-12)


@pytest.mark.parametrize("cut", [1, 4, HEIGHT * WIDTH * 4, HEIGHT * WIDTH * 4 + 1])
def test_a_depth_file_cut_short(cut: int, tmp_path: Path) -> None:
    path, depth = tmp_path / "a.dpt", np.arange(HEIGHT * WIDTH, dtype=np.float64).reshape(HEIGHT, WIDTH)
    save_dpt(path, depth)
    np.testing.assert_array_equal(read_sintel_depth(path), depth)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    named = (
        "must hold 42 x 28 values of 4 bytes, got" if cut <= HEIGHT * WIDTH * 4 else "must be a Sintel .dpt file, got"
    )
    with pytest.raises(ValueError, match=f"{named} .*a.dpt"):
        read_sintel_depth(path)
    path.write_bytes(content + b"abcd")
    with pytest.raises(ValueError, match="must hold 42 x 28 values of 4 bytes, got 4708 bytes in .*a.dpt"):
        read_sintel_depth(path)


@pytest.mark.parametrize("content", [b"", b"PI", TAG, 168 * b"\x00", 172 * b"\x00"])
def test_sintel_files_that_are_none(content: bytes, tmp_path: Path) -> None:
    write_sintel(tmp_path, "0005", shot(0))
    depth, pose = (next(tmp_path.rglob(f"*.{suffix}")) for suffix in ("dpt", "cam"))
    assert read_sintel_camera(pose)[0].shape == (3, 3)
    depth.write_bytes(content)
    with pytest.raises(ValueError, match=f"must be a Sintel .dpt file, got {depth}"):
        list(load_scenes("sintel", tmp_path))
    pose.write_bytes(content)
    with pytest.raises(ValueError, match=f"must be a Sintel .cam file, got {pose}"):
        list(load_scenes("sintel", tmp_path))


@pytest.mark.parametrize("height", [480, 490])
@pytest.mark.parametrize("normal", [(0.0, 0.0, 1.0), (0.6, 0.5, 1.0), (-0.7, 0.1, 0.8)])
def test_truth_of_another_width_lies_on_the_same_plane(height: int, normal: tuple, tmp_path: Path) -> None:
    """To the accuracy of the nearest pixel: half of one, and nothing on average. One height is cut at the sides, the other above
    and below."""
    focal, centre = np.array([500.0, 520.0]), np.array([311.0, 251.0])
    y, x = np.mgrid[:height, :640] + 0.5
    rays = np.stack([(x - centre[0]) / focal[0], (y - centre[1]) / focal[1], np.ones_like(x)], -1)
    depth = 2 / (rays @ normal)
    assert depth.min() > 0
    pose = look_at(np.array([1.0, 0.3, -2.0]), np.zeros(3), 0.4)
    intrinsics = np.array([[focal[0], 0, centre[0]], [0, focal[1], centre[1]], [0, 0, 1]])
    training = tmp_path / "training"
    (training / "final/plane").mkdir(parents=True)
    gray = Image.new("L", (640, height))
    gray.save(training / "final/plane/frame_0001.png")
    save_dpt(training / "depth/plane/frame_0001.dpt", depth)
    save_cam(training / "camdata_left/plane/frame_0001.cam", intrinsics, pose)
    (scene,) = load_scenes("sintel", tmp_path, width=518)
    (sized,) = load_scenes("sintel", tmp_path, width=518, truth_width=518)
    assert scene.depth.shape == (1, height, 640)
    np.testing.assert_allclose(scene.intrinsics[0], intrinsics, rtol=1e-12)
    assert sized.images.shape == (1, 3, 392, 518)
    assert sized.depth.shape == (1, 392, 518)
    assert torch.isin(sized.depth, scene.depth).all()
    for found, share in ((scene, 1e-5), (sized, 1)):
        local = (found.points[0].numpy() - pose[:3, 3]) @ pose[:3, :3]
        off = local @ normal - 2
        half = local[..., 2] * np.abs(np.array(normal[:2]) / focal / 2).sum()
        assert (np.abs(off) <= share * half + 1e-5).all()
        assert abs(off.mean()) <= 0.02 * half.mean() + 1e-5
    scale = max(518 / 640, 392 / height)
    moved = scale * (centre - [320, height / 2]) + [259, 196]  # as far from the middle as before
    expected = [[scale * focal[0], 0, moved[0]], [0, scale * focal[1], moved[1]], [0, 0, 1]]
    np.testing.assert_allclose(sized.intrinsics[0], expected, rtol=1e-12)


def test_truth_of_its_own_width_and_of_one_without_intrinsics(tmp_path: Path) -> None:
    write_scannet(tmp_path / "scannet", "0005", shot(0))
    (scene,) = load_scenes("scannet", tmp_path / "scannet", width=WIDTH)
    (same,) = load_scenes("scannet", tmp_path / "scannet", width=WIDTH, truth_width=WIDTH)
    assert torch.equal(scene.depth, same.depth)
    assert torch.equal(scene.intrinsics, same.intrinsics)
    write_kitti(tmp_path / "kitti", "0005", shot(0))
    (twice,) = load_scenes("kitti", tmp_path / "kitti", width=WIDTH, truth_width=2 * WIDTH)
    (once,) = load_scenes("kitti", tmp_path / "kitti", width=WIDTH)
    assert torch.equal(twice.depth, once.depth.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert twice.intrinsics is None


def test_rendered_scenes_are_those_of_their_seeds() -> None:
    found = list(rendered_scenes(first=3, scenes=2, views=3, side=28))
    assert [scene.name for scene in found] == ["3", "4"]
    for seed, scene in zip((3, 4), found, strict=True):
        views = render_scene(seed, 3, 28, 28)
        assert torch.equal(scene.images, views.images)
        assert torch.equal(scene.depth, views.depth)
        assert torch.equal(scene.poses, views.poses)
        assert scene.intrinsics.shape == (3, 3, 3)
        torch.testing.assert_close(scene.points.float(), views.points, atol=1e-5, rtol=0)


# --- splits -----------------------------------------------------------------------------------------------------------

RENDERED = {"layout": "scenes", "scenes": 2, "views": 1, "side": 8}
FROZEN = "0123456789abcdef"


def test_no_rendered_scene_is_in_two_splits() -> None:
    for one, split in SPLIT_SEEDS.items():
        assert split.step == 1
        for other in set(SPLIT_SEEDS) - {one}:
            assert split.stop <= SPLIT_SEEDS[other].start or SPLIT_SEEDS[other].stop <= split.start
    assert SMALL_RECIPE.steps * SMALL_RECIPE.batch_size <= len(SPLIT_SEEDS["pretraining"])


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_source_of_rendered_scenes_stays_in_its_split(split: str) -> None:
    found = [list(load_source(RENDERED | {"split": split}, seed, FROZEN)) for seed in (0, 3)]
    names = [int(scene.name) for scenes in found for scene in scenes]
    assert names == [SPLIT_SEEDS[split].start + offset for offset in (0, 1, 6, 7)]
    assert all(name in SPLIT_SEEDS[split] for name in names)


@pytest.mark.parametrize("source", [RENDERED, RENDERED | {"split": "test"}, {"layout": "sintel", "folder": "x"}])
def test_a_source_of_test_is_closed_until_choices_are_frozen(source: dict) -> None:
    assert split_of(source) == "test"
    for frozen in (None, "", "yes"):
        with pytest.raises(ValueError, match=r"`frozen` must be 16 hex digits"):
            load_source(source, 0, frozen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "dev"}, "`split` must be one of .* got 'dev'"),
        ({"split": "pretraining"}, "`split` must be one of .* got 'pretraining'"),
        ({"split": "train", "first": 200_000}, "`source` must hold the options of layout 'scenes'"),
        ({"split": "train", "scenes": 100_001}, "`scenes` must be at most 100000, .* got 100001"),
    ],
)
def test_a_source_that_would_leave_its_split_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_source(RENDERED | changes)
    with pytest.raises(ValueError, match="`scenes` must be at most 0, .* got 60000"):
        load_source(RENDERED | {"split": "train", "scenes": 60_000}, seed=2)


# --- files that are not what they should be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("rgb.txt", "1305031102.1\n", "start with 1 finite numbers"),
        ("rgb.txt", "first rgb/first.png\n", "start with 1 finite numbers .*got 'first rgb/first.png'"),
        ("depth.txt", "nan depth/first.png\n", "start with 1 finite numbers"),
        ("groundtruth.txt", "1305031102.1 1 2 3\n", "start with 8 finite numbers"),
        ("groundtruth.txt", "1305031102.1 1 2 3 0 0 0 one\n", "start with 8 finite numbers"),
        ("groundtruth.txt", "1305031102.1 1 2 3 0 0 0 0\n", "start with 8 finite numbers"),
    ],
)
def test_a_row_of_a_list_without_its_numbers_is_named(tmp_path, file, text, words) -> None:
    name = write_tum(tmp_path, "one", shot(0))
    (tmp_path / name / file).write_text(text)
    with pytest.raises(ValueError, match=f"`folder` must have lists whose rows {words}"):
        LAYOUTS["tum"].frames(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "words"), [("1 2\n", "4 x 4 numbers .*got 2"), ("a b\n", "text files of numbers"), ("", "got 0")]
)
@pytest.mark.parametrize(
    ("layout", "write", "file"),
    [
        ("7scenes", write_seven_scenes, "seq-03/frame-000002.pose.txt"),
        ("scannet", write_scannet, "pose/2.txt"),
        ("scannet", write_scannet, "intrinsic/intrinsic_depth.txt"),
        ("nrgbd", write_nrgbd, "poses.txt"),
    ],
)
def test_a_matrix_of_another_size_is_named(tmp_path, layout, write, file, text, words) -> None:
    write(tmp_path, "one", shot(0))
    (tmp_path / "one" / file).write_text(text)
    sequence = tmp_path / "one" / "seq-03" if layout == "7scenes" else tmp_path / "one"
    with pytest.raises(ValueError, match=f"`folder` must have .*{words}"):
        LAYOUTS[layout].frames(sequence)


@pytest.mark.parametrize(("width", "height"), [(-4, -5), (0, 0), (2**31 - 1, 2)])
def test_sizes_of_depth_that_no_image_has_are_refused(tmp_path, width, height) -> None:
    (path := tmp_path / "a.dpt").write_bytes(TAG + np.array([width, height], "<i4").tobytes() + bytes(80))
    with pytest.raises(ValueError, match="`path` must hold"):
        read_sintel_depth(path)
