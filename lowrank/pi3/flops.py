"""What a forward pass of π³ costs, part by part, by formula: multiply-accumulates, of which each is two operations."""

from collections.abc import Mapping
from typing import Any

from lowrank.pi3.model import Pi3Config

# Parts that attend; all others multiply by weights. Only the linear layers of the last three can be compressed.
ATTENTION = ("encoder attention", "frame attention", "global attention", "head attention")
LINEAR = ("encoder linears", "decoder linears", "head decoder linears")


def pi3_macs(
    config: Pi3Config,
    views: int,
    height: int,
    width: int,
    *,
    scenes: int = 1,
    saved: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Multiply-accumulates of one forward pass; norms and activations are left out, and what rotations take.

    **Arguments:** `views`: of each scene. `height`, `width`: of the images, in pixels. `saved`: layer -> parameters that its
    compressed form stores less than its weight (`saved_parameters`): each parameter of a linear layer is one multiply-accumulate
    per token, factored or not.

    **Returns:** part -> multiply-accumulates.

    **Raises:** `ValueError`: a side that is no multiple of the patch, fewer than one view or scene; `saved` for a layer of
    another part than the compressible ones.
    """
    c, frames = config, scenes * views
    for name, side in (("height", height), ("width", width)):
        if side < 1 or side % c.patch_size:
            raise ValueError(f"`{name}` must be a multiple of {c.patch_size}, got {side}.")
    for name, number in (("views", views), ("scenes", scenes)):
        if number < 1:
            raise ValueError(f"`{name}` must be >= 1, got {number}.")
    patches = height * width // c.patch_size**2
    own, tokens = patches + 1 + c.encoder_registers, patches + c.decoder_registers
    in_block = 4 + 2 * c.mlp_ratio  # weights of a block, in units of its width squared
    attention = lambda length, dim: 2 * length**2 * dim  # noqa: E731
    head = c.head_depth * in_block * c.head_dim**2 + 2 * c.decoder_dim * c.head_dim
    outs = 2 * c.point_out + c.camera_out
    camera = c.camera_out
    parts = {
        "patch embedding": frames * patches * 3 * c.patch_size**2 * c.encoder_dim,
        "encoder linears": frames * own * c.encoder_depth * in_block * c.encoder_dim**2,
        "encoder attention": frames * c.encoder_depth * attention(own, c.encoder_dim),
        "decoder linears": frames * tokens * c.decoder_depth * in_block * c.decoder_dim**2,
        "frame attention": frames * c.decoder_depth // 2 * attention(tokens, c.decoder_dim),
        "global attention": scenes * c.decoder_depth // 2 * attention(views * tokens, c.decoder_dim),
        "head decoder linears": frames * tokens * (3 * head + outs * c.head_dim),
        "head attention": frames * 3 * c.head_depth * attention(tokens, c.head_dim),
        "heads": frames * (patches * (4 * c.patch_size**2 * c.point_out + 6 * camera**2) + 2 * camera**2 + 12 * camera),
        "points": frames * height * width * 9,
    }
    for layer, number in (saved or {}).items():
        part = part_of(layer)
        parts[part] -= frames * (own if part == "encoder linears" else tokens) * number
    return parts


def part_of(layer: str) -> str:
    """The part of `pi3_macs` that a compressible linear layer belongs to.

    **Raises:** `ValueError`: a layer of another part.
    """
    stages = {"encoder": LINEAR[0], "decoder": LINEAR[1]} | {
        f"{kind}_decoder": LINEAR[2] for kind in ("point", "conf", "camera")
    }
    if (stage := layer.partition(".")[0]) not in stages:
        raise ValueError(f"`layer` must be of one of {sorted(stages)}, got {layer!r}.")
    return stages[stage]


def saved_parameters(table: list[dict[str, Any]]) -> dict[str, int]:
    """layer -> parameters saved, from the table that `lowrank.compression.compress.compress` returns."""
    return {str(row["layer"]): row["dense_parameters"] - row["parameters"] for row in table}
