"""What `make bench` and `make gpu` both measure; it needs torch, transformers and timm, and neither pytest nor pandas."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowrank.factorization.factorize import Factors
from lowrank.factorization.rank_allocation import rank_for_keep
from lowrank.factorization.storages import STORAGES
from lowrank.nn.batches import device_of, eval_mode, move_batch
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.nn.profiling import count_flops, time_in_turns
from lowrank.nn.targets import find_linears
from lowrank.nn.usv import USV, USVLinear
from lowrank.pi3.flops import pi3_macs
from lowrank.pi3.model import Pi3, Pi3Config
from lowrank.pi3.speed import TARGETS, compare_speed, published_ranks, random_pi3
from lowrank.training.oialr import OIALR

LAYERS = ("layer", "tokens", "dtype", "keep", "storage", "multiple", "rank", "speedup", "flop_ratio", "share")
PI3 = ("views", "height", "width", "precision", "model", "forward_ms", "spread_ms", "frames_per_s", "speed_up")
PI3 = (*PI3, "ceiling", "share_of_ceiling", "weights_mb", "peak_mb")
KEEP = 0.2  # of the layers of π³ that are compressed


def bert(hidden: int, layers: int) -> nn.Module:
    import transformers  # noqa: PLC0415

    config = transformers.BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, intermediate_size=4 * hidden
    )
    return transformers.BertModel(config)


def llama(
    hidden: int,
    layers: int,
    vocabulary: int = 8000,
    intermediate: int | None = None,
    kv_heads: int | None = None,
    width: int = 64,
) -> nn.Module:
    """A Llama of random weights; `width` is that of a head."""
    import transformers  # noqa: PLC0415

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // width,
        num_key_value_heads=kv_heads or hidden // (4 * width),
        intermediate_size=intermediate or 11 * hidden // 4,
        vocab_size=vocabulary,
    )
    return transformers.LlamaForCausalLM(config)


def svd_llm_moments(model: nn.Module, layers: Iterable[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """SVD-LLM's code: a float32 Gram for every layer, added up in hooks."""
    linears = find_linears(model, layers)
    grams = {
        name: torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
        for name, layer in linears.items()
    }

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].flatten(0, -2).float()
            grams[name] += x.T @ x

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in linears.items()]
    forward(model, batches)
    for handle in handles:
        handle.remove()
    return grams


def svd_llm_factors(model: nn.Module, ranks: dict[str, int], grams: dict[str, Tensor]) -> None:
    """SVD-LLM's code: Cholesky of the Gram in float64, on failure an absolute ridge; explicit inverse; full SVD of W S in
    float32; two factors with the root of the singular values on each."""
    for name, layer in find_linears(model, ranks).items():
        gram = grams[name].double()
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            smallest = torch.linalg.eigvalsh(gram)[0]
            ridge = (smallest.abs() + 1e-6) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            factor = torch.linalg.cholesky(gram + ridge)
        inverse = torch.linalg.inv(factor).float()
        weight, rank = layer.weight.detach(), ranks[name]
        u, sigma, vt = torch.linalg.svd(weight.float() @ factor.float(), full_matrices=False)
        root = sigma[:rank].sqrt()
        right = nn.Linear(layer.in_features, rank, bias=False, device="meta")
        left = nn.Linear(rank, layer.out_features, bias=False, device="meta")
        right.weight = nn.Parameter(((root[:, None] * vt[:rank]) @ inverse).to(weight.dtype))
        left.weight, left.bias = nn.Parameter((u[:, :rank] * root).to(weight.dtype)), layer.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, nn.Sequential(right, left))


def forward(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    with eval_mode(model), torch.no_grad():
        for batch in batches:
            model(**move_batch(batch, device_of(model)))


def layer_rows(
    shape: tuple[int, int],
    keep: float,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    multiples: Sequence[int] = (1, 8, 64),
) -> Iterator[dict[str, Any]]:
    """Time layers of each storage and some multiples of ranks against the dense one; a row each, with the names of `LAYERS`."""
    out, inputs = shape
    x = torch.randn(tokens, inputs).to(device, dtype)
    layers: dict[str, nn.Module] = {}
    settings: dict[str, tuple[str, int, int]] = {}
    for storage in STORAGES:
        for multiple in multiples:
            rank = rank_for_keep(shape, keep, storage, multiple)
            left, right = torch.randn(out, rank), torch.randn(rank, inputs)
            factors = Factors(left.to(device), right.to(device), torch.zeros(min(shape)))
            made = FACTORED_LAYERS[storage].from_factors(factors, torch.zeros(out).to(device, dtype), dtype)
            key = f"{storage} {multiple}"
            layers[key], settings[key] = made.to(device), (storage, multiple, rank)
    layers["dense"] = nn.Linear(inputs, out, bias=True).to(device, dtype)
    with torch.no_grad():
        calls = {key: (lambda layer=layer: layer(x)) for key, layer in layers.items()}
        seconds = time_in_turns(calls, repeats=7, warmup=2, device=device)
        flops = {key: count_flops(call) for key, call in calls.items()}
    dense, most = median(seconds["dense"]), flops["dense"]
    for key, setting in settings.items():
        speedup, ceiling = dense / median(seconds[key]), most / flops[key]
        about = f"{out}x{inputs}", tokens, str(dtype).removeprefix("torch.")
        yield dict(zip(LAYERS, (*about, keep, *setting, speedup, ceiling, speedup / ceiling), strict=True))


def pi3_rows(
    config: Pi3Config, size: tuple[int, int, int], precision: str, device: torch.device | str, repeats: int = 10
) -> Iterator[dict[str, Any]]:
    """Time π³ of random weights, dense and with more and more of it at `KEEP`; `size` is (views, height, width)."""
    views, height, width = size
    with torch.device("meta"):
        architecture = Pi3(config)
    plans = {"original": {}} | {targets: published_ranks(architecture, targets, KEEP) for targets in TARGETS}
    made = {name: random_pi3(config, ranks, device) for name, ranks in plans.items()}
    macs = {name: sum(pi3_macs(config, *size, saved=saved).values()) for name, (_, saved) in made.items()}
    models = {name: model for name, (model, _) in made.items()}
    for found in compare_speed(models, (1, views, 3, height, width), precision, repeats=repeats, warmup=1):
        ceiling = macs["original"] / macs[found["model"]]
        measured = [found[name] for name in PI3[4:9]]
        rest = ceiling, found["speed_up"] / ceiling, found["weights_mb"], found["peak_mb"]
        yield dict(zip(PI3, (*size, precision, *measured, *rest), strict=True))


def vit(**sizes: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    return VisionTransformer(num_classes=10, **sizes)


class Rebuilt(nn.Module):
    """A layer that multiplies its weight out in every pass."""

    def __init__(self, layer: USVLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.flat_weight(), self.layer.bias)


def truncated(model: nn.Module, ratio: float, rebuild: bool) -> nn.Module:
    """Bases of a share of the full rank in all blocks; their values do not matter to the time."""
    own = copy.deepcopy(model)
    for name, shape in OIALR(own).layers.items():
        rank = round(ratio * min(shape))
        sizes: Sequence[tuple[int, int]] = ((shape[0], rank), (rank, rank), (rank, shape[1]))
        parent, _, key = name.rpartition(".")
        linear: Any = own.get_submodule(name)
        layer = USVLinear.from_dense(linear, USV(*(0.03 * torch.randn(size) for size in sizes)))
        setattr(own.get_submodule(parent), key, Rebuilt(layer) if rebuild else layer)
    return own


def training_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A step (forward, backward, clipping, AdamW) on one batch, and its optimiser."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, optimizer
