"""Tiny models of the families that the library serves, with batches and statistics."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import timm
import torch
import transformers as hf
from timm.models import VisionTransformer
from torch import Tensor, nn

from lowrank.calibration.collect import collect_statistics
from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import replace_layers
from lowrank.factorization.moments import LayerStatistics
from lowrank.factorization.rank_allocation import rank_for_keep
from lowrank.nn.batches import Batch, as_double, compute_logits, drop_padding, run_model, select_output
from lowrank.nn.nests import change_tensors
from lowrank.nn.surgery import unify_linears
from lowrank.nn.targets import BLOCKS, find_linears

VOCABULARY, WIDTH, INNER, TOKENS = 60, 24, 40, 10
LAYERS = (rf"{BLOCKS[0]}|\d+",)  # those in numbered blocks, and the numbered layers of a plain sequence
HEADS: dict[str, Any] = dict(num_hidden_layers=2, num_attention_heads=2)
TEXT: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER) | HEADS
GROUPED: dict[str, Any] = TEXT | dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
SEQUENCES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    d_model=WIDTH,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=INNER,
    decoder_ffn_dim=INNER,
)
VISION: dict[str, Any] = dict(hidden_size=WIDTH, intermediate_size=INNER, image_size=16, patch_size=4) | HEADS
ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)

Build = Callable[..., nn.Module]  # arguments are options that change the model
Sample = Callable[[torch.Generator], Batch]


class Family(NamedTuple):
    """How to build a model, and a batch for it."""

    build: Build
    sample: Sample


# --- models: of transformers, of timm, and one of neither ---------------------------------------------------------------


def hugging(name: str, config: str, **sizes: Any) -> Build:
    """A builder of a model of transformers with random weights, as its library builds it."""

    def build(**changes: Any) -> nn.Module:
        return getattr(hf, name)(getattr(hf, config)(**sizes | changes))

    return build


bert = hugging("BertForSequenceClassification", "BertConfig", **TEXT, max_position_embeddings=16, num_labels=3)
# Grouped queries, tied embeddings, no biases.
llama = hugging("LlamaForCausalLM", "LlamaConfig", **GROUPED, tie_word_embeddings=True)
t5_sizes = dict(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=12, d_ff=INNER, num_layers=2, num_heads=2)
t5 = hugging("T5ForConditionalGeneration", "T5Config", **t5_sizes, decoder_start_token_id=0)
opt_sizes = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=INNER, word_embed_proj_dim=WIDTH) | HEADS
opt = hugging("OPTForCausalLM", "OPTConfig", **opt_sizes, max_position_embeddings=32)
gpt2_sizes = dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32)
conv1d_gpt2 = hugging("GPT2LMHeadModel", "GPT2Config", **gpt2_sizes, bos_token_id=0, eos_token_id=0)
bart = hugging(
    "BartForConditionalGeneration",
    "BartConfig",
    **SEQUENCES | ENDS,
    max_position_embeddings=16,
    decoder_start_token_id=2,
)
gemma3 = hugging("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED | ENDS, head_dim=6, sliding_window=4)
experts = dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")  # the default has no float64
mixtral = hugging("MixtralForCausalLM", "MixtralConfig", **GROUPED, **experts)
CAPTIONS = TEXT | ENDS | dict(max_position_embeddings=16)
clip = hugging("CLIPModel", "CLIPConfig", text_config=CAPTIONS, vision_config=VISION, projection_dim=16)
whisper = hugging(
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    **SEQUENCES | ENDS,
    num_mel_bins=8,
    max_source_positions=16,
    max_target_positions=16,
    decoder_start_token_id=1,
)
hugging_vit = hugging("ViTForImageClassification", "ViTConfig", **VISION, num_labels=3)


def gpt2() -> nn.Module:
    model = conv1d_gpt2()
    unify_linears(model)
    return model


def created(name: str, **options: Any) -> Build:
    """A builder of a model of timm with random weights."""
    return lambda **changes: timm.create_model(name, num_classes=3, **options | changes)


beit = created("beit_base_patch16_224", img_size=32, embed_dim=WIDTH, depth=2, num_heads=2)
swin = created(
    "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 4)
)
convnext = created("convnext_tiny", depths=(1, 1, 1, 1), dims=(16, 16, 24, 24))


def vit() -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=3)


def mixer(**changes: Any) -> nn.Module:
    sizes: dict[str, Any] = dict(img_size=16, patch_size=4, num_blocks=2, embed_dim=WIDTH)
    return timm.models.MlpMixer(num_classes=3, **sizes | changes)


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 16), nn.Linear(16, 16)
    )


# --- batches ------------------------------------------------------------------------------------------------------------


def texts(generator: torch.Generator, samples: int = 12, tokens: int = TOKENS) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, VOCABULARY, (samples, tokens), generator=generator)}


def padded_texts(generator: torch.Generator, samples: int = 12) -> dict[str, Tensor]:
    """Texts of many lengths, padded on the right; the mask is 1 where there is a token."""
    lengths = torch.randint(4, TOKENS + 1, (samples, 1), generator=generator)
    return {**texts(generator, samples), "attention_mask": (torch.arange(TOKENS) < lengths).long()}


def targets(generator: torch.Generator, samples: int = 12) -> dict[str, Tensor]:
    return {f"decoder_{key}": value for key, value in texts(generator, samples, 8).items()}


def pairs_of_texts(generator: torch.Generator) -> Batch:
    return {**texts(generator), **targets(generator)}


def padded_targets(generator: torch.Generator, samples: int = 12) -> dict[str, Tensor]:
    lengths = torch.randint(3, 9, (samples, 1), generator=generator)
    return {**targets(generator, samples), "decoder_attention_mask": (torch.arange(8) < lengths).long()}


def padded_pairs(generator: torch.Generator) -> Batch:
    return {**padded_texts(generator), **padded_targets(generator)}


def images(size: int, count: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(count, 3, size, size, generator=generator)


def pixels(generator: torch.Generator) -> Batch:
    return {"pixel_values": images(16, 6)(generator)}


def images_and_texts(generator: torch.Generator) -> Batch:
    found = padded_texts(generator, 6)  # the largest number ends a text: none is on padding
    return {
        "pixel_values": images(16, 6)(generator),
        **found,
        "input_ids": found["input_ids"] * found["attention_mask"],
    }


def sounds_and_texts(generator: torch.Generator) -> Batch:
    return {"input_features": torch.randn(6, 8, 32, generator=generator), **padded_targets(generator, 6)}


# Those of docs/families.md, under its names: nothing is converted or prepared for us.
ZOO: Mapping[str, Family] = {
    "BERT": Family(bert, padded_texts),
    "BART": Family(bart, padded_pairs),
    "T5": Family(t5, padded_pairs),
    "Llama": Family(llama, padded_texts),
    "Gemma 3": Family(gemma3, padded_texts),
    "Mixtral": Family(mixtral, padded_texts),
    "GPT-2": Family(conv1d_gpt2, padded_texts),
    "OPT": Family(opt, padded_texts),
    "CLIP": Family(clip, images_and_texts),
    "Whisper": Family(whisper, sounds_and_texts),
    "ViT": Family(hugging_vit, pixels),
    "BEiT": Family(beit, images(32, 6)),
    "Swin": Family(swin, images(32, 6)),
    "ConvNeXt": Family(convnext, images(32, 6)),
    "MLP-Mixer": Family(mixer, images(16, 6)),
}
FIRST_STEP: Mapping[str, Callable[[nn.Module], Any]] = {"GPT-2": unify_linears}  # named by the error of `compress`
NOT_DESCRIBED = ("MLP-Mixer",)  # built from its class: a folder cannot say how
OF_TIMM = ("BEiT", "Swin", "ConvNeXt", "MLP-Mixer")
# Layers of the zoo that can be replaced: BEiT multiplies by the weight of `qkv`, and never calls the layer.
REPLACED: Mapping[str, tuple[str, ...]] = dict.fromkeys(ZOO, BLOCKS) | {
    "BEiT": (r"blocks\.\d+\.(attn\.proj|mlp\.fc\d)",)
}
# Those on which every option is tried: each stands for several of the others.
FAMILIES: Mapping[str, Family] = {
    "bert": ZOO["BERT"],
    "llama": Family(llama, texts),
    "opt": ZOO["OPT"],
    "gpt2": Family(gpt2, texts),
    "t5": Family(t5, pairs_of_texts),
    "vit": Family(vit, images(16, 6)),
    "created vit": Family(created("test_vit", img_size=64, embed_dim=32, depth=2), images(64, 6)),
    "plain": Family(plain, lambda generator: torch.randn(64, 12, generator=generator)),
}
SMALL = [family for family in FAMILIES if family != "created vit"]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return compute_logits(model, batch).logsumexp(-1).sum()


def _fill(build: Build, sample: Sample, dtype: torch.dtype, scale: float) -> tuple[Any, list[Batch]]:
    """A model whose biases and norms are not trivial, and two batches."""
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    batches = [sample(generator) for _ in range(2)]
    if dtype == torch.float64:
        return model.double(), [as_double(batch) for batch in batches]
    return model, batches


def new_of_zoo(family: str, **changes: Any) -> nn.Module:
    """A model of the zoo after its first step, with options, in evaluation mode and with the weights that it is born with."""
    model = ZOO[family].build(**changes)
    FIRST_STEP.get(family, lambda model: None)(model)
    return model.eval()


@functools.cache
def _of_zoo(family: str, dtype: torch.dtype) -> tuple[nn.Module, list[Batch]]:
    return _fill(lambda: new_of_zoo(family), ZOO[family].sample, dtype, 0.05)


def of_zoo(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Batch]]:
    """A new model of the zoo after its first step, in evaluation mode, and two batches."""
    model, batches = _of_zoo(family, dtype)
    return copy.deepcopy(model), batches


@functools.cache
def _made(family: str, dtype: torch.dtype) -> tuple[nn.Module, list[Batch], dict[str, LayerStatistics]]:
    model, batches = _fill(*FAMILIES[family], dtype, 0.1)
    return model, batches, collect_statistics(model, batches, LAYERS, loss=loss)


def made(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Batch], dict[str, LayerStatistics]]:
    """A new model of a family, in evaluation mode, its calibration data and their statistics, with gradients."""
    model, batches, statistics = _made(family, dtype)
    return copy.deepcopy(model), batches, dict(statistics)


def ranks_of(
    model: nn.Module, keep: float = 0.6, storage: str = "factors", layers: tuple[str, ...] = LAYERS
) -> dict[str, int]:
    shapes = {name: tuple(layer.weight.shape) for name, layer in find_linears(model, layers).items()}
    return {name: rank_for_keep(shape, keep, storage) for name, shape in shapes.items()}


def compressed(family: str, storage: str = "factors", method: str = "whitened") -> tuple[nn.Module, list[Batch]]:
    model, batches, statistics = made(family)
    replace_layers(model, ranks_of(model, storage=storage), Configuration(method, storage), statistics)
    return model, batches


def compressed_zoo(
    family: str, storage: str = "factors", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, list[Batch]]:
    """A model of the zoo with all its layers replaced, without data."""
    model, batches = of_zoo(family, dtype)
    replace_layers(model, ranks_of(model, storage=storage, layers=REPLACED[family]), Configuration("svd", storage))
    return model, batches


def cast(batches: list[Batch], dtype: torch.dtype) -> list[Batch]:
    """The batches with floating-point tensors in a dtype; integers stay integers."""
    change = lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor  # noqa: E731
    return [change_tensors(batch, change) for batch in batches]


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


def samples_alone(batch: Batch) -> list[Batch]:
    """Each sample of a batch in a batch of its own, without its padding on the right."""
    if isinstance(batch, Tensor):
        return list(batch.split(1))
    assert isinstance(batch, Mapping)
    alone: list[dict[str, Tensor]] = [{} for _ in next(iter(batch.values()))]
    for key, value in batch.items():
        mask = batch.get("decoder_attention_mask" if key.startswith("decoder_") else "attention_mask")
        for i, own in enumerate(alone):
            count = int(mask[i].sum()) if mask is not None and value.shape == mask.shape else None
            own[key] = value[i : i + 1, :count] if value.dim() > 1 else value[i : i + 1]
    return list(alone)


def sum_of_samples(model: nn.Module, batch: Batch) -> Tensor:
    """A loss that is a sum over samples and their tokens, also of a model whose logits compare samples."""
    output = run_model(model, batch)
    if hasattr(output, "image_embeds"):
        return output.image_embeds.sin().sum() + output.text_embeds.sin().sum()
    return drop_padding(select_output(output).sin().sum(-1), batch).sin().sum()
