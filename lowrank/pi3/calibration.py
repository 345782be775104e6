"""What π³ is calibrated on: several views at a time, as it sees them in use, with values in [0, 1] and no other normalisation."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank.pi3.data import Scene, load_scenes, rendered_scenes

RENDERED = "scenes"


def load_source(source: Mapping[str, Any], seed: int = 0) -> Iterator[Scene]:
    """The scenes that a parameter set names: `layout` and the options of `load_scenes`; or layout 'scenes' and the options of
    `rendered_scenes`, of which every seed has its own.

    **Raises:** `ValueError`: no layout, unknown options.
    """
    options = dict(source)
    if "layout" not in options:
        raise ValueError(f"`source` must name a layout, got {sorted(options)}.")
    layout = options.pop("layout")
    try:
        if layout == RENDERED:
            return rendered_scenes(options.pop("first", 0) + seed * options["scenes"], **options)
        return load_scenes(layout, **options)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"`source` must hold the options of layout {layout!r}, got {sorted(options)}: {error}"
        ) from error


def view_windows(scenes: Iterable[Scene], views: int, samples: int, seed: int) -> list[Tensor]:
    """Windows of `views` consecutive views (views, 3, H, W), drawn from all windows of the scenes without replacement.

    **Raises:** `ValueError`: fewer windows than asked for; fewer than one view or sample.
    """
    for name, number in (("views", views), ("samples", samples)):
        if number < 1:
            raise ValueError(f"`{name}` must be >= 1, got {number}.")
    windows = [part for scene in scenes for part in scene.images.split(views) if len(part) == views]
    if len(windows) < samples:
        raise ValueError(
            f"`samples` must be at most {len(windows)}, the windows of {views} views there are, got {samples}."
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return [windows[index] for index in order[:samples].tolist()]


def image_batches(windows: Iterable[Tensor], batch_size: int, *, single: bool = False) -> list[Tensor]:
    """Batches (B, N, 3, H, W) of windows, in order; of one shape within a batch.

    **Arguments:** `single`: every view by itself, (B N, 1, 3, H, W), as the published calibration does: global attention then
    never sees a second view.
    """
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for window in windows:
        by_shape.setdefault(tuple(window.shape), []).append(window)
    batches = [part for group in by_shape.values() for part in torch.stack(group).split(batch_size)]
    return [batch.flatten(0, 1)[:, None] for batch in batches] if single else batches
