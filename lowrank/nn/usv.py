"""Layers whose weight is U S V^T with fixed orthonormal bases U, V and a small trained matrix S."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lowrank.nn.targets import chosen, shared_weights

THINNEST = 10  # a weight whose sides differ by more than this factor has little to give


class USV(NamedTuple):
    """`u` `(m, r)` and `vh` `(r, n)`, orthonormal columns and rows; `s` `(r, r)`."""

    u: Tensor
    s: Tensor
    vh: Tensor


class _Bases(nn.Module):
    """What both layers share: the buffers `u`, `vh`, the parameter `s`, a bias, and W = U S V^T of the flattened weight."""

    u: Tensor
    vh: Tensor
    bias: nn.Parameter | None

    def __init__(self, out: int, inputs: int, rank: int, bias: bool, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.register_buffer("u", torch.eye(out, rank, dtype=dtype))
        self.register_buffer("vh", torch.eye(rank, inputs, dtype=dtype))
        self.s = nn.Parameter(torch.zeros(rank, rank, dtype=dtype))  # declared before the bias, as a weight is
        self.register_parameter("bias", nn.Parameter(torch.zeros(out, dtype=dtype)) if bias else None)
        self.dense_dtype = self.s.dtype  # of the weight that this one stands for

    @property
    def rank(self) -> int:
        return len(self.s)

    @property
    def usv(self) -> USV:
        """The three matrices in float64, apart from the graph."""
        return USV(self.u.double(), self.s.detach().double(), self.vh.double())

    @torch.no_grad()
    def set_usv(self, usv: USV) -> nn.Parameter:
        """Takes other matrices over: into the same tensors where the rank is the same. Returns the parameter that is trained."""
        if len(usv.s) == self.rank:
            self.u.copy_(usv.u)
            self.vh.copy_(usv.vh)
            self.s.copy_(usv.s)
        else:
            self.u, self.vh = usv.u.to(self.u).contiguous(), usv.vh.to(self.vh).contiguous()
            self.s = nn.Parameter(usv.s.to(self.s).contiguous(), requires_grad=self.s.requires_grad)
        return self.s

    def thin(self, tokens: int) -> bool:
        """Whether three products with `tokens` vectors cost less than to multiply the weight out and use it."""
        (m, r), n = self.u.shape, self.vh.shape[1]
        return tokens * r * (m + r + n) < tokens * m * n + r * m * (r + n)

    def flat_weight(self) -> Float[Tensor, "out flat"]:
        """U S V^T, multiplied anew at each call; gradients reach S."""
        return self.u @ self.s @ self.vh

    def dense(self) -> Float[Tensor, "out flat"]:
        """U S V^T in float64, apart from the graph."""
        u, s, vh = self.usv
        return u @ s @ vh


class USVLinear(_Bases):
    """y = U (S (V^T x)) + b with S, `s`, `(rank, rank)`, trained; `u` `(out, rank)` and `vh` `(rank, in)` are buffers.

    Three thin products where they cost less, otherwise one product with U S V^T multiplied out: low rank saves compute, full rank
    does not cost more than it must. The matrices are kept in at least float32, where bases stay orthonormal.

    **Reference:** Coquelin et al., arXiv:2401.08505, section 4 (which multiplies the whole weight out in every pass).
    """

    storage = "usv"

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(out_features, in_features, rank, bias, dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_dense(cls, layer: nn.Linear, usv: USV) -> "USVLinear":
        """The layer with given matrices and the very bias of a linear layer."""
        made = cls(layer.in_features, layer.out_features, len(usv.s), layer.bias is not None, _wide(layer.weight))
        return _taken(made, layer, usv)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """U S V^T, multiplied anew at each access."""
        return self.flat_weight()

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if not self.thin(x.shape[:-1].numel()):
            return functional.linear(x, self.flat_weight().to(x.dtype), self.bias)
        u, s, vh = (part.to(x.dtype) for part in (self.u, self.s, self.vh))
        return functional.linear(functional.linear(functional.linear(x, vh), s), u, self.bias)

    def merged(self) -> nn.Linear:
        """A plain linear layer with the same weight and the very bias."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        return _merged(layer, self, self.dense())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class USVConv2d(_Bases):
    """A convolution of U S V^T: k x k from the inputs to `rank` channels with V^T, 1 x 1 with S, 1 x 1 with U; one group, zeros
    around the image. `u` `(out, rank)`, `s` `(rank, rank)`, `vh` `(rank, in * kh * kw)`."""

    def __init__(self, layer: nn.Conv2d, rank: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(
            layer.out_channels, layer.weight[0].numel(), rank, layer.bias is not None, dtype or _wide(layer.weight)
        )
        self.in_channels, self.out_channels, self.kernel_size = layer.in_channels, layer.out_channels, layer.kernel_size
        self.moves: dict[str, Any] = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation)

    @classmethod
    def from_dense(cls, layer: nn.Conv2d, usv: USV) -> "USVConv2d":
        """The layer with given matrices and the very bias of a convolution."""
        return _taken(cls(layer, len(usv.s)), layer, usv)

    @property
    def weight(self) -> Float[Tensor, "out in kh kw"]:
        """U S V^T as a kernel, multiplied anew at each access."""
        return self._kernel(self.flat_weight())

    def _kernel(self, flat: Tensor) -> Tensor:
        return flat.unflatten(1, (self.in_channels, *self.kernel_size))

    def forward(self, x: Float[Tensor, "*batch channels height width"]) -> Float[Tensor, "*batch out h w"]:
        if not self.thin(
            x.shape[:-3].numel() * x.shape[-2:].numel() // (self.moves["stride"][0] * self.moves["stride"][1])
        ):
            return functional.conv2d(x, self.weight.to(x.dtype), self.bias, **self.moves)
        u, s, vh = (part.to(x.dtype) for part in (self.u, self.s, self._kernel(self.vh)))
        y = functional.conv2d(functional.conv2d(x, vh, **self.moves), s[:, :, None, None])
        return functional.conv2d(y, u[:, :, None, None], self.bias)

    def merged(self) -> nn.Conv2d:
        """A plain convolution with the same weight and the very bias."""
        sizes = self.in_channels, self.out_channels, self.kernel_size
        layer = nn.Conv2d(*sizes, bias=False, device="meta", **self.moves)  # pyright: ignore[reportArgumentType]
        return _merged(layer, self, self._kernel(self.dense()))

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{sizes}, rank={self.rank}"


