"""Images for π³: sizes as published, folders and videos, values in [0, 1], and files that cannot be read."""

import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lowrank.pi3.frames import fit_size, load_images, load_views, resize_to_width

SMALL = 4 * 14**2  # pixels of a small view: 28 x 28


def gray(level: int, width: int = 28, height: int = 28) -> Image.Image:
    return Image.new("RGB", (width, height), (level, level, level))


def levels(views: Tensor) -> list[int]:
    """The gray level of each view, as a whole."""
    return (255 * views.mean((1, 2, 3))).round().int().tolist()


def film(path: Path, frames: int, width: int = 64, height: int = 32) -> Path:
    """A video whose frame i has the gray level 10 i."""
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        video.start_encoding()
        for number in range(frames):
            video.mux(stream.encode(av.VideoFrame.from_image(gray(10 * number, width, height))))
        video.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ((640, 480), (574, 434)),
        ((1280, 720), (672, 378)),
        ((1920, 1080), (672, 378)),
        ((1024, 436), (770, 322)),
        ((686, 364), (700, 364)),
        ((1242, 375), (924, 266)),
        ((512, 512), (504, 504)),
    ],
)
def test_sizes_are_the_published_ones(size: tuple[int, int], found: tuple[int, int]) -> None:
    assert fit_size(*size) == found
    assert load_images([Image.new("RGB", size)]).shape == (1, 3, found[1], found[0])


def test_sizes_are_whole_patches_within_the_limit() -> None:
    generator = np.random.default_rng(0)
    for _ in range(2000):
        width, height = np.exp(generator.uniform(0, 9, 2)).astype(int).tolist()
        patch = int(generator.integers(1, 20))
        pixels = int(patch**2 * np.exp(generator.uniform(0, 8)))
        columns, rows = fit_size(width, height, patch, pixels)
        assert columns % patch == rows % patch == 0
        assert min(columns, rows) > 0
        assert columns * rows <= pixels
    assert fit_size(17, 1, pixels=SMALL) == (56, 14)
    assert fit_size(1, 17, pixels=SMALL) == (14, 56)


def test_sizes_keep_the_shape_and_use_the_pixels() -> None:
    generator = np.random.default_rng(1)
    for width, height in generator.integers(300, 3000, (500, 2)).tolist():
        columns, rows = fit_size(width, height)
        step = 1.5 * 14  # half a patch of rounding, and one that is taken off
        share = (255_000 / (width * height)) ** 0.5
        assert abs(columns - share * width) <= step
        assert abs(rows - share * height) <= step


def test_less_than_a_patch_is_refused() -> None:
    assert fit_size(640, 480, pixels=196) == (14, 14)
    with pytest.raises(ValueError, match="`pixels` must be at least the pixels of one patch, 196, got 195"):
        fit_size(640, 480, pixels=195)


@pytest.mark.parametrize(
    ("size", "width", "shape"),
    [
        ((1024, 436), 512, (3, 224, 504)),
        ((640, 480), 518, (3, 392, 518)),
        ((480, 640), 518, (3, 686, 518)),
        ((1000, 3), 28, (3, 14, 28)),
    ],
)
def test_sizes_by_width(size: tuple[int, int], width: int, shape: tuple[int, int, int]) -> None:
    assert resize_to_width(Image.new("RGB", size), width).shape == shape


@pytest.mark.parametrize("width", [42, 50])
def test_resized_values_stay_within_bounds_and_a_constant_stays(width: int) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (40, 60, 3)).astype(np.uint8) * 255
    found = resize_to_width(Image.fromarray(noise), width)
    assert 0 <= found.min() < 0.3
    assert 0.7 < found.max() <= 1
    colour = Image.new("RGB", (60, 40), (10, 100, 250))
    for views in (resize_to_width(colour, width), load_images([colour], pixels=SMALL)[0]):
        constant = torch.tensor([10, 100, 250])[:, None, None] / 255
        torch.testing.assert_close(views, constant.expand_as(views), atol=1e-6, rtol=0)


