"""π³: from any number of views of a scene, in any order and without a reference view, to points and camera poses.

A patch encoder turns views into tokens. Decoder blocks attend within a view and over all views in turn. Three head decoders
read points, confidence and poses from the last two of these blocks. Names in the state dict are those of the official checkpoint.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.pi3.blocks import Block, build_rotary_table
from lowrank.pi3.encoder import Encoder
from lowrank.pi3.heads import CameraHead, HeadDecoder, PixelHead

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@check_arguments
@dataclass(frozen=True)
class Pi3Config:
    """Hold the sizes of a π³; the defaults are the published ones.

    **Arguments**

    - `patch_size`: side of a patch, pixels.
    - `encoder_dim`, `encoder_depth`, `encoder_heads`: channels, blocks and attention heads of the encoder; `encoder_heads`
      divides `encoder_dim`.
    - `encoder_registers`: number of register tokens of the encoder, >= 0.
    - `pos_grid`: side of the learned grid of positions, patches.
    - `decoder_dim`, `decoder_depth`, `decoder_heads`: the same for the decoder. `decoder_dim` equals `encoder_dim` and is a
      multiple of 4 `decoder_heads`; `decoder_depth` is even.
    - `decoder_registers`: number of register tokens of the decoder, >= 0.
    - `head_dim`, `head_depth`, `head_heads`: the same for each of the three head decoders; `head_dim` is a multiple of 4
      `head_heads`.
    - `point_out`: channels that the decoders of points and confidence pass to their heads.
    - `camera_out`: channels that the decoder of poses passes to its head.
    - `rope_base`: of the frequencies of rotary positions.
    - `mlp_ratio`: channels of the hidden layer of each MLP over the channels of its block.

    **Raises**

    - `ValueError`: a size below 1; sizes that do not fit together.
    """

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
            require(getattr(self, field.name) >= least, field.name, f"be >= {least}", getattr(self, field.name))
        if self.decoder_dim != self.encoder_dim:
            raise ValueError(
                f"`decoder_dim` must be `encoder_dim`, because nothing projects between them, got {self.decoder_dim} and "
                f"{self.encoder_dim}."
            )
        even = self.decoder_depth >= 2 and self.decoder_depth % 2 == 0
        require(even, "decoder_depth", "be even, for frame and global blocks in turn", self.decoder_depth)
        for stage, multiple in (("encoder", 1), ("decoder", 4), ("head", 4)):
            dim, heads = getattr(self, f"{stage}_dim"), getattr(self, f"{stage}_heads")
            rule = f"be a multiple of {multiple} times `{stage}_heads` ({heads})"
            require(dim % (heads * multiple) == 0, f"{stage}_dim", rule, dim)


class Pi3(nn.Module):
    """Compute points, confidence and camera poses from views of scenes.

    The scale and the frame of each scene are arbitrary. Views in another order give the same outputs in that order.

    **Arguments**

    - `config`: the sizes; default: the published ones.

    **Reference** Wang et al., π³: Scalable Permutation-Equivariant Visual Geometry Learning, 2025, arXiv:2507.13347.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: Pi3Config | None = None) -> None:
        super().__init__()
        self.config = c = config or Pi3Config()
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1))
        self.register_token = nn.Parameter(torch.randn(1, 1, c.decoder_registers, c.decoder_dim) * 1e-6)
        sizes = (c.encoder_dim, c.encoder_depth, c.encoder_heads, c.mlp_ratio)
        self.encoder = Encoder(*sizes, c.patch_size, c.encoder_registers, c.pos_grid)
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
        """Compute the outputs for B scenes of N views.

        **Arguments**

        - `images`: `(B, N, 3, H, W)`, in [0, 1]; H and W are multiples of the patch.

        **Returns** in float32: `points`, `(B, N, H, W, 3)`, in the frame of the scene; `local_points`, the same in the frame of
        each camera (x right, y down, z forward); `conf`, `(B, N, H, W, 1)`, a logit; `camera_poses`, `(B, N, 4, 4)`, camera to
        world.

        **Raises**

        - `ValueError`: see `check_images`.
        """
        check_images(images, self.config.patch_size)
        scenes, views = images.shape[:2]
        rows, columns = (side // self.config.patch_size for side in images.shape[-2:])
        frames = (images.flatten(0, 1) - self.image_mean) / self.image_std
        positions = self.token_positions(rows, columns)
        hidden = self.decode(self.encoder(frames), scenes, views, positions)
        table = build_rotary_table(positions, self.config.head_dim // self.config.head_heads, self.config.rope_base)
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

    def token_positions(self, rows: int, columns: int) -> Tensor:
        """Return (y, x) of the tokens of a view: register tokens at (0, 0), patches from (1, 1) on.

        **Arguments**

        - `rows`, `columns`: of patches.

        **Returns** `(tokens, 2)`, int64.
        """
        device = self.register_token.device
        grid = torch.cartesian_prod(
            torch.arange(1, rows + 1, device=device), torch.arange(1, columns + 1, device=device)
        )
        return torch.cat([grid.new_zeros(self.config.decoder_registers, 2), grid.view(-1, 2)])

    def decode(
        self, patches: Float[Tensor, "frames patches dim"], scenes: int, views: int, positions: Tensor
    ) -> Float[Tensor, "frames tokens twice"]:
        """Apply the decoder, whose blocks attend within a view and over all views of a scene in turn.

        **Arguments**

        - `patches`: tokens from the encoder, `(scenes views, patches, dim)`.
        - `scenes`: number of scenes.
        - `views`: views per scene.
        - `positions`: `(tokens, 2)`, see `token_positions`.

        **Returns** the outputs of the last two blocks side by side, `(scenes views, tokens, 2 dim)`, register tokens first.
        """
        special = self.register_token[0].expand(len(patches), -1, -1)
        x = torch.cat([special.to(patches.dtype), patches], 1)
        width = self.config.decoder_dim // self.config.decoder_heads
        frame_table = build_rotary_table(positions, width, self.config.rope_base)
        scene_table = tuple(part.repeat(views, 1) for part in frame_table)
        tokens, before = x.shape[1], x
        for index, block in enumerate(self.decoder):
            before = x
            if index % 2:
                x = block(x.reshape(scenes, views * tokens, -1), scene_table).reshape(scenes * views, tokens, -1)
            else:
                x = block(x, frame_table)
        return torch.cat([before, x], -1)


def autocast(device: torch.device, precision: str) -> Any:
    """Return the context of a forward pass in a precision; the heads compute in float32 in any.

    **Arguments**

    - `device`: of the model.
    - `precision`: 'fp32', or 'bf16' for autocast to bfloat16.

    **Raises**

    - `ValueError`: another precision.
    """
    require(precision in ("fp32", "bf16"), "precision", "be 'fp32' or 'bf16'", precision)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def check_images(images: Tensor, patch: int) -> None:
    """Check the input of `Pi3`; inside `torch.compile` its values are not read.

    **Arguments**

    - `images`: should be `(B, N, 3, H, W)`, in [0, 1].
    - `patch`: H and W should be multiples of it.

    **Raises**

    - `ValueError`: another number of axes or channels; an empty axis; sides that are no multiples of the patch; values outside
      [0, 1]; NaN.
    """
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
