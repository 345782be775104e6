"""Load sequences to calibrate and evaluate π³ on: published data sets and rendered scenes, in one form."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowrank.io.checks import require
from lowrank.pi3.frames import load_images, open_image, resize_to_width
from lowrank.pi3.layout_files import Frame
from lowrank.pi3.layouts import LAYOUTS, Layout
from lowrank.pi3.scenes import render_scene


@dataclass(frozen=True, eq=False)
class Scene:
    """Hold the N views of one sequence; None if the data set has no such part.

    **Arguments**

    - `name`: of the sequence.
    - `images`: `(N, 3, H, W)`, float32, in [0, 1], in a size that the model takes.
    - `depth`: `(N, h, w)`, 0 where it is unknown; its size may differ from the size of the images.
    - `poses`: `(N, 4, 4)`, camera to world.
    - `intrinsics`: `(N, 3, 3)`, in pixels of the depth.
    """

    name: str
    images: Tensor
    depth: Tensor | None = None
    poses: Tensor | None = None
    intrinsics: Tensor | None = None

    @property
    def points(self) -> Tensor | None:
        """Compute the true points, `(N, h, w, 3)`, float64, in the frame of the scene.

        **Returns** None if depth, poses or intrinsics are missing.
        """
        if self.depth is None or self.poses is None or self.intrinsics is None:
            return None
        height, width = self.depth.shape[1:]
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        pixels = torch.stack([x, y, torch.ones_like(x)], -1).double()
        rays = torch.einsum("nij,hwj->nhwi", torch.linalg.inv(self.intrinsics.double()), pixels)
        local = rays * self.depth[..., None].double()
        poses = self.poses.double()
        return torch.einsum("nij,nhwj->nhwi", poses[:, :3, :3], local) + poses[:, None, None, :3, 3]


def load_scenes(
    layout: str,
    folder: Path | str,
    *,
    sequences: Sequence[str] = (),
    every: int = 1,
    most: int | None = None,
    width: int | None = None,
    truth_width: int | None = None,
    patch: int = 14,
) -> Iterator[Scene]:
    """Load the sequences of a data set one after another, each on request.

    Views with an infinite or NaN pose are left out. If one view of a sequence has no depth, pose or intrinsics, the sequence
    has none either.

    **Arguments**

    - `layout`: the data set, a key of `lowrank.pi3.layouts.LAYOUTS`.
    - `folder`: the folder of the data set.
    - `sequences`: names of sequences, in this order; default: all.
    - `every`: keep views 0, k, 2k, ... with a finite pose; default 1.
    - `most`: keep the first `most` of these views; default: all.
    - `width`: of the images in pixels, as for published results (`resize_to_width`); default: the size that users load
      (`load_images`).
    - `truth_width`: of the depth in pixels, by the nearest pixel, with a height in whole patches; default: as stored.
    - `patch`: side of a patch, pixels; default 14.

    **Returns** an iterator over `Scene`.

    **Raises**

    - `ValueError`: an unknown layout; `every` or `most` below 1; a width below one patch.
    - `FileNotFoundError`: a missing folder, sequence or file.
    """
    require(layout in LAYOUTS, "layout", f"be one of {sorted(LAYOUTS)}", layout)
    for name, number in (("every", every), ("most", most)):
        require(number is None or number >= 1, name, "be >= 1", number)
    for name, number in (("width", width), ("truth_width", truth_width)):
        require(number is None or number >= patch, name, f"be at least one patch, {patch}", number)
    paths = _find_sequences(layout, Path(folder), sequences)

    def read() -> Iterator[Scene]:
        for name, path in paths:
            frames = LAYOUTS[layout].frames(path)
            usable = [frame for frame in frames if frame.pose is None or np.isfinite(frame.pose).all()]
            yield _read_scene(name, usable[::every][:most], LAYOUTS[layout], width, truth_width, patch)

    return read()


def _find_sequences(layout: str, folder: Path, wanted: Sequence[str]) -> list[tuple[str, Path]]:
    """Return names and paths of the wanted sequences, or of all if none is named."""
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` must be a folder with data laid out as {layout!r}, got {folder}.")
    sequences = LAYOUTS[layout].sequences(folder)
    if not sequences:
        raise FileNotFoundError(f"`folder` must hold sequences laid out as {layout!r}, got none in {folder}.")
    if unknown := sorted(set(wanted) - set(sequences)):
        raise FileNotFoundError(f"`sequences` must be among {sorted(sequences)} of {folder}, got {unknown}.")
    return [(name, sequences[name]) for name in wanted or sequences]


def _read_scene(
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
        images = torch.stack([resize_to_width(open_image(frame.image), width, patch) for frame in frames])
    depths = [layout.depth(frame.depth) if layout.depth and frame.depth else None for frame in frames]
    depth, intrinsics = _stack(depths), _stack([frame.intrinsics for frame in frames])
    if depth is not None and truth_width is not None:
        depth, intrinsics = _resize_truth(depth, intrinsics, truth_width, patch)
    return Scene(name, images, depth, _stack([frame.pose for frame in frames]), intrinsics)


def _stack(arrays: list[np.ndarray | None]) -> Tensor | None:
    """Stack arrays, or return None if one is missing."""
    present = [array for array in arrays if array is not None]
    return torch.from_numpy(np.stack(present)) if len(present) == len(arrays) else None


def _resize_truth(depth: Tensor, intrinsics: Tensor | None, width: int, patch: int) -> tuple[Tensor, Tensor | None]:
    """Resize depth by the nearest pixel, and adapt the intrinsics.

    One factor scales depth until it covers the width and the height in whole patches; the rest is cut on both sides alike.
    """
    size = torch.tensor([depth.shape[2], depth.shape[1]], dtype=torch.float64)
    wanted = torch.tensor([width, round(depth.shape[1] * width / depth.shape[2] / patch) * patch], dtype=torch.float64)
    scale = (wanted / size).max()
    margin = (scale * size - wanted) / 2
    columns, rows = (
        ((torch.arange(int(wanted[axis])) + 0.5 + margin[axis]) / scale).long().clamp(max=int(size[axis]) - 1)
        for axis in (0, 1)
    )
    if intrinsics is not None:
        intrinsics = intrinsics.clone()
        intrinsics[:, :2] *= scale
        intrinsics[:, :2, 2] -= margin
    return depth[:, rows][:, :, columns], intrinsics


def rendered_scenes(first: int, scenes: int, views: int, side: int) -> Iterator[Scene]:
    """Render scenes one after another, each on request.

    **Arguments**

    - `first`: seed of the first scene; the next has `first` + 1.
    - `scenes`: number of scenes.
    - `views`: views per scene, >= 1.
    - `side`: width and height, pixels, >= 1.

    **Returns** an iterator over `Scene`, all parts float32.
    """
    for seed in range(first, first + scenes):
        shot = render_scene(seed, views, side, side)
        intrinsics = torch.tensor([[shot.focal, 0, side / 2], [0, shot.focal, side / 2], [0, 0, 1]])
        yield Scene(str(seed), shot.images, shot.depth, shot.poses, intrinsics.expand(views, 3, 3))
