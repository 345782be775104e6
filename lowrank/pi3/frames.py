"""Images for π³: of a folder or a video, in a size that it takes, with values in [0, 1] and no other normalisation."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

PIXELS = 255_000  # at most, in an image as users load it
IMAGES, VIDEOS = (".png", ".jpg", ".jpeg", ".webp"), (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif")
EVERY = {"video": 10, "folder": 1}  # frames 0, k, 2k, ... are kept


def size_within(width: int, height: int, patch: int = 14, pixels: int = PIXELS) -> tuple[int, int]:
    """Width and height in whole patches, of about the same shape and at most `pixels` pixels.

    **Raises:** `ValueError`: a limit below one patch.
    """
    if pixels < patch**2:
        raise ValueError(f"`pixels` must be at least those of one patch, {patch**2}, got {pixels}.")
    share = (pixels / (width * height)) ** 0.5
    columns, rows = max(1, round(width * share / patch)), max(1, round(height * share / patch))
    while columns * rows * patch**2 > pixels:
        if rows == 1 or (columns > 1 and columns / rows > width / height):
            columns -= 1
        else:
            rows -= 1
    return columns * patch, rows * patch


def sized(image: Image.Image, width: int, height: int) -> Tensor:
    """(3, height, width) in [0, 1], resized by Lanczos."""
    resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255


def sized_by_width(image: Image.Image, width: int, patch: int = 14) -> Tensor:
    """As published results are evaluated: to the width by Lanczos, the height in whole patches, then the width too, bilinearly
    and antialiased."""
    height = max(1, round(image.height * width / image.width / patch)) * patch
    large = sized(image, width, height)
    whole = (height, width // patch * patch)
    if whole == tuple(large.shape[1:]):
        return large
    small = functional.interpolate(large[None], size=whole, mode="bilinear", align_corners=False, antialias=True)
    return small[0].clamp(0, 1)


def opened(path: Path) -> Image.Image:
    """An image file.

    **Raises:** `ValueError`: a file that is no image, or is cut short.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"`path` must be an image that can be read, got {path}: {error}") from error


def load_images(images: Iterable[Image.Image | Path], patch: int = 14, pixels: int = PIXELS) -> Tensor:
    """Views (N, 3, H, W) in [0, 1], all in the size that `size_within` gives for the first.

    **Raises:** `ValueError`: no image, or one that cannot be read.
    """
    views: list[Tensor] = []
    size = (0, 0)
    for image in images:
        image = opened(image) if isinstance(image, Path) else image
        if not views:
            size = size_within(*image.size, patch, pixels)
        views.append(sized(image, *size))
    if not views:
        raise ValueError("`images` must hold at least one image, got none.")
    return torch.stack(views)


def load_views(path: Path | str, *, every: int | None = None, patch: int = 14, pixels: int = PIXELS) -> Tensor:
    """The views (N, 3, H, W) of a folder of images, in the order of their names, or of a video (extra `video`).

    **Arguments:** `every`: frames 0, k, 2k, ... are kept; by default 10 of a video, 1 of a folder. `patch`, `pixels`: see
    `size_within`.

    **Raises:** `FileNotFoundError`: no such folder or file, or a folder without images. `ValueError`: a file that is neither, a
    video without frames or that cannot be read, `every` below 1.
    """
    path = Path(path)
    if every is not None and every < 1:
        raise ValueError(f"`every` must be >= 1, got {every}.")
    if path.is_dir():
        files = image_files(path)
        return load_images(files[:: every or EVERY["folder"]], patch, pixels)
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a folder of images or a video, got {path}, which does not exist.")
    if path.suffix.lower() not in VIDEOS:
        raise ValueError(f"`path` must be a folder or a video ({', '.join(VIDEOS)}), got {path}.")
    return load_images(video_frames(path, every or EVERY["video"]), patch, pixels)


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, by name.

    **Raises:** `FileNotFoundError`: it holds none.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGES)
    if not files:
        raise FileNotFoundError(f"`path` must hold images ({', '.join(IMAGES)}), got none in {folder}.")
    return files


def video_frames(path: Path, every: int) -> Sequence[Image.Image]:
    """Frames 0, k, 2k, ... of a video.

    **Raises:** `ValueError`: no video stream, no frame, or a file that cannot be read. `ModuleNotFoundError`: PyAV is missing.
    """
    try:
        import av  # noqa: PLC0415
        from av.error import FFmpegError  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"videos need PyAV: pip install '.[video]' from a checkout of lowrank ({error})"
        ) from error
    try:
        with av.open(str(path)) as video:
            decoded = video.decode(video=0) if video.streams.video else ()
            frames = [frame.to_image() for number, frame in enumerate(decoded) if number % every == 0]
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"`path` must be a video that can be read, got {path}: {error}") from error
    if not frames:
        raise ValueError(f"`path` must be a video with frames, got none in {path}.")
    return frames
