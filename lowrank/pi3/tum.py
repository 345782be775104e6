"""Read data sets in the layout of TUM RGB-D: TUM RGB-D and Bonn."""

from math import isfinite
from pathlib import Path

import numpy as np

from lowrank.io.checks import require
from lowrank.io.files import path_inside
from lowrank.io.schemas import read_file
from lowrank.pi3.layout_files import Frame, list_folders, require_path

TUM_PAUSE = 0.02  # most seconds between an image and its depth or pose


def _read_list(path: Path, numbers: int = 1) -> list[list[str]]:
    """Read the rows of a list, sorted by time: first some numbers, one of them the time, and two words at least."""
    lines = [line for line in read_file(path, "folder").splitlines() if line.strip() and not line.startswith("#")]
    rows = [line.replace(",", " ").split() for line in lines]
    for line, row in zip(lines, rows, strict=True):
        holds = len(row) >= max(2, numbers) and all(map(_is_finite, row[:numbers]))
        holds = holds and (numbers < 8 or any(float(word) for word in row[4:8]))  # a quaternion of zeros turns nowhere
        rule = f"have lists whose rows start with {numbers} finite numbers ({path})"
        require(holds, "folder", rule, line)
    return sorted(rows, key=lambda row: float(row[0]))


def _is_finite(word: str) -> bool:
    try:
        return isfinite(float(word))
    except ValueError:
        return False


def _find_row(rows: list[list[str]], time: float) -> list[str] | None:
    """Find the row nearest in time, or None if it is farther than `TUM_PAUSE`."""
    nearest = min(rows, key=lambda row: abs(float(row[0]) - time), default=None)
    return nearest if nearest is not None and abs(float(nearest[0]) - time) <= TUM_PAUSE else None


def _build_pose(row: list[str]) -> np.ndarray:
    """Build a pose from a time, a position and a quaternion (x, y, z, w)."""
    x, y, z, w = np.array(row[4:8], dtype=np.float64) / np.linalg.norm(np.array(row[4:8], dtype=np.float64))
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = np.array(row[1:4], dtype=np.float64)
    return pose


def list_tum(folder: Path) -> dict[str, Path]:
    """List the sequences of a data set in the layout of TUM RGB-D: name -> folder.

    **Raises**

    - `FileNotFoundError`: no folder has a list `rgb.txt`.
    """
    sequences = {name: path for name, path in list_folders(folder).items() if (path / "rgb.txt").exists()}
    if not sequences:
        require_path(folder, "<sequence>", "rgb.txt", layout="TUM RGB-D")
    return sequences


def tum_frames(sequence: Path) -> list[Frame]:
    """List the frames of `<sequence>/{rgb.txt,depth.txt,groundtruth.txt}`, whose rows start with a time.

    Each image gets the depth and the pose nearest in time. Images without a depth or pose within `TUM_PAUSE` are left out.

    **Raises**

    - `FileNotFoundError`: a list is missing.
    - `ValueError`: a row without its numbers; a list names a file outside of the sequence.
    """
    depths, poses = (
        _read_list(require_path(sequence, name, layout="TUM RGB-D"), numbers)
        for name, numbers in (("depth.txt", 1), ("groundtruth.txt", 8))
    )
    frames = []
    for time, image in (row[:2] for row in _read_list(require_path(sequence, "rgb.txt", layout="TUM RGB-D"))):
        depth, pose = _find_row(depths, float(time)), _find_row(poses, float(time))
        if depth and pose:
            one, other = (path_inside(sequence, name, "sequence") for name in (image, depth[1]))
            frames.append(Frame(one, other, _build_pose(pose)))
    return frames
