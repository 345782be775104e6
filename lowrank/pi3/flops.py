"""Compute the cost of a forward pass of π³ by formula, part by part, in multiply-accumulates of two operations each."""

from collections.abc import Mapping
from typing import Any

from lowrank.io.checks import require
from lowrank.pi3.model import Pi3Config

# Parts that attend; all others multiply by weights. Compression can shrink the linear layers of `LINEAR_PARTS` only.
ATTENTION_PARTS = ("encoder attention", "frame attention", "global attention", "head attention")
LINEAR_PARTS = ("encoder linears", "decoder linears", "head decoder linears")


def pi3_macs(
    config: Pi3Config, views: int, height: int, width: int, saved: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Count the multiply-accumulates of a forward pass over one scene, without norms, activations and rotations.

    B scenes cost B times as much. A parameter of a linear layer costs one multiply-accumulate per token, factored or not.

    **Arguments**

    - `config`: the sizes of the model.
    - `views`: views of the scene, >= 1.
    - `height`, `width`: of the images in pixels, multiples of the patch.
    - `saved`: layer -> parameters that its compressed form saves, see `saved_parameters`; default: no layer is compressed.

    **Returns** part -> multiply-accumulates.

    **Raises**

    - `ValueError`: a side that is no multiple of the patch; fewer than one view; a layer in `saved` that cannot be compressed.
    """
    c = config
    for name, side in (("height", height), ("width", width)):
        require(side >= 1 and side % c.patch_size == 0, name, f"be a multiple of {c.patch_size}", side)
    require(views >= 1, "views", "be >= 1", views)
    patches = height * width // c.patch_size**2
    encoder_tokens, tokens = patches + 1 + c.encoder_registers, patches + c.decoder_registers
    parts = {
        "patch embedding": views * patches * 3 * c.patch_size**2 * c.encoder_dim,
        "encoder linears": views * encoder_tokens * c.encoder_depth * _block_weights(c, c.encoder_dim),
        "encoder attention": views * c.encoder_depth * _attention(encoder_tokens, c.encoder_dim),
        "decoder linears": views * tokens * c.decoder_depth * _block_weights(c, c.decoder_dim),
        "frame attention": views * c.decoder_depth // 2 * _attention(tokens, c.decoder_dim),
        "global attention": c.decoder_depth // 2 * _attention(views * tokens, c.decoder_dim),
        "head decoder linears": views * tokens * _head_decoder_weights(c),
        "head attention": views * 3 * c.head_depth * _attention(tokens, c.head_dim),
        "heads": views * _head_macs(c, patches),
        "points": views * height * width * 9,
    }
    for layer, number in (saved or {}).items():
        part = find_part(layer)
        parts[part] -= views * (encoder_tokens if part == "encoder linears" else tokens) * number
    return parts


def _attention(length: int, dim: int) -> int:
    return 2 * length**2 * dim


def _block_weights(c: Pi3Config, dim: int) -> int:
    return (4 + 2 * c.mlp_ratio) * dim**2


def _head_decoder_weights(c: Pi3Config) -> int:
    """Count the weights of the three head decoders."""
    shared = c.head_depth * _block_weights(c, c.head_dim) + 2 * c.decoder_dim * c.head_dim
    return 3 * shared + (2 * c.point_out + c.camera_out) * c.head_dim


def _head_macs(c: Pi3Config, patches: int) -> int:
    """Count the multiply-accumulates of the three heads for one view."""
    camera = c.camera_out
    return patches * (4 * c.patch_size**2 * c.point_out + 6 * camera**2) + 2 * camera**2 + 12 * camera


def find_part(layer: str) -> str:
    """Find the part of `pi3_macs` that a compressible linear layer belongs to.

    **Arguments**

    - `layer`: its name in the model.

    **Raises**

    - `ValueError`: a layer of another part.
    """
    stages = {"encoder": LINEAR_PARTS[0], "decoder": LINEAR_PARTS[1]} | {
        f"{kind}_decoder": LINEAR_PARTS[2] for kind in ("point", "conf", "camera")
    }
    stage = layer.partition(".")[0]
    require(stage in stages, "layer", f"be of one of {sorted(stages)}", layer)
    return stages[stage]


def saved_parameters(table: list[dict[str, Any]]) -> dict[str, int]:
    """Compute how many parameters each compressed layer saves.

    **Arguments**

    - `table`: from `lowrank.compression.replace.replace_layers`.

    **Returns** layer -> parameters.
    """
    return {str(row["layer"]): row["dense_parameters"] - row["parameters"] for row in table}
