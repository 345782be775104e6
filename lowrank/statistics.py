"""Second moments of the inputs of linear layers, streamed over calibration data.

For a layer with inputs x (one per token) this keeps G = sum of x x^T, the number of tokens, and the means of x and |x|:
all that the closed forms need, in float64 and in memory that does not grow with the number of tokens. Layers that
receive the same tensor, as q, k and v do, share one matrix.

Blocks of tokens are multiplied in float32 and added into float64, which keeps G to about 1e-7 of its largest eigenvalue:
enough to compress with. What the error of a nearly low-rank layer will be is decided below that; multiply in float64
(`products`) to predict it, at about twice the cost. On the CPU the product goes through NumPy, which sees a symmetric one
and does half the work.
"""

import json
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank.batches import Batch, device_of, evaluating, logits, to_device, token_mask
from lowrank.fingerprint import hash_model
from lowrank.layers import BLOCKS, find_linears

BLOCK_TOKENS = 4096  # tokens per product: bounds its memory, and in float32 its rounding
TOKENS_PER_INPUT = 5  # fewer than this leave G poorly known, see notebook 01
FORMAT = "lowrank.statistics/1"


class FewTokensWarning(UserWarning):
    """There are too few calibration tokens for the number of inputs of a layer."""


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Moments of one layer's inputs over `tokens` tokens; `a + b` joins two disjoint parts of the data.

    `gram`: G = sum of x x^T, `(in, in)`, float64. `tokens`: N. `mean`, `abs_mean`: means of x and of |x|, `(in,)`, float64.
    `gradient_gram`: sum of g g^T with g the gradient of the loss at the layer's output, `(out, out)`, float64, where asked for.
    """

    gram: Float[Tensor, "n n"]
    tokens: int
    mean: Float[Tensor, " n"]
    abs_mean: Float[Tensor, " n"]
    gradient_gram: Float[Tensor, "m m"] | None = None

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        if self.gram.shape != other.gram.shape:
            raise ValueError(
                f"`other` must have moments of shape {tuple(self.gram.shape)}, got {tuple(other.gram.shape)}."
            )
        if (self.gradient_gram is None) != (other.gradient_gram is None):
            raise ValueError("`other` must hold gradient moments exactly where this one does.")
        tokens = self.tokens + other.tokens
        gradients = None
        if self.gradient_gram is not None and other.gradient_gram is not None:
            gradients = self.gradient_gram + other.gradient_gram
        return LayerStatistics(
            gram=self.gram + other.gram,
            tokens=tokens,
            mean=(self.mean * self.tokens + other.mean * other.tokens) / tokens,
            abs_mean=(self.abs_mean * self.tokens + other.abs_mean * other.tokens) / tokens,
            gradient_gram=gradients,
        )


def whitening_factor(statistics: LayerStatistics, shrinkage: float = 0.0) -> Float[Tensor, "n n"]:
    """A factor S of the second moment: S S^T = G/N + shrinkage * tr(G/N)/n * I.

    S = Q sqrt(lambda) from the eigenvalues of G/N in float64, with what rounding left below zero set to zero: no
    Cholesky factor that could fail, and no absolute constant, so S scales with the activations. S^-1 x is white.

    **Arguments:** `shrinkage`: >= 0, relative to the mean eigenvalue. A statistical choice (fewer tokens than about 5 per
    dimension), not a numerical need.

    **Returns:** `(n, n)`, float64, columns by ascending eigenvalue.

    **Reference:** Wang et al., SVD-LLM, ICLR 2025, arXiv:2403.07378, section 3.1, which uses a Cholesky factor.
    """
    values, vectors = second_moment_eigh(statistics, shrinkage)
    return vectors * values.sqrt()


def second_moment_eigh(
    statistics: LayerStatistics, shrinkage: float = 0.0
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Eigenvalues (ascending, clipped at 0) and eigenvectors of G/N + shrinkage * tr(G/N)/n * I, float64."""
    values, vectors = torch.linalg.eigh(shrunk(statistics, shrinkage).gram / statistics.tokens)
    return values.clamp_min(0.0), vectors