def test_images_are_resized_as_published() -> None:
    """By Lanczos; where that leaves a part of a patch, then bilinearly and antialiased, as Pillow does too."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8))
    expected = torch.from_numpy(np.array(image.resize((42, 28), Image.Resampling.LANCZOS))).permute(2, 0, 1) / 255
    assert torch.equal(resize_to_width(image, 42), expected)
    assert torch.equal(load_images([image], pixels=28 * 42)[0], expected)
    twice = image.resize((54, 42), Image.Resampling.LANCZOS).resize((42, 42), Image.Resampling.BILINEAR)
    assert (255 * resize_to_width(image, 54) - torch.from_numpy(np.array(twice)).permute(2, 0, 1)).abs().max() <= 1.1


def test_an_image_in_its_own_size_comes_back_upright() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 42, 3)).astype(np.uint8)
    found = resize_to_width(Image.fromarray(pixels), 42)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert torch.equal(load_images([Image.fromarray(pixels)], pixels=28 * 42)[0], found)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_images_of_other_modes_have_three_channels(mode: str, tmp_path: Path) -> None:
    gray(255).convert(mode).save(tmp_path / "white.png")
    views = load_views(tmp_path, pixels=SMALL)
    assert views.shape == (1, 3, 28, 28)
    assert levels(views) == [255]


def test_a_folder_is_in_the_order_of_names(tmp_path: Path) -> None:
    for name, level in {"d.png": 200, "b.PNG": 50, "a.webp": 0, "c.bmp": 9, "e.png": 250}.items():
        gray(level).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    assert levels(load_views(tmp_path, pixels=SMALL)) == [0, 50, 200, 250]
    assert levels(load_views(str(tmp_path), every=2, pixels=SMALL)) == [0, 200]
    assert levels(load_views(tmp_path, every=9, pixels=SMALL)) == [0]


def test_images_are_brought_to_the_size_of_the_first(tmp_path: Path) -> None:
    for name, size in {"a.png": (60, 30), "b.png": (30, 60), "c.png": (500, 400)}.items():
        gray(90, *size).save(tmp_path / name)
    views = load_views(tmp_path, pixels=2 * SMALL)
    assert views.shape == (3, 3, 28, 56)
    assert levels(views) == [90, 90, 90]
    assert load_views(tmp_path, pixels=2 * SMALL, patch=4).shape[2:] == (28, 56)
    assert load_views(tmp_path).shape[2:] == tuple(reversed(fit_size(60, 30)))


@pytest.mark.parametrize(("every", "kept"), [(None, [0, 100, 200]), (1, range(0, 250, 10)), (4, range(0, 250, 40))])
def test_a_video_gives_every_so_many_frames(every: int | None, kept: list[int] | range, tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 25)
    found = load_views(path, every=every, pixels=2 * SMALL)
    assert found.shape[1:] == (3, 28, 56)
    assert levels(found) == pytest.approx(list(kept), abs=4.9)


@pytest.mark.parametrize("suffix", [".avi", ".mkv", ".MOV"])
def test_videos_of_other_containers(suffix: str, tmp_path: Path) -> None:
    assert levels(load_views(film(tmp_path / f"film{suffix}", 3), every=2, pixels=SMALL)) == pytest.approx(
        [0, 20], abs=4.9
    )


def test_an_animated_gif_is_a_video(tmp_path: Path) -> None:
    gray(0).save(tmp_path / "film.gif", save_all=True, append_images=[gray(100), gray(200)])
    assert levels(load_views(tmp_path / "film.gif", every=2, pixels=SMALL)) == pytest.approx([0, 200], abs=4.9)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="got .*nowhere, which does not exist"):
        load_views(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="got .*nowhere.mp4, which does not exist"):
        load_views(tmp_path / "nowhere.mp4")
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(FileNotFoundError, match=f"`path` must hold images .*, got none in {tmp_path}"):
        load_views(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        load_images([tmp_path / "nothing.png"])
    with pytest.raises(ValueError, match="`images` must hold at least one image, got none"):
        load_images([])


def test_what_is_neither_a_folder_nor_a_video(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("neither")
    with pytest.raises(ValueError, match="must be a folder or a video .*, got .*notes.txt"):
        load_views(tmp_path / "notes.txt")
    (tmp_path / "notes.txt").rename(tmp_path / "notes.mp4")
    with pytest.raises(ValueError, match="must be a video that can be read, got .*notes.mp4"):
        load_views(tmp_path / "notes.mp4")


@pytest.mark.parametrize("every", [0, -1])
@pytest.mark.parametrize("name", [".", "film.mp4"])
def test_every_must_be_positive(every: int, name: str, tmp_path: Path) -> None:
    gray(0).save(tmp_path / "a.png")
    film(tmp_path / "film.mp4", 1)
    assert len(load_views(tmp_path / name, every=1, pixels=SMALL)) == 1
    with pytest.raises(ValueError, match=f"`every` must be >= 1, got {every}"):
        load_views(tmp_path / name, every=every)


def test_a_video_cut_short(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 5)
    path.write_bytes(path.read_bytes()[:200])  # the index of an mp4 is at its end
    with pytest.raises(ValueError, match="must be a video that can be read, got .*film.mp4"):
        load_views(path)


def test_a_video_without_frames(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    (tmp_path / "sound.wav").rename(tmp_path / "sound.mp4")
    with pytest.raises(ValueError, match="must be a video with frames, got none in .*sound.mp4"):
        load_views(tmp_path / "sound.mp4")
    film(tmp_path / "empty.mp4", 0)
    with pytest.raises(ValueError, match="must be a video with frames, got none in .*empty.mp4"):
        load_views(tmp_path / "empty.mp4")


@pytest.mark.parametrize("kept", [0, 20, 300])
def test_an_image_cut_short(kept: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (28, 28, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    Image.fromarray(noise).save(tmp_path / "b.png")
    assert len(load_views(tmp_path, pixels=SMALL)) == 2
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:kept])
    with pytest.raises(ValueError, match="must be an image that can be read, got .*b.png"):
        load_views(tmp_path, pixels=SMALL)


def test_videos_need_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "film.mp4", 1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"videos need PyAV: pip install .*\[video\]"):
        load_views(path)
