"""The patch encoder of π³: a vision transformer with register tokens (DINOv2)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lowrank.pi3.blocks import Block


class PatchEmbed(nn.Module):
    """Map each patch of an image to a token.

    **Arguments**

    - `patch`: side of a patch, pixels.
    - `dim`: channels of a token.
    """

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames patches dim"]:
        """Compute tokens, `(frames, patches, dim)`, from images, `(frames, 3, H, W)`."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """Map normalised images to tokens of their patches: a vision transformer with register tokens (DINOv2).

    **Arguments**

    - `dim`: channels of a token.
    - `depth`: number of blocks.
    - `heads`: number of attention heads; it divides `dim`.
    - `ratio`: channels of the hidden layer of each MLP over `dim`.
    - `patch`: side of a patch, pixels.
    - `registers`: number of register tokens, >= 0.
    - `grid`: side of the learned grid of positions, patches.
    """

    def __init__(self, dim: int, depth: int, heads: int, ratio: int, patch: int, registers: int, grid: int) -> None:
        super().__init__()
        self.grid, self.patch, self.skipped = grid, patch, 1 + registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + grid**2, dim) * 0.02)
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        self.patch_embed = PatchEmbed(patch, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, ratio, scale=1.0) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames patches dim"]:
        """Compute tokens, `(frames, patches, dim)`, from images, `(frames, 3, H, W)`."""
        rows, columns = (side // self.patch for side in images.shape[-2:])
        first = self.cls_token + self.pos_embed[:, :1]
        patches = self.patch_embed(images) + self.resize_positions(rows, columns)
        special = torch.cat([first, self.register_tokens], 1).expand(len(images), -1, -1)
        x = torch.cat([special.to(patches.dtype), patches], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, self.skipped :]

    def resize_positions(self, rows: int, columns: int) -> Float[Tensor, "1 patches dim"]:
        """Resize the learned grid of positions to an image, with antialiasing even if it grows.

        **Arguments**

        - `rows`, `columns`: of patches in the image.

        **Returns** `(1, rows columns, dim)`.
        """
        learned = self.pos_embed[:, 1:]
        if rows == columns == self.grid:
            return learned
        grid = learned.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = functional.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
        return resized.flatten(2).transpose(1, 2).to(learned.dtype)
