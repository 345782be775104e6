"""Sequences to calibrate and evaluate π³ on: data sets in their published layouts, and rendered scenes, in one form."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowrank.pi3.frames import load_images, opened, sized_by_width
from lowrank.pi3.layouts import LAYOUTS, Frame, Layout
from lowrank.pi3.scenes import render_scene


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

    **Arguments:** `layout`: a key of `LAYOUTS`. `sequences`: their names, by default all. `every`: views 0, k, 2k, ... of those
    with a finite pose are kept, of these the first `most`. `width`: of the images, as published results are evaluated
    (`sized_by_width`); by default as users load them (`load_images`). `truth_width`: that depth is brought to, by the nearest
    pixel, with a height in whole patches; by default it stays as it is.

    **Raises:** `ValueError`: an unknown layout, `every` or `most` below 1, a width below one patch. `FileNotFoundError`: a
    folder, a sequence or a file that is missing; the message names it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {sorted(LAYOUTS)}, got {layout!r}.")
    for name, number in (("every", every), ("most", most)):
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be >= 1, got {number}.")
    for name, number in (("width", width), ("truth_width", truth_width)):
        if number is not None and number < patch:
            raise ValueError(f"`{name}` must be at least one patch, {patch}, got {number}.")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` must be a folder with data laid out as {layout!r}, got {folder}.")
    found = LAYOUTS[layout].sequences(folder)
    if not found:
        raise FileNotFoundError(f"`folder` must hold sequences laid out as {layout!r}, got none in {folder}.")
    if unknown := sorted(set(sequences) - set(found)):
        raise FileNotFoundError(f"`sequences` must be among {sorted(found)} of {folder}, got {unknown}.")

    def read() -> Iterator[Scene]:
        for name in sequences or found:
            frames = LAYOUTS[layout].frames(found[name])
            usable = [frame for frame in frames if frame.pose is None or np.isfinite(frame.pose).all()]
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
