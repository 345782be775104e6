"""Sequences to calibrate and evaluate π³ on: data sets in their published layouts, and rendered scenes, in one form.

A layout is a function from a folder to the frames of each sequence, and a function that reads a depth file: nothing is opened
before it is asked for.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lowrank.pi3.frames import image_files, load_images, opened, sized_by_width
from lowrank.pi3.scenes import render_scene

SINTEL_TAG = 202021.25  # the first float of every .dpt and .cam file
TUM_PAUSE = 0.02  # seconds between a picture and the depth or pose that belongs to it, at most


@dataclass(frozen=True, eq=False)
class Frame:
    """Files and numbers of one view: `pose`, camera to world (4, 4), x right, y down, z forward; `intrinsics` (3, 3), of the
    depth's pixels, whose centres are at halves. None where the data set has none."""

    image: Path
    depth: Path | None = None
    pose: np.ndarray | None = None
    intrinsics: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """Views of one sequence. `images` (N, 3, H, W) in [0, 1], in the size that the model takes; `depth` (N, h, w) in its own
    size, 0 where it is not known; `poses` (N, 4, 4), camera to world; `intrinsics` (N, 3, 3), of the depth's pixels."""

    name: str
    images: Tensor
    depth: Tensor | None = None
    poses: Tensor | None = None
    intrinsics: Tensor | None = None

    @property
    def points(self) -> Tensor | None:
        """(N, h, w, 3), the truth in the frame of the scene; None where depth, poses or intrinsics are not known."""
        if self.depth is None or self.poses is None or self.intrinsics is None:
            return None
        height, width = self.depth.shape[1:]
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        pixels = torch.stack([x, y, torch.ones_like(x)], -1).double()
        rays = torch.einsum("nij,hwj->nhwi", torch.linalg.inv(self.intrinsics.double()), pixels)
        local = rays * self.depth[..., None].double()
        poses = self.poses.double()
        return torch.einsum("nij,nhwj->nhwi", poses[:, :3, :3], local) + poses[:, None, None, :3, 3]


def _within(folder: Path, *parts: str, layout: str) -> Path:
    """A part of a data set, which must be there."""
    path = folder.joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(f"`folder` must be laid out as {layout}, got {folder}: {'/'.join(parts)} is missing.")
    return path


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _matrix(path: Path, side: int = 4) -> np.ndarray:
    return np.loadtxt(path).reshape(side, side)


def _png(path: Path, unit: int, least: float = 0.0, most: float = float("inf")) -> np.ndarray:
    """Depth stored as integers, in metres: 0 where it is below `least` or beyond `most`."""
    depth = np.asarray(opened(path), dtype=np.float64) / unit
    return np.where((depth >= least) & (depth <= most), depth, 0.0)


def read_sintel_depth(path: Path) -> np.ndarray:
    """The depth (h, w) of a .dpt file.

    **Raises:** `ValueError`: another first number, or fewer values than it announces.
    """
    content = path.read_bytes()
    if len(content) < 12 or np.frombuffer(content[:4], "<f4")[0] != np.float32(SINTEL_TAG):
        raise ValueError(f"`path` must be a Sintel .dpt file, got {path}, which does not begin as one.")
    width, height = np.frombuffer(content[4:12], "<i4").tolist()
    if len(content) != 12 + 4 * width * height:
        raise ValueError(
            f"`path` must hold {width} x {height} values of 4 bytes, got {len(content) - 12} bytes in {path}."
        )
    return np.frombuffer(content[12:], "<f4").reshape(height, width).astype(np.float64)


