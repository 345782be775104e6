"""Choose the data that π³ is calibrated on: several views at a time, with values in [0, 1] and no other normalisation."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank.io.checks import SPLITS, require, require_frozen
from lowrank.pi3.data import Scene, load_scenes, rendered_scenes
from lowrank.pi3.scenes import SPLIT_SEEDS

RENDERED_LAYOUT = "scenes"


def split_of(source: Mapping[str, Any]) -> str:
    """Return the split that a source belongs to: the one that it names, or else 'test'.

    **Arguments**

    - `source`: see `load_source`.

    **Raises**

    - `ValueError`: an unknown split.
    """
    split = source.get("split", "test")
    require(split in SPLITS, "split", f"be one of {SPLITS}", split)
    return split


def load_source(source: Mapping[str, Any], seed: int = 0, frozen: str | None = None) -> Iterator[Scene]:
    """Load the scenes that a parameter set names.

    **Arguments**

    - `source`: `layout`, `split`, by default 'test', and the options of `load_scenes`; for layout 'scenes' those of
      `rendered_scenes` but `first`, since the split decides the seeds of its scenes (`SPLIT_SEEDS`).
    - `seed`: rendered scenes of another seed are other scenes; data sets do not depend on it. Default 0.
    - `frozen`: hash of the frozen choices, which opens the split 'test'. Default None: it is closed.

    **Raises**

    - `ValueError`: no layout; unknown or missing options; an unknown split, or one with fewer scenes; 'test' before the
      choices are frozen.
    """
    options, split = dict(source), split_of(source)
    require("layout" in options, "source", "name a layout", sorted(options))
    require_frozen(split, frozen)
    options.pop("split", None)
    layout = options.pop("layout")
    try:
        if layout == RENDERED_LAYOUT:
            seeds = SPLIT_SEEDS[split][seed * options["scenes"] :]
            most = f"be at most {len(seeds)}, what the split {split!r} has left for seed {seed}"
            require(options["scenes"] <= len(seeds), "scenes", most, options["scenes"])
            return rendered_scenes(seeds.start, **options)
        return load_scenes(layout, **options)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"`source` must hold the options of layout {layout!r}, got {sorted(options)}: {error}"
        ) from error


def view_windows(scenes: Iterable[Scene], views: int, samples: int, seed: int) -> list[Tensor]:
    """Choose windows of consecutive views at random from all windows of the scenes, without replacement.

    **Arguments**

    - `scenes`: each is cut into windows from its first view on; a shorter rest is left out.
    - `views`: views per window, >= 1.
    - `samples`: number of windows, >= 1.
    - `seed`: of the choice and its order.

    **Returns** `samples` windows, `(views, 3, H, W)`.

    **Raises**

    - `ValueError`: `views` or `samples` below 1; fewer windows than `samples`.
    """
    for name, number in (("views", views), ("samples", samples)):
        require(number >= 1, name, "be >= 1", number)
    windows = [part for scene in scenes for part in scene.images.split(views) if len(part) == views]
    require(
        len(windows) >= samples,
        "samples",
        f"be at most {len(windows)}, the number of windows of {views} views",
        samples,
    )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return [windows[index] for index in order[:samples].tolist()]


def image_batches(windows: Iterable[Tensor], batch_size: int, *, single: bool = False) -> list[Tensor]:
    """Collect windows of one shape into batches, in order.

    **Arguments**

    - `windows`: `(N, 3, H, W)` each; shapes may differ.
    - `batch_size`: most windows per batch, >= 1.
    - `single`: pass each view alone, as the published calibration does, so that global attention never sees a second view.
      Default False.

    **Returns** batches `(B, N, 3, H, W)`, or `(B N, 1, 3, H, W)` if `single`.
    """
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for window in windows:
        by_shape.setdefault(tuple(window.shape), []).append(window)
    batches = [part for group in by_shape.values() for part in torch.stack(group).split(batch_size)]
    return [batch.flatten(0, 1)[:, None] for batch in batches] if single else batches