def _wide(weight: Tensor) -> torch.dtype:
    """bf16 bases are orthonormal to 3 % only."""
    return torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def _taken(made: Any, layer: nn.Linear | nn.Conv2d, usv: USV) -> Any:
    made.to(layer.weight.device)
    made.set_usv(usv)
    made.bias, made.dense_dtype = layer.bias, layer.weight.dtype
    made.s.requires_grad_(layer.weight.requires_grad)
    return made.train(layer.training)


def _merged(layer: Any, own: _Bases, weight: Tensor) -> Any:
    layer.weight = nn.Parameter(weight.to(own.dense_dtype), requires_grad=own.s.requires_grad)
    layer.register_parameter("bias", own.bias)
    return layer.train(own.training)


KINDS: dict[type[nn.Module], Any] = {nn.Linear: USVLinear, nn.Conv2d: USVConv2d}


def usv_kind(module: nn.Module) -> Any:
    """The class that a layer is converted to."""
    return next(made for kind, made in KINDS.items() if isinstance(module, kind))


def convertible(
    model: nn.Module, include: Iterable[str], exclude: Iterable[str]
) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """Shapes of the weights that can be converted; and why others that were asked for cannot.

    **Raises:** `ValueError`: as `lowrank.nn.targets.chosen`; none can be.
    """
    modules: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, tuple(KINDS))}
    names = chosen(modules, include, exclude)
    shared = shared_weights(model, {name: modules[name] for name in names})
    packed = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    layers, skipped = {}, {}
    for name in names:
        module = modules[name]
        sides = module.weight.flatten(1).shape
        reasons = {
            "its weight is shared": name in shared,
            "its weight is frozen": not module.weight.requires_grad,
            "nn.MultiheadAttention reads its weight itself": name.rpartition(".")[0] in packed,
            "its groups or padding have no such form": getattr(module, "groups", 1) != 1
            or getattr(module, "padding_mode", "zeros") != "zeros",
            f"its sides, {tuple(sides)}, differ by more than {THINNEST} times": min(sides) * THINNEST < max(sides),
        }
        if reason := next((text for text, holds in reasons.items() if holds), None):
            skipped[name] = reason
        else:
            layers[name] = module.weight.shape
    if not layers:
        some = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3]) or "none is named"
        raise ValueError(f"`model` must have a layer that can be converted, got none ({some}).")
    return layers, skipped
