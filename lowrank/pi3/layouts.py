"""How data sets with depth and poses lie on disk: which sequences there are, the frames of each, how depth is read.

Listing sequences opens nothing but lists of them; the frames of one are read when they are asked for, its images later still.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lowrank.pi3.frames import image_files, opened

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


def _within(folder: Path, *parts: str, layout: str) -> Path:
    """A part of a data set, which must be there."""
    path = folder.joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(f"`folder` must be laid out as {layout}, got {folder}: {path} is missing.")
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
    """Intrinsics (3, 3) and camera-to-world pose (4, 4) of a .cam file, whose pixel centres are at whole numbers there."""
    content = path.read_bytes()
    if len(content) != 4 + 21 * 8 or np.frombuffer(content[:4], "<f4")[0] != np.float32(SINTEL_TAG):
        raise ValueError(f"`path` must be a Sintel .cam file, got {path}, which is none.")
    numbers = np.frombuffer(content[4:], "<f8")
    shift = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    return numbers[:9].reshape(3, 3) + shift, np.linalg.inv(np.vstack([numbers[9:].reshape(3, 4), [0, 0, 0, 1]]))


def _sintel(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in _folders(_within(folder, "training", "final", layout="MPI Sintel"))}


def sintel(sequence: Path) -> list[Frame]:
    """`training/{final,depth,camdata_left}/<sequence>/frame_0001.{png,dpt,cam}`."""
    depth, camera = (sequence.parents[1] / part / sequence.name for part in ("depth", "camdata_left"))
    frames = []
    for image in image_files(sequence):
        file, truth = camera / f"{image.stem}.cam", depth / f"{image.stem}.dpt"
        intrinsics, pose = read_sintel_camera(file) if file.exists() else (None, None)
        frames.append(Frame(image, truth if truth.exists() else None, pose, intrinsics))
    return frames


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


def _tum(folder: Path) -> dict[str, Path]:
    found = {path.name: path for path in _folders(folder) if (path / "rgb.txt").exists()}
    if not found:
        _within(folder, "<sequence>", "rgb.txt", layout="TUM RGB-D")
    return found


def tum(sequence: Path) -> list[Frame]:
    """`<sequence>/{rgb.txt,depth.txt,groundtruth.txt}`, each row beginning with a time; what is nearest in time belongs
    together, and pictures without depth or pose are left out. Bonn and TUM RGB-D."""
    depths, poses = (_listed(_within(sequence, name, layout="TUM RGB-D")) for name in ("depth.txt", "groundtruth.txt"))
    frames = []
    for time, image in (row[:2] for row in _listed(sequence / "rgb.txt")):
        depth, pose = _at(depths, float(time)), _at(poses, float(time))
        if depth and pose:
            frames.append(Frame(sequence / image, sequence / depth[1], _tum_pose(pose)))
    return frames


def _kitti(folder: Path) -> dict[str, Path]:
    images, _ = (
        _within(folder, part, layout="KITTI's val_selection_cropped") for part in ("image", "groundtruth_depth")
    )
    drives = dict.fromkeys(image.name.partition("_image_")[0] for image in image_files(images))
    return {drive: images / drive for drive in drives}


def kitti(drive: Path) -> list[Frame]:
    """The cropped validation selection: `{image,groundtruth_depth}/<drive>_{image,groundtruth_depth}_<number>_<camera>.png`."""
    frames = []
    for image in image_files(drive.parent):
        if image.name.partition("_image_")[0] == drive.name:
            depth = drive.parents[1] / "groundtruth_depth" / image.name.replace("_image_", "_groundtruth_depth_", 1)
            frames.append(Frame(image, depth if depth.exists() else None))
    return frames


def _seven_scenes(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for scene in _folders(folder):
        split = _within(folder, scene.name, "TestSplit.txt", layout="7-Scenes")
        for line in split.read_text(encoding="utf8").split():
            name = f"seq-{int(''.join(filter(str.isdigit, line))):02d}"
            found[f"{scene.name}/{name}"] = _within(folder, scene.name, name, layout="7-Scenes")
    return found


def seven_scenes(sequence: Path) -> list[Frame]:
    """`<scene>/seq-01/frame-000000.{color.png,depth.png,pose.txt}`, of the sequences that `<scene>/TestSplit.txt` names;
    registered depth, .depth.proj.png, where there is some."""
    intrinsics, frames = np.array([[525.0, 0, 320], [0, 525.0, 240], [0, 0, 1]]), []
    for image in sorted(sequence.glob("frame-*.color.png")):
        stem = image.name.removesuffix(".color.png")
        registered = image.with_name(f"{stem}.depth.proj.png")
        depth = registered if registered.exists() else image.with_name(f"{stem}.depth.png")
        pose = _matrix(_within(sequence, f"{stem}.pose.txt", layout="7-Scenes"))
        frames.append(Frame(image, depth, pose, intrinsics))
    return frames


def _scenes(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in _folders(folder)}


def nrgbd(scene: Path) -> list[Frame]:
    """`<scene>/{images/img0.png,depth/depth0.png,poses.txt,focal.txt}`; cameras look along -z there, y up, and are turned
    here."""
    images, depth, *texts = (
        _within(scene, name, layout="NRGBD") for name in ("images", "depth", "poses.txt", "focal.txt")
    )
    poses = np.loadtxt(texts[0]).reshape(-1, 4, 4) @ np.diag([1.0, -1.0, -1.0, 1.0])
    focal = float(np.loadtxt(texts[1]).reshape(-1)[0])
    numbered = {int(path.stem.removeprefix("img")): path for path in image_files(images)}
    if max(numbered) >= len(poses):
        raise ValueError(f"`poses.txt` must have a pose for image {max(numbered)}, got {len(poses)} in {scene}.")
    frames = []
    for number, image in sorted(numbered.items()):
        with Image.open(image) as picture:
            width, height = picture.size
        intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        frames.append(Frame(image, depth / f"depth{number}.png", poses[number], intrinsics))
    return frames


def scannet(scene: Path) -> list[Frame]:
    """`<scene>/{color/0.jpg,depth/0.png,pose/0.txt,intrinsic/intrinsic_depth.txt}`, as its reader exports."""
    color, depth, pose, camera = (
        _within(scene, *parts, layout="an export of ScanNet")
        for parts in (("color",), ("depth",), ("pose",), ("intrinsic", "intrinsic_depth.txt"))
    )
    intrinsics = _matrix(camera)[:3, :3]
    return [
        Frame(
            image,
            depth / f"{image.stem}.png",
            _matrix(_within(pose, f"{image.stem}.txt", layout="an export of ScanNet")),
            intrinsics,
        )
        for image in sorted(image_files(color), key=lambda path: int(path.stem))
    ]


def _pictures(folder: Path) -> dict[str, Path]:
    inner = [path for path in _folders(folder) if any(path.glob("*"))]
    return {path.name: path for path in inner or [folder]}


def pictures(folder: Path) -> list[Frame]:
    """A folder of images, or of folders of images: one sequence for each, without truth."""
    return [Frame(image) for image in image_files(folder)]


@dataclass(frozen=True)
class Layout:
    """`sequences(folder)`: the name of each and where it is. `frames(where)`: its frames. `depth(file)`: in metres, 0 where it is
    not known."""

    sequences: Callable[[Path], dict[str, Path]]
    frames: Callable[[Path], list[Frame]]
    depth: Callable[[Path], np.ndarray] | None = None


def _millimetres(path: Path) -> np.ndarray:
    return _png(path, 1000, 1e-3, 10.0)  # 65535 is beyond


LAYOUTS: Mapping[str, Layout] = {
    "sintel": Layout(_sintel, sintel, read_sintel_depth),
    "bonn": Layout(_tum, tum, lambda path: _png(path, 5000)),
    "tum": Layout(_tum, tum, lambda path: _png(path, 5000)),
    "kitti": Layout(_kitti, kitti, lambda path: _png(path, 256)),
    "7scenes": Layout(_seven_scenes, seven_scenes, _millimetres),
    "nrgbd": Layout(_scenes, nrgbd, _millimetres),
    "scannet": Layout(_scenes, scannet, lambda path: _png(path, 1000)),
    "pictures": Layout(_pictures, pictures),
}