def read_sintel_camera(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics (3, 3) and camera-to-world pose (4, 4) of a .cam file."""
    content = path.read_bytes()
    if len(content) != 4 + 21 * 8 or np.frombuffer(content[:4], "<f4")[0] != np.float32(SINTEL_TAG):
        raise ValueError(f"`path` must be a Sintel .cam file, got {path}, which is none.")
    numbers = np.frombuffer(content[4:], "<f8")
    return numbers[:9].reshape(3, 3), np.linalg.inv(np.vstack([numbers[9:].reshape(3, 4), [0, 0, 0, 1]]))


def sintel(folder: Path) -> dict[str, list[Frame]]:
    """training/{final,depth,camdata_left}/<sequence>/frame_0001.{png,dpt,cam}."""
    root = _within(folder, "training", "final", layout="MPI Sintel")
    found: dict[str, list[Frame]] = {}
    for sequence in _folders(root):
        depth, camera = (folder / "training" / part / sequence.name for part in ("depth", "camdata_left"))
        found[sequence.name] = []
        for image in image_files(sequence):
            intrinsics, pose = (
                read_sintel_camera(file) if (file := camera / f"{image.stem}.cam").exists() else (None, None)
            )
            truth = depth / f"{image.stem}.dpt"
            found[sequence.name].append(Frame(image, truth if truth.exists() else None, pose, intrinsics))
    return found


def _listed(path: Path) -> list[list[str]]:
    """The rows of a list of TUM's form, sorted by time."""
    rows = [line.split() for line in path.read_text(encoding="utf8").splitlines() if line and not line.startswith("#")]
    return sorted(rows, key=lambda row: float(row[0]))


def _at(rows: list[list[str]], time: float) -> list[str] | None:
    nearest = min(rows, key=lambda row: abs(float(row[0]) - time), default=None)
    return nearest if nearest is not None and abs(float(nearest[0]) - time) <= TUM_PAUSE else None


def _tum_pose(row: list[str]) -> np.ndarray:
    """Position and quaternion (x, y, z, w)."""
    x, y, z, w = np.array(row[4:8], dtype=np.float64) / np.linalg.norm(np.array(row[4:8], dtype=np.float64))
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = np.array(row[1:4], dtype=np.float64)
    return pose


def tum(folder: Path) -> dict[str, list[Frame]]:
    """<sequence>/{rgb.txt,depth.txt,groundtruth.txt}, each beginning with a time; what is nearest in time belongs together, and
    pictures without depth or pose are left out. Bonn and TUM RGB-D."""
    found: dict[str, list[Frame]] = {}
    for sequence in _folders(folder):
        if not (sequence / "rgb.txt").exists():
            continue
        depths, poses = (
            _listed(_within(sequence, name, layout="TUM RGB-D")) for name in ("depth.txt", "groundtruth.txt")
        )
        frames = []
        for time, image in (row[:2] for row in _listed(sequence / "rgb.txt")):
            depth, pose = _at(depths, float(time)), _at(poses, float(time))
            if depth and pose:
                frames.append(Frame(sequence / image, sequence / depth[1], _tum_pose(pose)))
        found[sequence.name] = frames
    if not found:
        _within(folder, "<sequence>", "rgb.txt", layout="TUM RGB-D")
    return found


def kitti(folder: Path) -> dict[str, list[Frame]]:
    """The cropped validation selection: {image,groundtruth_depth}/<drive>_{image,groundtruth_depth}_<number>_<camera>.png."""
    images = _within(folder, "image", layout="KITTI's val_selection_cropped")
    truth = _within(folder, "groundtruth_depth", layout="KITTI's val_selection_cropped")
    found: dict[str, list[Frame]] = {}
    for image in image_files(images):
        depth = truth / image.name.replace("_image_", "_groundtruth_depth_", 1)
        found.setdefault(image.name.partition("_image_")[0], []).append(Frame(image, depth if depth.exists() else None))
    return found


def seven_scenes(folder: Path) -> dict[str, list[Frame]]:
    """<scene>/seq-01/frame-000000.{color.png,depth.png,pose.txt}, of the sequences that <scene>/TestSplit.txt names; registered
    depth, .depth.proj.png, where there is some."""
    intrinsics = np.array([[525.0, 0, 320], [0, 525.0, 240], [0, 0, 1]])
    found: dict[str, list[Frame]] = {}
    for scene in _folders(folder):
        split = _within(folder, scene.name, "TestSplit.txt", layout="7-Scenes")
        numbers = [int("".join(filter(str.isdigit, line))) for line in split.read_text().split()]
        for number in numbers:
            sequence = _within(folder, scene.name, f"seq-{number:02d}", layout="7-Scenes")
            frames = []
            for image in sorted(sequence.glob("frame-*.color.png")):
                stem = image.name.removesuffix(".color.png")
                registered = image.with_name(f"{stem}.depth.proj.png")
                depth = registered if registered.exists() else image.with_name(f"{stem}.depth.png")
                frames.append(Frame(image, depth, _matrix(image.with_name(f"{stem}.pose.txt")), intrinsics))
            found[f"{scene.name}/{sequence.name}"] = frames
    return found


def nrgbd(folder: Path) -> dict[str, list[Frame]]:
    """<scene>/{images/img0.png,depth/depth0.png,poses.txt,focal.txt}; cameras look along -z there, y up, and are turned here."""
    found: dict[str, list[Frame]] = {}
    for scene in _folders(folder):
        files = [
            _within(folder, scene.name, name, layout="NRGBD") for name in ("images", "depth", "poses.txt", "focal.txt")
        ]
        poses = np.loadtxt(files[2]).reshape(-1, 4, 4) @ np.diag([1.0, -1.0, -1.0, 1.0])
        focal = float(np.loadtxt(files[3]).reshape(-1)[0])
        numbered = {int(path.stem.removeprefix("img")): path for path in image_files(files[0])}
        found[scene.name] = []
        for number, image in sorted(numbered.items()):
            with Image.open(image) as opened_image:
                width, height = opened_image.size
            intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
            frame = Frame(image, files[1] / f"depth{number}.png", poses[number], intrinsics)
            found[scene.name].append(frame)
    return found


def scannet(folder: Path) -> dict[str, list[Frame]]:
    """<scene>/{color/0.jpg,depth/0.png,pose/0.txt,intrinsic/intrinsic_depth.txt}, as its reader exports."""
    found: dict[str, list[Frame]] = {}
    for scene in _folders(folder):
        color, depth, pose, camera = (
            _within(folder, scene.name, *parts, layout="an export of ScanNet")
            for parts in (("color",), ("depth",), ("pose",), ("intrinsic", "intrinsic_depth.txt"))
        )
        intrinsics = _matrix(camera)[:3, :3]
        found[scene.name] = [
            Frame(image, depth / f"{image.stem}.png", _matrix(pose / f"{image.stem}.txt"), intrinsics)
            for image in sorted(image_files(color), key=lambda path: int(path.stem))
        ]
    return found


def pictures(folder: Path) -> dict[str, list[Frame]]:
    """A folder of images, or of folders of images: one sequence for each, without truth."""
    inner = [path for path in _folders(folder) if any(path.glob("*"))]
    return {path.name: [Frame(image) for image in image_files(path)] for path in inner or [folder]}


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk: the frames of its sequences, and how its depth is read, in metres."""

    frames: Callable[[Path], dict[str, list[Frame]]]
    depth: Callable[[Path], np.ndarray] | None = None


def _millimetres(path: Path) -> np.ndarray:
    return _png(path, 1000, 1e-3, 10.0)  # 65535 is beyond


LAYOUTS: Mapping[str, Layout] = {
    "sintel": Layout(sintel, read_sintel_depth),
    "bonn": Layout(tum, lambda path: _png(path, 5000)),
    "tum": Layout(tum, lambda path: _png(path, 5000)),
    "kitti": Layout(kitti, lambda path: _png(path, 256)),
    "7scenes": Layout(seven_scenes, _millimetres),
    "nrgbd": Layout(nrgbd, _millimetres),
    "scannet": Layout(scannet, lambda path: _png(path, 1000)),
    "pictures": Layout(pictures),
}


def load_scenes(
    layout: str,
    folder: Path | str,
    *,
    sequences: list[str] | tuple[str, ...] = (),
    every: int = 1,
    most: int | None = None,
    width: int | None = None,
    truth_width: int | None = None,
    patch: int = 14,
) -> Iterator[Scene]:
    """The sequences of a data set, one after another, each read when it is asked for.

    Views whose pose is not finite are left out; so are poses, depth or intrinsics of a sequence where a view lacks its own.

    **Arguments:** `layout`: a key of `LAYOUTS`. `sequences`: their names, by default all. `every`: views 0, k, 2k, ... are kept,
    of these the first `most`. `width`: of the images, as published results are evaluated (`sized_by_width`); by default as
    users load them (`load_images`). `truth_width`: that depth is brought to, by the
    nearest pixel, with a height in whole patches; by default it stays as it is.

    **Raises:** `ValueError`: an unknown layout, `every` or `most` below 1. `FileNotFoundError`: a folder, a sequence or a file
    that is missing; the message names it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {sorted(LAYOUTS)}, got {layout!r}.")
    for name, number in (("every", every), ("most", most)):
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be >= 1, got {number}.")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` must be a folder with data laid out as {layout!r}, got {folder}.")
    found = LAYOUTS[layout].frames(folder)
    if not found:
        raise FileNotFoundError(f"`folder` must hold sequences laid out as {layout!r}, got none in {folder}.")
    if unknown := sorted(set(sequences) - set(found)):
        raise FileNotFoundError(f"`sequences` must be among {sorted(found)} of {folder}, got {unknown}.")

    def read() -> Iterator[Scene]:
        for name in sequences or found:
            usable = [frame for frame in found[name] if frame.pose is None or np.isfinite(frame.pose).all()]
            yield _read(name, usable[::every][:most], LAYOUTS[layout], width, truth_width, patch)

    return read()


