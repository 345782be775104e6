"""Name the files of one view, and find and read the files that several data sets share."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowrank.pi3.frames import open_image


@dataclass(frozen=True, eq=False)
class Frame:
    """Hold the files and the camera of one view; None if the data set has no such part.

    **Arguments**

    - `image`: the image file.
    - `depth`: the depth file.
    - `pose`: `(4, 4)`, camera to world; x points right, y down, z forward.
    - `intrinsics`: `(3, 3)`, in pixels of the depth, whose centres are at halves.
    """

    image: Path
    depth: Path | None = None
    pose: np.ndarray | None = None
    intrinsics: np.ndarray | None = None


def require_path(folder: Path, *parts: str, layout: str) -> Path:
    """Return a part of a data set that must exist.

    **Arguments**

    - `folder`: the folder that `parts` start from.
    - `parts`: names of folders, and of a file at the end.
    - `layout`: the name of the data set, for the message.

    **Raises**

    - `FileNotFoundError`: the part is missing.
    """
    path = folder.joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(f"`folder` must be laid out as {layout}, got {folder}: {path} is missing.")
    return path


def list_folders(folder: Path) -> dict[str, Path]:
    """List the folders in a folder: name -> path, by name."""
    return {path.name: path for path in sorted(path for path in folder.iterdir() if path.is_dir())}


def read_numbers(path: Path, *shape: int) -> np.ndarray:
    """Read numbers from a text file. NaN and infinity stand for a pose that is not known.

    **Arguments**

    - `path`: the file.
    - `shape`: of the result; -1 stands for a side that follows from the number of values.

    **Returns** numbers of that shape, float64.

    **Raises**

    - `ValueError`: no numbers, or another number of them.
    """
    try:
        text = path.read_text(encoding="utf8").replace(",", " ")
        values = np.array([float(word) for word in text.split()])
    except ValueError as error:
        raise ValueError(f"`folder` must have text files of numbers, got {path}: {error}.") from error
    size = int(np.prod(shape))
    if not len(values) or (len(values) % -size if size < 0 else len(values) != size):
        sides = " x ".join("n" if side < 0 else str(side) for side in shape)
        raise ValueError(f"`folder` must have {sides} numbers in {path}, got {len(values)}.")
    return values.reshape(shape)


def read_png_depth(path: Path, unit: int, least: float = 0.0, most: float = float("inf")) -> np.ndarray:
    """Read depth that a PNG file stores as integers.

    **Arguments**

    - `path`: the file.
    - `unit`: integers per metre.
    - `least`, `most`: depth outside [least, most], in metres, becomes 0; default: no bound.

    **Returns** `(h, w)`, float64, metres; 0 where depth is unknown.
    """
    depth = np.asarray(open_image(path), dtype=np.float64) / unit
    return np.where((depth >= least) & (depth <= most), depth, 0.0)
