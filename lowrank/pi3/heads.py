"""The decoders and heads of π³: from tokens to points, confidence and camera poses."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lowrank.pi3.blocks import Block, Table


class HeadDecoder(nn.Module):
    """Apply blocks to the tokens of one view, between two linear layers.

    **Arguments**

    - `dim_in`: channels of the input.
    - `dim`: channels of the blocks.
    - `depth`: number of blocks.
    - `heads`: number of attention heads; it divides `dim`.
    - `ratio`: channels of the hidden layer of each MLP over `dim`.
    - `dim_out`: channels of the output.
    """

    def __init__(self, dim_in: int, dim: int, depth: int, heads: int, ratio: int, dim_out: int) -> None:
        super().__init__()
        self.projects = nn.Linear(dim_in, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, ratio) for _ in range(depth)])
        self.linear_out = nn.Linear(dim, dim_out)

    def forward(self, x: Float[Tensor, "frames tokens dim"], table: Table) -> Float[Tensor, "frames tokens out"]:
        """Compute the output tokens.

        **Arguments**

        - `x`: `(frames, tokens, dim_in)`.
        - `table`: of rotary angles, see `build_rotary_table`.
        """
        x = self.projects(x)
        for block in self.blocks:
            x = block(x, table)
        return self.linear_out(x)


class PixelHead(nn.Module):
    """Map the token of each patch to values for each of its pixels.

    **Arguments**

    - `dim`: channels of a token.
    - `patch`: side of a patch, pixels.
    - `channels`: values per pixel.
    """

    def __init__(self, dim: int, patch: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, channels * patch**2)
        self.patch = patch

    def forward(
        self, x: Float[Tensor, "frames patches dim"], rows: int, columns: int
    ) -> Float[Tensor, "frames height width channels"]:
        """Compute the values of all pixels.

        **Arguments**

        - `x`: `(frames, rows columns, dim)`.
        - `rows`, `columns`: of patches.
        """
        grid = self.proj(x).transpose(1, 2).unflatten(2, (rows, columns))
        return functional.pixel_shuffle(grid, self.patch).permute(0, 2, 3, 1)


class Residual(nn.Module):
    """Add three linear layers, each followed by ReLU, to their input.

    **Arguments**

    - `dim`: channels of input and output.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_conv1, self.res_conv2, self.res_conv3 = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Compute the sum for `x`, `(..., dim)`."""
        return x + functional.relu(self.res_conv3(functional.relu(self.res_conv2(functional.relu(self.res_conv1(x))))))


class CameraHead(nn.Module):
    """Map the mean over the tokens of each view to a camera-to-world pose.

    **Arguments**

    - `dim`: channels of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_conv = nn.ModuleList([Residual(dim) for _ in range(2)])
        self.more_mlps = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_t, self.fc_rot = nn.Linear(dim, 3), nn.Linear(dim, 9)

    def forward(self, x: Float[Tensor, "frames patches dim"]) -> Float[Tensor, "frames 4 4"]:
        """Compute poses, `(frames, 4, 4)`, from tokens, `(frames, patches, dim)`."""
        for unit in self.res_conv:
            x = unit(x)
        x = self.more_mlps(x.mean(1))
        pose = torch.eye(4, device=x.device).repeat(len(x), 1, 1)
        pose[:, :3, :3] = nearest_rotation(self.fc_rot(x).unflatten(1, (3, 3)))
        pose[:, :3, 3] = self.fc_t(x)
        return pose


class _NearestRotation(torch.autograd.Function):
    """Compute R of the polar decomposition M = R P, with P symmetric.

    The derivative divides by sums of the eigenvalues of P. The derivative of the singular vectors would divide by their
    differences, which vanish as M becomes a rotation.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(matrices)
        signs = torch.ones_like(values)
        signs[..., 2] = torch.linalg.det(left @ right)
        ctx.save_for_backward(left, values, right, signs)
        return left * signs[..., None, :] @ right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        left, values, right, signs = ctx.saved_tensors
        inner = (left * signs[..., None, :]).mT @ gradients[0] @ right.mT
        eigenvalues = signs * values
        sums = eigenvalues[..., :, None] + eigenvalues[..., None, :]
        turn = torch.where(sums == 0, 0.0, (inner - inner.mT) / sums)
        return left * signs[..., None, :] @ turn @ right


def nearest_rotation(matrices: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Compute the rotation nearest to each matrix, `(..., 3, 3)`, after its rows are scaled to length 1."""
    return _NearestRotation.apply(functional.normalize(matrices, dim=-1, eps=1e-12))  # pyright: ignore[reportReturnType]