def shrunk(statistics: LayerStatistics, shrinkage: float) -> LayerStatistics:
    """The same statistics with G + shrinkage * tr(G)/n * I in the place of G.

    **Raises:** `ValueError`: `shrinkage` below 0, no tokens, or moments that are not finite.
    """
    if not shrinkage >= 0.0:
        raise ValueError(f"`shrinkage` must be >= 0, got {shrinkage}.")
    gram = checked_gram(statistics).clone()
    gram.diagonal().add_(shrinkage * gram.diagonal().mean())
    return replace(statistics, gram=gram)


def output_norm(weight: Float[Tensor, "m n"], statistics: LayerStatistics) -> float:
    """||W X||_F = sqrt(tr(W G W^T)), in float64: the norm of a layer's outputs, or of the error W - W' in them."""
    w = weight.detach().double()
    return torch.einsum("mn,mn->", w @ checked_gram(statistics).to(w.device), w).clamp_min(0.0).sqrt().item()


def statistics_of_rows(rows: Float[Tensor, "tokens n"]) -> LayerStatistics:
    """The statistics of given input vectors, multiplied in float64."""
    moments = _Moments(rows.shape[-1], rows.device, torch.float64)
    moments.add(rows)
    return moments.finish()


def checked_gram(statistics: LayerStatistics) -> Float[Tensor, "n n"]:
    """G in float64, once it is known to be usable.

    **Raises:** `ValueError`: no tokens, or moments that are not finite.
    """
    if statistics.tokens < 1:
        raise ValueError(f"`statistics` must count at least one token, got {statistics.tokens}.")
    if not bool(torch.isfinite(statistics.gram).all()):
        raise ValueError("`statistics.gram` must be finite, got NaN or infinity.")
    return statistics.gram.double()


class _Moments:
    """The running sums of one input, and of the output gradients of one layer."""

    def __init__(self, size: int, device: torch.device, products: torch.dtype) -> None:
        self.products = products
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.abs_sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, rows: Float[Tensor, "tokens n"]) -> None:
        for block in rows.detach().split(BLOCK_TOKENS):
            block = block.to(torch.promote_types(block.dtype, self.products))
            self.gram += _outer_sum(block).to(self.gram)
            self.sum += block.sum(0).to(self.sum)  # torch sums pairwise: rounding does not grow with the block
            self.abs_sum += block.abs().sum(0).to(self.sum)
        self.tokens += len(rows)

    def finish(self) -> LayerStatistics:
        return LayerStatistics(
            gram=(self.gram + self.gram.T) / 2,
            tokens=self.tokens,
            mean=self.sum / self.tokens,
            abs_mean=self.abs_sum / self.tokens,
        )


def _outer_sum(rows: Float[Tensor, "tokens n"]) -> Float[Tensor, "n n"]:
    """sum of x x^T over rows. NumPy sees that both factors are one matrix and calls syrk; torch multiplies in full."""
    if rows.device.type == "cpu":
        array = rows.numpy()
        with np.errstate(all="ignore"):  # what is not finite is looked for afterwards, and named
            return torch.from_numpy(array.T @ array)
    return rows.T @ rows


