"""The transformer block of π³: attention with rotary positions in two dimensions, MLP, and LayerScale if wanted."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

Table = tuple[Tensor, Tensor]  # cos and signed sin, (tokens, width of a head), float32


def build_rotary_table(positions: Int[Tensor, "tokens 2"], width: int, base: float | int) -> Table:
    """Compute cos and sin of the rotary angles of every token and every channel of one attention head.

    The first half of the channels encodes y, the second x. In a half of size d, the channels j and j + d/2 rotate together by
    position * base^(-2j/d).

    **Arguments**

    - `positions`: `(tokens, 2)`, int64, (y, x) of each token.
    - `width`: channels of a head, a multiple of 4.
    - `base`: of the frequencies, > 1.

    **Returns** cos, and sin with the sign that `rotate` needs: `(tokens, width)`, float32.

    **Reference** Wang et al., π³, 2025, arXiv:2507.13347; Su et al., RoFormer, 2021, arXiv:2104.09864, in two dimensions.
    """
    half = width // 2
    frequencies = base ** (-torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half)
    angles = positions.float()[:, :, None] * frequencies  # (tokens, 2, half / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], 2).flatten(1), torch.cat([-sin, sin], 2).flatten(1)


def rotate(x: Float[Tensor, "batch heads tokens width"], table: Table) -> Float[Tensor, "batch heads tokens width"]:
    """Rotate queries or keys by the angles of a table.

    **Arguments**

    - `x`: `(batch, heads, tokens, width)`.
    - `table`: from `build_rotary_table` for the same tokens and width.
    """
    cos, sin = table
    first, second = x.unflatten(-1, (2, 2, x.shape[-1] // 4)).unbind(-2)
    partner = torch.stack([second, first], -2).flatten(-3)
    return x * cos + partner * sin


class Attention(nn.Module):
    """Attend over all tokens of a sequence, with one projection to [q | k | v] of all heads.

    **Arguments**

    - `dim`: channels of a token.
    - `heads`: number of heads; it divides `dim`.
    - `normalised`: whether q and k get a LayerNorm over the channels of a head, shared by all heads, before they rotate.
    """

    def __init__(self, dim: int, heads: int, normalised: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if normalised:
            self.q_norm, self.k_norm = nn.LayerNorm(dim // heads, eps=1e-5), nn.LayerNorm(dim // heads, eps=1e-5)
        self.normalised = normalised

    def forward(self, x: Float[Tensor, "batch tokens dim"], table: Table | None) -> Float[Tensor, "batch tokens dim"]:
        """Compute the output of attention.

        **Arguments**

        - `x`: `(batch, tokens, dim)`.
        - `table`: of rotary angles, see `build_rotary_table`; None for no positions.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.normalised:
            q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        mixed = functional.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Apply two linear layers with a GELU between them.

    **Arguments**

    - `dim`: channels of input and output.
    - `ratio`: channels of the hidden layer over `dim`.
    """

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Compute fc2(GELU(fc1(x))) for `x`, `(..., dim)`."""
        return self.fc2(functional.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Multiply each channel by a learned factor.

    **Arguments**

    - `dim`: number of channels.
    - `start`: first value of all factors.
    """

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(start)))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Scale `x`, `(..., dim)`."""
        return x * self.gamma


class Block(nn.Module):
    """Add attention, then an MLP: x + scale1 attention(norm1 x), then x + scale2 mlp(norm2 x).

    **Arguments**

    - `dim`: channels of a token.
    - `heads`: number of attention heads; it divides `dim`.
    - `ratio`: channels of the hidden layer of the MLP over `dim`.
    - `scale`: first value of LayerScale; default: no LayerScale.
    - `normalised`: whether q and k are normalised, see `Attention`; default False.
    """

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
        """Compute the output of the block.

        **Arguments**

        - `x`: `(batch, tokens, dim)`.
        - `table`: of rotary angles, see `build_rotary_table`; default: no positions.
        """
        x = x + self.ls1(self.attn(self.norm1(x), table))
        return x + self.ls2(self.mlp(self.norm2(x)))
