"""Small models of many families as their libraries build them, with batches: nothing is converted or prepared for us."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import timm
import torch
import transformers
from torch import Tensor, nn

from lowrank.nn.batches import Batch

VOCABULARY, TOKENS = 64, 10
TEXT = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
GROUPED = TEXT | dict(num_key_value_heads=2, max_position_embeddings=32, head_dim=8)
ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


class Family(NamedTuple):
    """How to build a model, and a batch for it."""

    build: Callable[[], nn.Module]
    sample: Callable[[torch.Generator], Batch]


def hugging(name: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A builder of a model of transformers with random weights."""

    def build() -> nn.Module:
        return getattr(transformers, name)(getattr(transformers, config)(**sizes))

    return build


def created(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A builder of a model of timm with random weights."""
    return lambda: timm.create_model(name, num_classes=4, **options)


def tokens(generator: torch.Generator, length: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (12, length), generator=generator)


def text(generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": tokens(generator), "attention_mask": padding(generator)}


def padding(generator: torch.Generator) -> Tensor:
    """1 where there is a token: texts of many lengths, padded on the right."""
    return (torch.arange(TOKENS) < torch.randint(5, TOKENS + 1, (12, 1), generator=generator)).long()


def pairs(generator: torch.Generator) -> dict[str, Any]:
    return text(generator) | {"decoder_input_ids": tokens(generator, 6)}


def images(size: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(6, 3, size, size, generator=generator)


def pixels(generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": images(16)(generator)}


def images_and_texts(generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": images(16)(generator)} | {key: value[:6] for key, value in text(generator).items()}


def sounds(generator: torch.Generator) -> dict[str, Any]:
    return {
        "input_features": torch.randn(6, 8, 32, generator=generator),
        "decoder_input_ids": tokens(generator, 6)[:6],
    }


VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
)
SEQUENCES = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
)


def mixer() -> nn.Module:
    return timm.models.MlpMixer(num_classes=4, img_size=16, patch_size=4, num_blocks=2, embed_dim=32)


ZOO: Mapping[str, Family] = {
    "BERT": Family(
        hugging("BertForSequenceClassification", "BertConfig", **TEXT, max_position_embeddings=16, num_labels=3), text
    ),
    "BART": Family(
        hugging(
            "BartForConditionalGeneration",
            "BartConfig",
            **SEQUENCES,
            **ENDS,
            vocab_size=VOCABULARY,
            max_position_embeddings=16,
            decoder_start_token_id=2,
        ),
        pairs,
    ),
    "T5": Family(
        hugging(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        pairs,
    ),
    "Llama": Family(hugging("LlamaForCausalLM", "LlamaConfig", **GROUPED, tie_word_embeddings=True), text),
    "Gemma 3": Family(hugging("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, sliding_window=4, **ENDS), text),
    "Mixtral": Family(
        hugging("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4, num_experts_per_tok=2), text
    ),
    "GPT-2": Family(
        hugging(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=16,
            **ENDS,
        ),
        text,
    ),
    "OPT": Family(
        hugging(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            word_embed_proj_dim=32,
            **ENDS,
        ),
        text,
    ),
    "CLIP": Family(
        hugging(
            "CLIPModel",
            "CLIPConfig",
            text_config=TEXT | ENDS | dict(max_position_embeddings=16),
            vision_config=VISION,
            projection_dim=16,
        ),
        images_and_texts,
    ),
    "Whisper": Family(
        hugging(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **SEQUENCES,
            **ENDS,
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            decoder_start_token_id=1,
        ),
        sounds,
    ),
    "ViT": Family(hugging("ViTForImageClassification", "ViTConfig", **VISION, num_labels=4), pixels),
    "BEiT": Family(created("beit_base_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=4), images(32)),
    "Swin": Family(
        created(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 4)
        ),
        images(32),
    ),
    "ConvNeXt": Family(created("convnext_tiny", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)), images(32)),
    "MLP-Mixer": Family(mixer, images(16)),
}
