"""Find the sequences and frames of published data sets with depth and poses on disk.

Listing sequences opens nothing but lists of them. The frames of a sequence are read on request, their images and depth later.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lowrank.io.checks import require
from lowrank.pi3.frames import list_images
from lowrank.pi3.layout_files import Frame, list_folders, read_numbers, read_png_depth, require_path
from lowrank.pi3.sintel import list_sintel, read_sintel_depth, sintel_frames
from lowrank.pi3.tum import list_tum, tum_frames


def _list_kitti(folder: Path) -> dict[str, Path]:
    images, _ = (
        require_path(folder, part, layout="KITTI's val_selection_cropped") for part in ("image", "groundtruth_depth")
    )
    drives = dict.fromkeys(image.name.partition("_image_")[0] for image in list_images(images))
    return {drive: images / drive for drive in drives}


def _kitti_frames(drive: Path) -> list[Frame]:
    """List `{image,groundtruth_depth}/<drive>_{image,groundtruth_depth}_<number>_<camera>.png`, the cropped selection."""
    frames = []
    for image in list_images(drive.parent):
        if image.name.partition("_image_")[0] == drive.name:
            depth = drive.parents[1] / "groundtruth_depth" / image.name.replace("_image_", "_groundtruth_depth_", 1)
            frames.append(Frame(image, depth if depth.exists() else None))
    return frames


def _list_seven_scenes(folder: Path) -> dict[str, Path]:
    """List the sequences that `<scene>/TestSplit.txt` names."""
    sequences: dict[str, Path] = {}
    for scene in list_folders(folder):
        split = require_path(folder, scene, "TestSplit.txt", layout="7-Scenes")
        for line in split.read_text(encoding="utf8").split():
            digits = "".join(filter(str.isdecimal, line))
            require(0 < len(digits) < 10, "folder", f"name a sequence with a number in each line of {split}", line)
            name = f"seq-{int(digits):02d}"
            sequences[f"{scene}/{name}"] = require_path(folder, scene, name, layout="7-Scenes")
    return sequences


def _seven_scenes_frames(sequence: Path) -> list[Frame]:
    """List `<scene>/seq-01/frame-000000.{color.png,depth.png,pose.txt}`; prefer registered depth, `.depth.proj.png`."""
    intrinsics, frames = np.array([[525.0, 0, 320], [0, 525.0, 240], [0, 0, 1]]), []
    for image in sorted(sequence.glob("frame-*.color.png")):
        stem = image.name.removesuffix(".color.png")
        registered = image.with_name(f"{stem}.depth.proj.png")
        depth = registered if registered.exists() else image.with_name(f"{stem}.depth.png")
        pose = read_numbers(require_path(sequence, f"{stem}.pose.txt", layout="7-Scenes"), 4, 4)
        frames.append(Frame(image, depth, pose, intrinsics))
    return frames


def _nrgbd_frames(scene: Path) -> list[Frame]:
    """List `<scene>/{images/img0.png,depth/depth0.png,poses.txt,focal.txt}`, and turn its cameras from -z, y up to z, y down."""
    images, depth, *texts = (
        require_path(scene, name, layout="NRGBD") for name in ("images", "depth", "poses.txt", "focal.txt")
    )
    poses = read_numbers(texts[0], -1, 4, 4) @ np.diag([1.0, -1.0, -1.0, 1.0])
    focal = float(read_numbers(texts[1], -1)[0])
    require(np.isfinite(focal) and focal > 0, "folder", f"have a focal length > 0 in {texts[1]}", focal)
    numbered = {_read_number(path, "img"): path for path in list_images(images)}
    if max(numbered) >= len(poses):
        raise ValueError(f"`poses.txt` must have a pose for image {max(numbered)}, got {len(poses)} in {scene}.")
    frames = []
    for number, image in sorted(numbered.items()):
        with Image.open(image) as picture:
            width, height = picture.size
        intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        frames.append(Frame(image, depth / f"depth{number}.png", poses[number], intrinsics))
    return frames


def _scannet_frames(scene: Path) -> list[Frame]:
    """List `<scene>/{color/0.jpg,depth/0.png,pose/0.txt,intrinsic/intrinsic_depth.txt}`, as ScanNet's reader exports them."""
    color, depth, pose, camera = (
        require_path(scene, *parts, layout="an export of ScanNet")
        for parts in (("color",), ("depth",), ("pose",), ("intrinsic", "intrinsic_depth.txt"))
    )
    intrinsics = read_numbers(camera, 4, 4)[:3, :3]
    require(bool(np.isfinite(intrinsics).all()), "folder", f"have finite intrinsics in {camera}", intrinsics.tolist())
    return [
        Frame(
            image,
            depth / f"{image.stem}.png",
            read_numbers(require_path(pose, f"{image.stem}.txt", layout="an export of ScanNet"), 4, 4),
            intrinsics,
        )
        for image in sorted(list_images(color), key=_read_number)
    ]


def _read_number(image: Path, prefix: str = "") -> int:
    digits = image.stem.removeprefix(prefix)
    require(digits.isdecimal(), "folder", f"name images by {prefix or 'their'} number", str(image))
    return int(digits)


def _list_picture_folders(folder: Path) -> dict[str, Path]:
    """List the folders in a folder that have files, or the folder itself if there is none."""
    inner = {name: path for name, path in list_folders(folder).items() if any(path.glob("*"))}
    return inner or {folder.name: folder}


def _picture_frames(folder: Path) -> list[Frame]:
    """List the images of a folder, without depth and poses."""
    return [Frame(image) for image in list_images(folder)]


def _read_millimetres(path: Path) -> np.ndarray:
    return read_png_depth(path, 1000, 1e-3, 10.0)  # 65535 marks unknown depth


@dataclass(frozen=True)
class Layout:
    """Hold the functions that read one data set.

    **Arguments**

    - `sequences`: `(folder) -> {name: path}`, the sequences of a copy of the data set.
    - `frames`: `(path) -> list of Frame`, the views of a sequence in order.
    - `depth`: `(file) -> (h, w)`, depth in metres, 0 where it is unknown; None if the data set has no depth.
    """

    sequences: Callable[[Path], dict[str, Path]]
    frames: Callable[[Path], list[Frame]]
    depth: Callable[[Path], np.ndarray] | None = None


LAYOUTS: Mapping[str, Layout] = {
    "sintel": Layout(list_sintel, sintel_frames, read_sintel_depth),
    "bonn": Layout(list_tum, tum_frames, lambda path: read_png_depth(path, 5000)),
    "tum": Layout(list_tum, tum_frames, lambda path: read_png_depth(path, 5000)),
    "kitti": Layout(_list_kitti, _kitti_frames, lambda path: read_png_depth(path, 256)),
    "7scenes": Layout(_list_seven_scenes, _seven_scenes_frames, _read_millimetres),
    "nrgbd": Layout(list_folders, _nrgbd_frames, _read_millimetres),
    "scannet": Layout(list_folders, _scannet_frames, lambda path: read_png_depth(path, 1000)),
    "pictures": Layout(_list_picture_folders, _picture_frames),
}
