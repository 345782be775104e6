"""Load images, folders and videos as views for π³, in a size that the model takes, with values in [0, 1]."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from lowrank.io.checks import require

MOST_PIXELS = 255_000  # of an image as users load it
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif")
DEFAULT_EVERY = {"video": 10, "folder": 1}  # frames 0, k, 2k, ... are kept


def fit_size(width: int, height: int, patch: int = 14, pixels: int = MOST_PIXELS) -> tuple[int, int]:
    """Choose a size in whole patches with nearly the same aspect ratio and at most `pixels` pixels.

    **Arguments**

    - `width`, `height`: of the image, pixels.
    - `patch`: side of a patch, pixels; default 14.
    - `pixels`: upper bound, at least `patch`^2; default 255 000.

    **Returns** width and height, pixels.

    **Raises**

    - `ValueError`: `pixels` is below one patch.
    """
    require(pixels >= patch**2, "pixels", f"be at least the pixels of one patch, {patch**2}", pixels)
    share = (pixels / (width * height)) ** 0.5
    columns, rows = max(1, round(width * share / patch)), max(1, round(height * share / patch))
    while columns * rows * patch**2 > pixels:
        if rows == 1 or (columns > 1 and columns / rows > width / height):
            columns -= 1
        else:
            rows -= 1
    return columns * patch, rows * patch


def resize_image(image: Image.Image, width: int, height: int) -> Tensor:
    """Resize an image of any mode by Lanczos.

    **Arguments**

    - `image`: the image; it is converted to RGB.
    - `width`, `height`: the new size, pixels.

    **Returns** `(3, height, width)`, float32, in [0, 1].
    """
    resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255


def resize_to_width(image: Image.Image, width: int, patch: int = 14) -> Tensor:
    """Resize an image as for published results.

    Lanczos brings it to `width`, with the height rounded to whole patches. If `width` is not in whole patches, it is then
    lowered to whole patches, bilinearly and antialiased.

    **Arguments**

    - `image`: the image, any mode.
    - `width`: pixels, at least `patch`.
    - `patch`: side of a patch, pixels; default 14.

    **Returns** `(3, H, W)`, float32, in [0, 1]; H and W are multiples of `patch`.
    """
    height = max(1, round(image.height * width / image.width / patch)) * patch
    large = resize_image(image, width, height)
    whole = (height, width // patch * patch)
    if whole == tuple(large.shape[1:]):
        return large
    small = functional.interpolate(large[None], size=whole, mode="bilinear", align_corners=False, antialias=True)
    return small[0].clamp(0, 1)


def open_image(path: Path) -> Image.Image:
    """Read an image file.

    **Raises**

    - `FileNotFoundError`: no such file.
    - `ValueError`: the file is no image, or is cut short.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"`path` must be an image that can be read, got {path}: {error}") from error


def load_images(images: Iterable[Image.Image | Path], patch: int = 14, pixels: int = MOST_PIXELS) -> Tensor:
    """Load images as views of one size, which `fit_size` chooses for the first.

    **Arguments**

    - `images`: images or their files, in order.
    - `patch`: side of a patch, pixels; default 14.
    - `pixels`: most pixels of a view; default 255 000.

    **Returns** `(N, 3, H, W)`, float32, in [0, 1].

    **Raises**

    - `FileNotFoundError`: a file is missing.
    - `ValueError`: no image; a file that cannot be read.
    """
    views: list[Tensor] = []
    size = (0, 0)
    for image in images:
        image = open_image(image) if isinstance(image, Path) else image
        if not views:
            size = fit_size(*image.size, patch, pixels)
        views.append(resize_image(image, *size))
    if not views:
        raise ValueError("`images` must hold at least one image, got none.")
    return torch.stack(views)


def load_views(path: Path | str, *, every: int | None = None, patch: int = 14, pixels: int = MOST_PIXELS) -> Tensor:
    """Load the views of a folder of images, in the order of their names, or of a video.

    Videos need the extra `video`.

    **Arguments**

    - `path`: folder or video file.
    - `every`: keep frames 0, k, 2k, ...; default 10 for a video, 1 for a folder.
    - `patch`: side of a patch, pixels; default 14.
    - `pixels`: most pixels of a view; default 255 000.

    **Returns** `(N, 3, H, W)`, float32, in [0, 1].

    **Raises**

    - `FileNotFoundError`: no such folder or file; a folder without images.
    - `ValueError`: a file that is no video; a video that cannot be read or has no frames; `every` below 1.
    - `ModuleNotFoundError`: a video, and PyAV is not installed.
    """
    path = Path(path)
    require(every is None or every >= 1, "every", "be >= 1", every)
    if path.is_dir():
        files = list_images(path)
        return load_images(files[:: every or DEFAULT_EVERY["folder"]], patch, pixels)
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a folder of images or a video, got {path}, which does not exist.")
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise ValueError(f"`path` must be a folder or a video ({', '.join(VIDEO_SUFFIXES)}), got {path}.")
    return load_images(read_video(path, every or DEFAULT_EVERY["video"]), patch, pixels)


def list_images(folder: Path) -> list[Path]:
    """List the image files of a folder by name.

    **Raises**

    - `FileNotFoundError`: the folder has none.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"`path` must hold images ({', '.join(IMAGE_SUFFIXES)}), got none in {folder}.")
    return files


def read_video(path: Path, every: int) -> Sequence[Image.Image]:
    """Decode frames 0, k, 2k, ... of a video.

    **Arguments**

    - `path`: the video file.
    - `every`: the step k, >= 1.

    **Raises**

    - `ValueError`: no video stream; no frame; a file that cannot be read.
    - `ModuleNotFoundError`: PyAV is not installed.
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