def _read(
    name: str, frames: list[Frame], layout: Layout, width: int | None, truth_width: int | None, patch: int
) -> Scene:
    if not frames:
        raise FileNotFoundError(f"sequence {name!r} must have at least one view with its files, got none.")
    for frame in frames:
        for file in (frame.image, frame.depth):
            if file is not None and not file.exists():
                raise FileNotFoundError(f"sequence {name!r} must have all its files: {file} is missing.")
    if width is None:
        images = load_images((frame.image for frame in frames), patch)
    else:
        images = torch.stack([sized_by_width(opened(frame.image), width, patch) for frame in frames])
    depths = [layout.depth(frame.depth) if layout.depth and frame.depth else None for frame in frames]
    depth, intrinsics = _stacked(depths), _stacked([frame.intrinsics for frame in frames])
    if depth is not None and truth_width is not None:
        depth, intrinsics = _nearest(depth, intrinsics, truth_width, patch)
    return Scene(name, images, depth, _stacked([frame.pose for frame in frames]), intrinsics)


def _stacked(arrays: list[np.ndarray | None]) -> Tensor | None:
    there = [array for array in arrays if array is not None]
    return torch.from_numpy(np.stack(there)) if len(there) == len(arrays) else None


def _nearest(depth: Tensor, intrinsics: Tensor | None, width: int, patch: int) -> tuple[Tensor, Tensor | None]:
    """Depth of another width, by the nearest pixel, and the intrinsics that go with it: scaled by one factor to cover that width
    and the height in whole patches, and cut about the centre."""
    own = torch.tensor([depth.shape[2], depth.shape[1]], dtype=torch.float64)
    wanted = torch.tensor([width, round(depth.shape[1] * width / depth.shape[2] / patch) * patch], dtype=torch.float64)
    scale = (wanted / own).max()
    margin = (scale * own - wanted) / 2
    columns, rows = (
        ((torch.arange(int(wanted[axis])) + 0.5 + margin[axis]) / scale).long().clamp(max=int(own[axis]) - 1)
        for axis in (0, 1)
    )
    if intrinsics is not None:
        intrinsics = intrinsics.clone()
        intrinsics[:, :2] *= scale
        intrinsics[:, :2, 2] -= margin
    return depth[:, rows][:, :, columns], intrinsics


def rendered_scenes(first: int, scenes: int, views: int, side: int) -> Iterator[Scene]:
    """Rendered scenes of seeds `first` and up, in the same form."""
    for seed in range(first, first + scenes):
        shot = render_scene(seed, views, side, side)
        intrinsics = torch.tensor([[shot.focal, 0, side / 2], [0, shot.focal, side / 2], [0, 0, 1]])
        yield Scene(str(seed), shot.images, shot.depth, shot.poses, intrinsics.expand(views, 3, 3))