def token_rows(values: Float[Tensor, "*batch n"], mask: Tensor | None, layer: str) -> Float[Tensor, "tokens n"]:
    """The vectors of a layer's input or output that belong to tokens, padding left out.

    The mask applies where the leading dimensions are (batch, tokens), flattened or not. One vector per sample, as a
    pooler sees, has no padding.

    **Raises:** `ValueError`: there is padding, and the leading dimensions fit neither.
    """
    rows = values.reshape(-1, values.shape[-1])
    lead = tuple(values.shape[:-1])
    if mask is None or lead == (len(mask),) != (mask.numel(),) or bool(mask.all()):
        return rows
    if lead in (tuple(mask.shape), (mask.numel(),)):
        return rows[mask.reshape(-1)]
    raise ValueError(
        f"`batches` have padding (attention_mask {tuple(mask.shape)}) that does not fit layer {layer!r}, "
        f"whose values have shape {tuple(values.shape)}: leave the layer out, or pass batches without padding."
    )


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Float32 products in float32: neither TF32 nor an autocast that the caller may have on."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def watching(linears: Mapping[str, nn.Linear], visit: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `visit(name, input)` before each call of each layer."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        return lambda module, args, kwargs: visit(name, args[0] if args else kwargs["input"])

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Collector:
    """Feeds the inputs that hooks see into one `_Moments` per distinct input."""

    def __init__(self, linears: Mapping[str, nn.Linear], device: torch.device, products: torch.dtype) -> None:
        self.linears, self.device, self.products = linears, device, products
        self.moments: dict[str, _Moments] = {}
        self.gradients: dict[str, _Moments] = {}
        self.leader: dict[str, str] = {}  # layer -> the layer whose moments it shares, decided at its first call
        self.mask: Tensor | None = None
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}  # inputs that are alive now

    def see_input(self, name: str, value: Tensor) -> None:
        alive, version, first = self._seen.get(id(value), (lambda: None, -1, name))
        same = alive() is value and version == value._version
        leader = self.leader.setdefault(name, first if same else name)
        if leader != name:
            if not same or first != leader:
                raise ValueError(
                    f"`layers` {leader!r} and {name!r} had one input at first and now have two: "
                    "collect the statistics of such layers in separate calls."
                )
            return
        if name not in self.moments:
            self.moments[name] = _Moments(value.shape[-1], self.device, self.products)
        with exact_products(value.device):
            self.moments[name].add(token_rows(value, self.mask, name))
        if not same:
            self._seen[id(value)] = (weakref.ref(value), value._version, name)

    def see_gradient(self, name: str, gradient: Tensor) -> None:
        if name not in self.gradients:
            self.gradients[name] = _Moments(gradient.shape[-1], self.device, self.products)
        with exact_products(gradient.device):
            self.gradients[name].add(token_rows(gradient, self.mask, name))

    def end_batch(self) -> None:
        self._seen.clear()
        for what, moments in (("activations", self.moments), ("gradients", self.gradients)):
            for name, layer in moments.items():
                if not bool(torch.isfinite(layer.sum).all() & torch.isfinite(layer.gram.diagonal()).all()):
                    raise ValueError(f"`batches` must give finite {what}, got NaN or infinity in layer {name!r}.")


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Iterable[str] = BLOCKS,
    *,
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    device: torch.device | str | None = None,
    products: torch.dtype = torch.float32,
) -> dict[str, LayerStatistics]:
    """Moments of the inputs of linear layers over calibration data, in one pass and in evaluation mode.

    Under `torch.distributed` (`accelerate launch`) every process passes its own share of the batches, and every process
    returns the sums over all of them.

    **Arguments:** `model`: any module. `batches`: see `lowrank.batches`; padding named by `attention_mask` is left out.
    `layers`: names or patterns of `nn.Linear` modules, by default all inside numbered blocks. `loss`: `(model, batch) ->
    scalar`, the loss summed over the batch; given it, the moments of the output gradients are collected too. `device`:
    where the float64 sums live, by default where the model is (the CPU where that device has no float64). `products`:
    float32 or float64, the least precision in which blocks are multiplied; a float64 model always is in float64.

    **Returns:** name -> `LayerStatistics`. Layers that receive the same tensor share one `gram`.

    **Raises:** `ValueError`: unknown layers, no tokens, non-finite activations, or a layer that no batch reaches.
    **Warns:** `FewTokensWarning`: fewer than 5 tokens per input somewhere; it names the layer that is worst off.

    **Reference:** the moments are X X^T of Chen et al., DRONE, NeurIPS 2021, section 3.
    """
    linears = find_linears(model, layers)
    home = device_of(model)
    sums_on = torch.device(device) if device is not None else torch.device("cpu") if home.type == "mps" else home
    collector = _Collector(linears, sums_on, products)
    with evaluating(model), watching(linears, collector.see_input):
        for batch in batches:
            batch = to_device(batch, home)
            collector.mask = token_mask(batch)
            if loss is None:
                with torch.no_grad():
                    logits(model, batch)
            else:
                _run_backward(model, batch, loss, linears, collector.see_gradient)
            collector.end_batch()
    _sum_over_processes(collector, linears, with_gradients=loss is not None)
    return _finished(collector)


