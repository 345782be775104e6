"""Read MPI Sintel: its sequences, and its depth and camera files."""

from pathlib import Path

import numpy as np

from lowrank.pi3.frames import list_images
from lowrank.pi3.layout_files import Frame, list_folders, require_path

SINTEL_TAG = 202021.25  # the first float of every .dpt and .cam file


def read_sintel_depth(path: Path) -> np.ndarray:
    """Read a .dpt file.

    **Returns** depth, `(h, w)`, float64.

    **Raises**

    - `ValueError`: the file starts with another number, or has another length than its header says.
    """
    content = path.read_bytes()
    if len(content) < 12 or np.frombuffer(content[:4], "<f4")[0] != np.float32(SINTEL_TAG):
        raise ValueError(f"`path` must be a Sintel .dpt file, got {path}, which does not start as one.")
    width, height = np.frombuffer(content[4:12], "<i4").tolist()
    if min(width, height) < 1 or len(content) != 12 + 4 * width * height:
        raise ValueError(
            f"`path` must hold {width} x {height} values of 4 bytes, got {len(content) - 12} bytes in {path}."
        )
    return np.frombuffer(content[12:], "<f4").reshape(height, width).astype(np.float64)


def read_sintel_camera(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a .cam file and move its pixel centres from whole numbers to halves.

    **Returns** intrinsics, `(3, 3)`, and camera-to-world pose, `(4, 4)`, float64.

    **Raises**

    - `ValueError`: the file is no .cam file, or holds no camera.
    """
    content = path.read_bytes()
    if len(content) != 4 + 21 * 8 or np.frombuffer(content[:4], "<f4")[0] != np.float32(SINTEL_TAG):
        raise ValueError(f"`path` must be a Sintel .cam file, got {path}, which is none.")
    numbers = np.frombuffer(content[4:], "<f8")
    if not np.isfinite(numbers).all() or not np.linalg.det(numbers[9:].reshape(3, 4)[:, :3]):
        raise ValueError(f"`path` must hold finite numbers and a rotation, got {path}, which does not.")
    shift = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    return numbers[:9].reshape(3, 3) + shift, np.linalg.inv(np.vstack([numbers[9:].reshape(3, 4), [0, 0, 0, 1]]))


def list_sintel(folder: Path) -> dict[str, Path]:
    """List the sequences of a copy of MPI Sintel: name -> folder of images."""
    return list_folders(require_path(folder, "training", "final", layout="MPI Sintel"))


def sintel_frames(sequence: Path) -> list[Frame]:
    """List the frames of `training/{final,depth,camdata_left}/<sequence>/frame_0001.{png,dpt,cam}`."""
    depth, camera = (sequence.parents[1] / part / sequence.name for part in ("depth", "camdata_left"))
    frames = []
    for image in list_images(sequence):
        camera_file, depth_file = camera / f"{image.stem}.cam", depth / f"{image.stem}.dpt"
        intrinsics, pose = read_sintel_camera(camera_file) if camera_file.exists() else (None, None)
        frames.append(Frame(image, depth_file if depth_file.exists() else None, pose, intrinsics))
    return frames
