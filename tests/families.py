"""Tiny models of the families that the library serves, with batches and statistics."""

import copy
import functools
from collections.abc import Callable, Mapping

import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lowrank.calibration.collect import collect_statistics
from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import replace_layers
from lowrank.factorization.moments import LayerStatistics
from lowrank.factorization.rank_allocation import rank_for_keep
from lowrank.nn.batches import Batch, as_double, compute_logits
from lowrank.nn.surgery import unify_linears
from lowrank.nn.targets import BLOCKS, find_linears

VOCABULARY = 60
LAYERS = (rf"{BLOCKS[0]}|\d+",)  # those in numbered blocks, and the numbered layers of a plain sequence


def bert() -> nn.Module:
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
    )
    return BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=16, num_labels=3))


def llama() -> nn.Module:
    """Grouped queries, tied embeddings, no biases."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, intermediate_size=40)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=32))


def opt() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=2)
    return OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=24))


def gpt2() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    unify_linears(model)
    return model


def t5() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, d_model=24, d_kv=12, d_ff=40, num_layers=2, num_heads=2)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def vit() -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3)


def created_vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=3)


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 16), nn.Linear(16, 16)
    )


def texts(generator: torch.Generator) -> Batch:
    return {"input_ids": torch.randint(1, VOCABULARY, (12, 10), generator=generator)}


def padded_texts(generator: torch.Generator) -> Batch:
    lengths = torch.randint(4, 11, (12, 1), generator=generator)
    return {**texts(generator), "attention_mask": (torch.arange(10) < lengths).long()}


def pairs_of_texts(generator: torch.Generator) -> Batch:
    return {**texts(generator), "decoder_input_ids": torch.randint(1, VOCABULARY, (12, 8), generator=generator)}


def images(size: int, count: int) -> Callable[[torch.Generator], Batch]:
    return lambda generator: torch.randn(count, 3, size, size, generator=generator)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Batch]]] = {
    "bert": (bert, padded_texts),
    "llama": (llama, texts),
    "opt": (opt, padded_texts),
    "gpt2": (gpt2, texts),
    "t5": (t5, pairs_of_texts),
    "vit": (vit, images(16, 6)),
    "created vit": (created_vit, images(160, 2)),
    "plain": (plain, lambda generator: torch.randn(64, 12, generator=generator)),
}
SMALL = [family for family in FAMILIES if family != "created vit"]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return compute_logits(model, batch).logsumexp(-1).sum()


@functools.cache
def _made(family: str, dtype: torch.dtype) -> tuple[nn.Module, list[Batch], dict[str, LayerStatistics]]:
    build, sample = FAMILIES[family]
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # weights that matter, biases and norms that are not trivial
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    batches = [sample(generator) for _ in range(2)]
    if dtype == torch.float64:
        model, batches = model.double(), [as_double(batch) for batch in batches]
    return model, batches, collect_statistics(model, batches, LAYERS, loss=loss)


def made(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Batch], dict[str, LayerStatistics]]:
    """A new model of a family, in evaluation mode, its calibration data and their statistics, with gradients."""
    model, batches, statistics = _made(family, dtype)
    return copy.deepcopy(model), batches, dict(statistics)


def ranks_of(model: nn.Module, keep: float = 0.6, storage: str = "factors") -> dict[str, int]:
    shapes = {name: tuple(layer.weight.shape) for name, layer in find_linears(model, LAYERS).items()}
    return {name: rank_for_keep(shape, keep, storage) for name, shape in shapes.items()}


def compressed(family: str, storage: str = "factors", method: str = "whitened") -> tuple[nn.Module, list[Batch]]:
    model, batches, statistics = made(family)
    replace_layers(model, ranks_of(model, storage=storage), Configuration(method, storage), statistics)
    return model, batches


@torch.no_grad()
def outputs(model: nn.Module, batches: list[Batch]) -> Tensor:
    return torch.cat([compute_logits(model, batch) for batch in batches])


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def difference(model: nn.Module, other: nn.Module, batches: list[Batch]) -> float:
    """How far the outputs of a model are from those of another, wherever both are."""
    found, expected = (outputs(copy.deepcopy(each).cpu(), batches) for each in (model, other))
    return relative(found, expected)


def weights_below(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Stored elements of one layer, its bias left out: of floating tensors, and of indices."""
    own = {key: t for key, t in tensors.items() if key.startswith(f"{name}.") and not key.endswith("bias")}
    floating = sum(t.numel() for t in own.values() if t.is_floating_point())
    return floating, sum(t.numel() for t in own.values()) - floating
