"""Layers with a weight U S V^T: fixed orthonormal bases U and V, and a small trained matrix S (OIALR)."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lowrank.factorization.precision import with_float64
from lowrank.nn.lazy_weight import make_lazy


class USV(NamedTuple):
    """Hold the three matrices of a weight U S V^T, `(m, n)`.

    **Arguments**

    - `u`: U, `(m, r)`, with orthonormal columns.
    - `s`: S, `(r, r)`.
    - `vh`: V^T, `(r, n)`, with orthonormal rows.
    """

    u: Tensor
    s: Tensor
    vh: Tensor


class _Bases(nn.Module):
    """Hold buffers `u` and `vh`, parameter `s` and a bias, for the flattened weight W = U S V^T of either layer below."""

    u: Tensor
    vh: Tensor
    like: Tensor
    bias: nn.Parameter | None

    def __init__(self, out: int, inputs: int, rank: int, bias: bool, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.register_buffer("u", torch.eye(out, rank, dtype=dtype))
        self.register_buffer("vh", torch.eye(rank, inputs, dtype=dtype))
        self.s = nn.Parameter(torch.zeros(rank, rank, dtype=dtype))  # declared before the bias, as a weight is
        self.register_parameter("bias", nn.Parameter(torch.zeros(out, dtype=dtype)) if bias else None)
        # An empty tensor of the dtype that `merge` returns to, the converted layer's: it follows every later cast.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.register_load_state_dict_post_hook(_place_like)

    @property
    def rank(self) -> int:
        """Return r, the size of S."""
        return len(self.s)

    @property
    def usv(self) -> USV:
        """Return copies of the three matrices in float64, without gradients."""
        return USV(*(with_float64(part.detach()).double() for part in (self.u, self.s, self.vh)))

    @torch.no_grad()
    def set_usv(self, usv: USV) -> nn.Parameter:
        """Replace the three matrices: inside the same tensors if the rank stays, else by new tensors.

        **Arguments**

        - `usv`: the new matrices, of any rank; they are cast to the dtype and device of the layer.

        **Returns** the parameter S, which is a new one if the rank changed.
        """
        if len(usv.s) == self.rank:
            self.u.copy_(usv.u)
            self.vh.copy_(usv.vh)
            self.s.copy_(usv.s)
        else:
            self.u, self.vh = usv.u.to(self.u).contiguous(), usv.vh.to(self.vh).contiguous()
            self.s = nn.Parameter(usv.s.to(self.s).contiguous(), requires_grad=self.s.requires_grad)
        return self.s

    def is_thin(self, tokens: int) -> bool:
        """Return True if three thin products with `tokens` vectors cost less than computing U S V^T and using it."""
        (m, r), n = self.u.shape, self.vh.shape[1]
        return tokens * r * (m + r + n) < tokens * m * n + r * m * (r + n)

    def flat_weight(self) -> Float[Tensor, "out flat"]:
        """Compute U S V^T, `(out, flat)`, with gradients for S; each call multiplies again."""
        return self.u @ self.s @ self.vh

    def lazy_weight(self, *shape: int) -> Tensor:
        """Return U S V^T in a shape and in the dtype of the dense layer, with gradients for S; each use multiplies again."""
        return make_lazy(self.like, shape, lambda: self.flat_weight().to(self.like.dtype).view(shape))

    def dense(self) -> Float[Tensor, "out flat"]:
        """Compute U S V^T, `(out, flat)`, in float64, without gradients."""
        u, s, vh = self.usv
        return u @ s @ vh


def _place_like(module: Any, _: object) -> None:
    """Bring the empty tensor that no state holds to the loaded ones: it is on the meta device if they were."""
    module.like = torch.empty_like(module.like, device=module.u.device)


class USVLinear(_Bases):
    """Compute y = U (S (V^T x)) + b, and train S and b only.

    `u` `(out, rank)` and `vh` `(rank, in)` are buffers, `s` `(rank, rank)` is a parameter. A pass takes three thin products if
    they cost less, else it computes U S V^T and takes one product: a low rank saves time, and full rank costs little more than a
    dense layer. `from_dense` uses at least float32, because bases in bfloat16 are orthonormal to 3 % only.

    **Arguments**

    - `in_features`, `out_features`: sizes of the weight, `(out, in)`.
    - `rank`: size of S, in [1, min(out, in)].
    - `bias`: whether the layer has a bias; default True.
    - `dtype`: of matrices and bias; default: torch's default dtype.

    **Reference** Coquelin et al., arXiv:2401.08505, section 4 (whose code computes the whole weight in every pass).
    """

    storage = "usv"

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(out_features, in_features, rank, bias, dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_dense(cls, layer: nn.Linear, usv: USV) -> "USVLinear":
        """Convert a linear layer; the new layer shares its bias parameter.

        **Arguments**

        - `layer`: the layer to convert; it is not changed.
        - `usv`: matrices of its weight.
        """
        rank, has_bias = len(usv.s), layer.bias is not None
        return _fill(cls(layer.in_features, layer.out_features, rank, has_bias, _widen(layer.weight)), layer, usv)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Return U S V^T, `(out, in)`, with gradients for S; each use multiplies again, see `LazyWeight`."""
        return self.lazy_weight(self.out_features, self.in_features)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Compute U (S (V^T x)) + b for `x`, `(..., in)`, in the dtype of `x`."""
        if not self.is_thin(x.shape[:-1].numel()):
            return functional.linear(x, self.flat_weight().to(x.dtype), self.bias)
        u, s, vh = (part.to(x.dtype) for part in (self.u, self.s, self.vh))
        return functional.linear(functional.linear(functional.linear(x, vh), s), u, self.bias)

    def merge(self) -> nn.Linear:
        """Convert back to an `nn.Linear` with the same weight; it shares the bias parameter."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        return _fill_dense(layer, self, self.dense())

    def extra_repr(self) -> str:
        """Return the sizes, for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class USVConv2d(_Bases):
    """Convolve with a kernel U S V^T: k x k with V^T to `rank` channels, 1 x 1 with S, 1 x 1 with U.

    For one group and zero padding. `u` `(out, rank)` and `vh` `(rank, in * kh * kw)` are buffers, `s` `(rank, rank)` a parameter.

    **Arguments**

    - `layer`: a convolution whose sizes, stride, padding and dilation are taken over; its weight is not.
    - `rank`: size of S, in [1, min(out, in * kh * kw)]. The matrices have the dtype of the layer's weight, but at least float32.
    """

    def __init__(self, layer: nn.Conv2d, rank: int) -> None:
        out, inputs, has_bias = layer.out_channels, layer.weight[0].numel(), layer.bias is not None
        super().__init__(out, inputs, rank, has_bias, _widen(layer.weight))
        self.in_channels, self.out_channels, self.kernel_size = layer.in_channels, layer.out_channels, layer.kernel_size
        self.geometry: dict[str, Any] = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation)

    @classmethod
    def from_dense(cls, layer: nn.Conv2d, usv: USV) -> "USVConv2d":
        """Convert a convolution; the new layer shares its bias parameter.

        **Arguments**

        - `layer`: the convolution to convert; it is not changed.
        - `usv`: matrices of its weight, flattened to `(out, in * kh * kw)`.
        """
        return _fill(cls(layer, len(usv.s)), layer, usv)

    @property
    def weight(self) -> Float[Tensor, "out in kh kw"]:
        """Return the kernel U S V^T, `(out, in, kh, kw)`, with gradients for S; each use multiplies again."""
        return self.lazy_weight(self.out_channels, self.in_channels, *self.kernel_size)

    def _unflatten(self, flat: Tensor) -> Tensor:
        return flat.unflatten(1, (self.in_channels, *self.kernel_size))

    def forward(self, x: Float[Tensor, "*batch channels height width"]) -> Float[Tensor, "*batch out h w"]:
        """Convolve `x`, `(..., in, height, width)`, in the dtype of `x`."""
        if not self.is_thin(
            x.shape[:-3].numel() * x.shape[-2:].numel() // (self.geometry["stride"][0] * self.geometry["stride"][1])
        ):
            return functional.conv2d(x, self._unflatten(self.flat_weight()).to(x.dtype), self.bias, **self.geometry)
        u, s, vh = (part.to(x.dtype) for part in (self.u, self.s, self._unflatten(self.vh)))
        y = functional.conv2d(functional.conv2d(x, vh, **self.geometry), s[:, :, None, None])
        return functional.conv2d(y, u[:, :, None, None], self.bias)

    def merge(self) -> nn.Conv2d:
        """Convert back to an `nn.Conv2d` with the same weight; it shares the bias parameter."""
        sizes = self.in_channels, self.out_channels, self.kernel_size
        layer = nn.Conv2d(*sizes, bias=False, device="meta", **self.geometry)  # pyright: ignore[reportArgumentType]
        return _fill_dense(layer, self, self._unflatten(self.dense()))

    def extra_repr(self) -> str:
        """Return the sizes, for `repr`."""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{sizes}, rank={self.rank}"


USV_LAYERS: dict[type[nn.Module], Any] = {nn.Linear: USVLinear, nn.Conv2d: USVConv2d}


def find_usv_class(module: nn.Module) -> Any:
    """Return the class that a linear layer or a convolution is converted to."""
    return next(usv_class for dense, usv_class in USV_LAYERS.items() if isinstance(module, dense))


def _widen(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def _fill(module: Any, layer: nn.Linear | nn.Conv2d, usv: USV) -> Any:
    """Give a new layer its matrices, and device, bias, mode and flags of the layer that it replaces."""
    module.to(layer.weight.device)
    module.set_usv(usv)
    module.bias, module.like = layer.bias, module.like.to(layer.weight.dtype)
    module.s.requires_grad_(layer.weight.requires_grad)
    return module.train(layer.training)


def _fill_dense(layer: Any, module: _Bases, weight: Tensor) -> Any:
    """Give a new dense layer its weight, and bias, mode and flags of the layer that it replaces."""
    weight = weight.to(module.s.device, module.like.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=module.s.requires_grad)
    layer.register_parameter("bias", module.bias)
    return layer.train(module.training)
