"""π³: from any number of views of a scene to points and camera poses, in no order and with no reference view.

Tokens of a patch encoder go through blocks that attend within a view and over all views in turn; three decoders read points,
confidence and poses off the last two of them. Keys of the state dict are those of the official checkpoint.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lowrank.pi3.blocks import Block, Table, rotary_table
from lowrank.pi3.heads import CameraHead, HeadDecoder, PixelHead

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pi3Config:
    """Sizes; the defaults are those of the published model. `pos_grid`: side of the learned grid of positions. `head_dim`: width
    of the three head decoders. `point_out`, `camera_out`: width of what they give to the heads. `rope_base`: of the rotary
    positions. `mlp_ratio`: width of the hidden layer of every MLP over that of its block."""

    patch_size: int = 14
    encoder_dim: int = 1024
    encoder_depth: int = 24
    encoder_heads: int = 16
    encoder_registers: int = 4
    pos_grid: int = 37
    decoder_dim: int = 1024
    decoder_depth: int = 36
    decoder_heads: int = 16
    decoder_registers: int = 5
    head_dim: int = 1024
    head_depth: int = 5
    head_heads: int = 16
    point_out: int = 1024
    camera_out: int = 512
    rope_base: float | int = 100
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name.endswith("registers") else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"`{field.name}` must be >= {least}, got {getattr(self, field.name)}.")
        if self.decoder_dim != self.encoder_dim:
            raise ValueError(
                f"`decoder_dim` must be `encoder_dim`, since nothing projects between them, got {self.decoder_dim} and "
                f"{self.encoder_dim}."
            )
        if self.decoder_depth < 2 or self.decoder_depth % 2:
            raise ValueError(
                f"`decoder_depth` must be even, frame and global blocks in turn, got {self.decoder_depth}."
            )
        for stage, multiple in (("encoder", 1), ("decoder", 4), ("head", 4)):
            dim, heads = getattr(self, f"{stage}_dim"), getattr(self, f"{stage}_heads")
            if dim % (heads * multiple):
                raise ValueError(
                    f"`{stage}_dim` must be a multiple of {multiple} times `{stage}_heads` ({heads}), got {dim}."
                )


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames patches dim"]:
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """A vision transformer with register tokens (DINOv2): images that are normalised to the tokens of their patches."""

    def __init__(self, config: Pi3Config) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.grid, self.patch, self.skipped = config.pos_grid, config.patch_size, 1 + config.encoder_registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + config.pos_grid**2, dim) * 0.02)
        self.register_tokens = nn.Parameter(torch.zeros(1, config.encoder_registers, dim))
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.blocks = nn.ModuleList(
            [Block(dim, config.encoder_heads, config.mlp_ratio, scale=1.0) for _ in range(config.encoder_depth)]
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames patches dim"]:
        rows, columns = (side // self.patch for side in images.shape[-2:])
        first, patches = (
            self.cls_token + self.pos_embed[:, :1],
            self.patch_embed(images) + self.positions(rows, columns),
        )
        own = torch.cat([first, self.register_tokens], 1).expand(len(images), -1, -1)
        x = torch.cat([own.to(patches.dtype), patches], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, self.skipped :]

    def positions(self, rows: int, columns: int) -> Float[Tensor, "1 patches dim"]:
        """The learned grid, brought to the size of the image; antialiased also where it grows."""
        own = self.pos_embed[:, 1:]
        if rows == columns == self.grid:
            return own
        grid = own.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = functional.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
        return resized.flatten(2).transpose(1, 2).to(own.dtype)


class Pi3(nn.Module):
    """`Pi3(config)(images)`: images `(B, N, 3, H, W)` in [0, 1], N views of each of B scenes; H and W multiples of the patch.

    **Returns:** float32: `points` (B, N, H, W, 3) in the frame of the scene; `local_points` the same in the frame of each camera
    (x right, y down, z forward); `conf` (B, N, H, W, 1), a logit; `camera_poses` (B, N, 4, 4), camera to world. The scale and
    the frame of a scene are free. Views in another order give the same outputs in that order.

    **Raises:** `ValueError`: another number of axes or channels, sides that are no multiples of the patch, values outside
    [0, 1], NaN. (Values are not looked at inside `torch.compile`.)

    **Reference:** Wang et al., π³: Scalable Permutation-Equivariant Visual Geometry Learning, 2025, arXiv:2507.13347.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: Pi3Config | None = None) -> None:
        super().__init__()
        self.config = c = config or Pi3Config()
        self.register_buffer("image_mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(STD).view(1, 3, 1, 1))
        self.register_token = nn.Parameter(torch.randn(1, 1, c.decoder_registers, c.decoder_dim) * 1e-6)
        self.encoder = Encoder(c)
        self.decoder = nn.ModuleList(
            [
                Block(c.decoder_dim, c.decoder_heads, c.mlp_ratio, scale=0.01, normalised=True)
                for _ in range(c.decoder_depth)
            ]
        )
        sizes = (2 * c.decoder_dim, c.head_dim, c.head_depth, c.head_heads, c.mlp_ratio)
        self.point_decoder, self.conf_decoder = HeadDecoder(*sizes, c.point_out), HeadDecoder(*sizes, c.point_out)
        self.camera_decoder = HeadDecoder(*sizes, c.camera_out)
        self.point_head = PixelHead(c.point_out, c.patch_size, 3)
        self.conf_head = PixelHead(c.point_out, c.patch_size, 1)
        self.camera_head = CameraHead(c.camera_out)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        check_images(images, self.config.patch_size)
        scenes, views = images.shape[:2]
        rows, columns = (side // self.config.patch_size for side in images.shape[-2:])
        frames = (images.flatten(0, 1) - self.image_mean) / self.image_std
        positions = self.positions(rows, columns)
        hidden = self.decode(self.encoder(frames), scenes, views, positions)
        table = self.table(positions, self.config.head_dim // self.config.head_heads)
        skipped = self.config.decoder_registers
        point, conf, camera = (
            decoder(hidden, table)[:, skipped:].float()
            for decoder in (self.point_decoder, self.conf_decoder, self.camera_decoder)
        )
        with torch.autocast(images.device.type, enabled=False):
            xyz, logit = self.point_head(point, rows, columns), self.conf_head(conf, rows, columns)
            z = xyz[..., 2:].exp()
            local = torch.cat([xyz[..., :2] * z, z], -1)
            poses = self.camera_head(camera)
            points = torch.einsum("fij,fhwj->fhwi", poses[:, :3, :3], local) + poses[:, None, None, :3, 3]
        outputs = {"points": points, "local_points": local, "conf": logit, "camera_poses": poses}
        return {name: value.unflatten(0, (scenes, views)) for name, value in outputs.items()}

    def positions(self, rows: int, columns: int) -> Tensor:
        """(y, x) of the tokens of a view: special ones at (0, 0), patches from (1, 1) on; int64."""
        device = self.register_token.device
        grid = torch.cartesian_prod(
            torch.arange(1, rows + 1, device=device), torch.arange(1, columns + 1, device=device)
        )
        return torch.cat([grid.new_zeros(self.config.decoder_registers, 2), grid.view(-1, 2)])

    def table(self, positions: Tensor, width: int) -> Table:
        return rotary_table(positions, width, self.config.rope_base)

    def decode(
        self, patches: Float[Tensor, "frames patches dim"], scenes: int, views: int, positions: Tensor
    ) -> Float[Tensor, "frames tokens twice"]:
        """The outputs of the last two blocks, side by side, special tokens first."""
        special = self.register_token[0].expand(len(patches), -1, -1)
        x = torch.cat([special.to(patches.dtype), patches], 1)
        width = self.config.decoder_dim // self.config.decoder_heads
        own = self.table(positions, width)
        both = tuple(part.repeat(views, 1) for part in own)
        tokens, before = x.shape[1], x
        for index, block in enumerate(self.decoder):
            before = x
            if index % 2:
                x = block(x.reshape(scenes, views * tokens, -1), both).reshape(scenes * views, tokens, -1)
            else:
                x = block(x, own)
        return torch.cat([before, x], -1)


def autocast(device: torch.device, precision: str) -> Any:
    """The context of a forward pass: 'fp32', or 'bf16' where the model and its heads leave it to torch.

    **Raises:** `ValueError`: another precision.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"`precision` must be 'fp32' or 'bf16', got {precision!r}.")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def check_images(images: Tensor, patch: int) -> None:
    """**Raises:** `ValueError`: what `Pi3` does not take."""
    if images.dim() != 5 or images.shape[2] != 3:
        raise ValueError(f"`images` must be of shape (B, N, 3, H, W), got {tuple(images.shape)}.")
    for side, name in zip(images.shape[-2:], "HW", strict=True):
        if side == 0 or side % patch:
            raise ValueError(f"`images` must have {name} a multiple of {patch}, got {side}.")
    if 0 in images.shape:
        raise ValueError(f"`images` must hold at least one view, got shape {tuple(images.shape)}.")
    if torch.compiler.is_compiling():
        return
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`images` must be in [0, 1] and without NaN, got values from {low} to {high}.")
