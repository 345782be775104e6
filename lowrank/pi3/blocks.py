"""What π³ is made of: attention with rotary positions in two dimensions, and blocks with or without LayerScale."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

Table = tuple[Tensor, Tensor]  # cos and signed sin, (tokens, width of a head), float32


def rotary_table(positions: Int[Tensor, "tokens 2"], width: int, base: float | int) -> Table:
    """cos and sin of the angles of every token and channel of one attention head.

    The first half of the channels turns with y, the second with x; in a half of size d the channels j and j + d/2 are turned
    together by position * base^(-2j/d).

    **Reference:** Wang et al., π³, 2025, arXiv:2507.13347; Su et al., RoFormer, 2021, arXiv:2104.09864, in two dimensions.
    """
    half = width // 2
    frequencies = base ** (-torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half)
    angles = positions.float()[:, :, None] * frequencies  # (tokens, 2, half / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], 2).flatten(1), torch.cat([-sin, sin], 2).flatten(1)


def rotated(x: Float[Tensor, "batch heads tokens width"], table: Table) -> Float[Tensor, "batch heads tokens width"]:
    """Channels turned by the angles of a table."""
    cos, sin = table
    first, second = x.unflatten(-1, (2, 2, x.shape[-1] // 4)).unbind(-2)
    partner = torch.stack([second, first], -2).flatten(-3)
    return x * cos + partner * sin


class Attention(nn.Module):
    """Self-attention over all tokens of a sequence, with one packed projection [q | k | v] of all heads.

    `normalised`: q and k get a LayerNorm over the width of a head, shared by all heads, before they are turned.
    """

    def __init__(self, dim: int, heads: int, normalised: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if normalised:
            self.q_norm, self.k_norm = nn.LayerNorm(dim // heads, eps=1e-5), nn.LayerNorm(dim // heads, eps=1e-5)
        self.normalised = normalised

    def forward(self, x: Float[Tensor, "batch tokens dim"], table: Table | None) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.normalised:
            q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotated(q, table), rotated(k, table)
        mixed = functional.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.fc2(functional.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """One factor per channel."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(start)))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return x * self.gamma


class Block(nn.Module):
    """x + scale1 attention(norm1 x), then x + scale2 mlp(norm2 x). `scale`: where LayerScale starts; None for none."""

    def __init__(
        self, dim: int, heads: int, ratio: int, *, scale: float | int | None = None, normalised: bool = False
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads, normalised), MLP(dim, ratio)
        self.ls1, self.ls2 = (nn.Identity() if scale is None else LayerScale(dim, scale) for _ in range(2))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], table: Table | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = x + self.ls1(self.attn(self.norm1(x), table))
        return x + self.ls2(self.mlp(self.norm2(x)))