def _run_backward(
    model: nn.Module,
    batch: Batch,
    loss: Callable[[nn.Module, Batch], Tensor],
    linears: Mapping[str, nn.Linear],
    visit: Callable[[str, Tensor], None],
) -> None:
    """One forward and backward pass; `visit(name, gradient)` for every call of every layer, `.grad` untouched."""
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.requires_grad_()  # all weights may be frozen
            outputs.append((name, output))
            return output

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in linears.items()]
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(model, batch), [output for _, output in outputs])
    finally:
        for handle in handles:
            handle.remove()
    for (name, _), gradient in zip(outputs, gradients, strict=True):
        visit(name, gradient)


def _sum_over_processes(collector: _Collector, linears: Mapping[str, nn.Linear], with_gradients: bool) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    maps: list[dict[str, str]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(maps, collector.leader)
    leaders = next((found for found in maps if found), {})
    if any(found and found != leaders for found in maps):
        raise ValueError("`batches` must reach the same layers in every process.")
    collector.leader = leaders  # a process without batches has seen none
    for name in dict.fromkeys(leaders.values()):
        layer = collector.moments.setdefault(
            name, _Moments(linears[name].in_features, collector.device, collector.products)
        )
        _all_reduce(layer)
    for name in leaders if with_gradients else ():
        layer = collector.gradients.setdefault(
            name, _Moments(linears[name].out_features, collector.device, collector.products)
        )
        _all_reduce(layer)


def _all_reduce(moments: _Moments) -> None:
    tokens = torch.tensor(moments.tokens, device=moments.gram.device)
    for tensor in (moments.gram, moments.sum, moments.abs_sum, tokens):
        torch.distributed.all_reduce(tensor)
    moments.tokens = int(tokens)


def _finished(collector: _Collector) -> dict[str, LayerStatistics]:
    missing = [name for name in collector.linears if name not in collector.leader]
    if missing:
        raise ValueError(f"`batches` must reach every layer, got no calibration token for {missing[0]!r}.")
    if empty := next((name for name, sums in collector.moments.items() if sums.tokens == 0), None):
        raise ValueError(f"`batches` must hold at least one unmasked token, got none for layer {empty!r}.")
    name, sums = min(collector.moments.items(), key=lambda item: item[1].tokens / len(item[1].gram))
    if sums.tokens < TOKENS_PER_INPUT * len(sums.gram):
        warnings.warn(
            f"layer {name!r} has {sums.tokens} calibration tokens for {len(sums.gram)} inputs: pass more batches (at least "
            f"{TOKENS_PER_INPUT} tokens per input), or shrink the moments (`shrunk`, `whitening_factor(..., shrinkage=...)`).",
            FewTokensWarning,
            stacklevel=3,
        )
    shared = {name: sums.finish() for name, sums in collector.moments.items()}
    gradients = {name: sums.finish().gram for name, sums in collector.gradients.items()}
    return {
        name: replace(shared[collector.leader[name]], gradient_gram=gradients.get(name)) for name in collector.linears
    }


def visit_inputs(
    model: nn.Module, batches: Iterable[Batch], layers: Iterable[str], visit: Callable[[str, Tensor], None]
) -> None:
    """Calls `visit(name, rows)` with the input of each layer in each batch, `(tokens, in)`, padding left out."""
    linears = find_linears(model, layers)
    mask: Tensor | None = None
    with evaluating(model), watching(linears, lambda name, value: visit(name, token_rows(value, mask, name))):
        for batch in batches:
            batch = to_device(batch, device_of(model))
            mask = token_mask(batch)
            with torch.no_grad():
                logits(model, batch)


def collect_inputs(
    model: nn.Module, batches: Iterable[Batch], layers: Iterable[str], tokens: int
) -> dict[str, Float[Tensor, "tokens n"]]:
    """The first `tokens` input vectors of each layer, for studies that need them and not their moments.

    **Returns:** name -> `(tokens, in)` in the dtype of the activations, on the CPU.

    **Raises:** `ValueError`: the batches hold fewer tokens.
    """
    rows: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}

    def keep(name: str, values: Tensor) -> None:
        wanted = tokens - counts.get(name, 0)
        if wanted > 0:
            rows.setdefault(name, []).append(values[:wanted].detach().cpu().clone())
            counts[name] = counts.get(name, 0) + min(wanted, len(values))

    layers = list(find_linears(model, layers))
    for batch in batches:
        visit_inputs(model, [batch], layers, keep)
        if counts and min(counts.values()) >= tokens:
            break
    if not counts or min(counts.values()) < tokens:
        raise ValueError(f"`batches` must hold at least {tokens} tokens, got {min(counts.values(), default=0)}.")
    return {name: torch.cat(parts) for name, parts in rows.items()}


def save_statistics(path: Path | str, statistics: Mapping[str, LayerStatistics], model: nn.Module, data: str) -> None:
    """Writes statistics to one safetensors file, under the hash of the model they were made for.

    Shared moments are written once. The file appears whole or not at all.

    **Arguments:** `data`: says which data they come from; `load_statistics` compares it.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, object]] = {}
    stored: dict[int, str] = {}
    for name, layer in statistics.items():
        leader = stored.setdefault(layer.gram.data_ptr(), name)
        layers[name] = {"leader": leader, "tokens": layer.tokens}
        if leader == name:
            tensors |= {f"{name}/{field}": getattr(layer, field) for field in ("gram", "mean", "abs_mean")}
        if layer.gradient_gram is not None:
            tensors[f"{name}/gradient_gram"] = layer.gradient_gram
    about = {"format": FORMAT, "model": hash_model(model), "data": data, "layers": json.dumps(layers)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, partial, metadata=about)
    partial.replace(path)


def load_statistics(path: Path | str, model: nn.Module, data: str | None = None) -> dict[str, LayerStatistics]:
    """Reads statistics back, on the CPU, for the model they were made for.

    **Raises:** `ValueError`: the file is damaged or not of this format, was made for other weights or, where `data` is
    given, from other data, or names a layer that the model does not have. `FileNotFoundError`: no such file.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"`path` must be a file written by save_statistics, and {str(path)!r} does not exist.")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"`path` must be a whole safetensors file, got {str(path)!r}: {error}.") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"`path` must have format {FORMAT!r}, got {about.get('format')!r} in {str(path)!r}.")
    if about["model"] != hash_model(model):
        raise ValueError(
            f"`model` must be the one of {str(path)!r} (weights {about['model']}), got {hash_model(model)}."
        )
    if data is not None and about["data"] != data:
        raise ValueError(f"`data` must be that of {str(path)!r} ({about['data']!r}), got {data!r}.")
    layers = json.loads(about["layers"])
    linears = find_linears(model, layers)
    done: dict[str, LayerStatistics] = {}
    for name, layer in layers.items():
        leader = layer["leader"]
        gram, mean, abs_mean = (tensors[f"{leader}/{field}"] for field in ("gram", "mean", "abs_mean"))
        if len(gram) != linears[name].in_features:
            raise ValueError(f"`model` must have {len(gram)} inputs at {name!r}, got {linears[name].in_features}.")
        done[name] = LayerStatistics(gram, layer["tokens"], mean, abs_mean, tensors.get(f"{name}/gradient_gram"))
    return done
