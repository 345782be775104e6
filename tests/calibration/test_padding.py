"""Padding does not count, whatever sequence a layer sees: statistics of a padded batch are those of its samples alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from families import REPLACED, ZOO, of_zoo, samples_alone, sum_of_samples
from torch import Tensor, nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.hooks import collect_inputs
from lowrank.calibration.padding import Padding
from lowrank.calibration.sharing import SharedInputs
from lowrank.compression.compress import compress
from lowrank.factorization.running_moments import OF_ROWS, RunningMoments, cut_blocks
from lowrank.nn.batches import Batch, compute_logits, drop_padding
from lowrank.nn.surgery import unify_linears

SAMPLES, LENGTH = 5, 9
Sizes = dict[str, Any]
COMMON: Sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
VISION: Sizes = COMMON | dict(image_size=8, patch_size=4)  # 4 patches and a class token


def bart() -> nn.Module:
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config = hf.BartConfig(vocab_size=60, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes)
    return hf.BartForConditionalGeneration(config)


def t5() -> nn.Module:
    sizes = dict(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))


def clip() -> nn.Module:
    text = COMMON | dict(max_position_embeddings=16, bos_token_id=1, eos_token_id=59)
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def gpt2() -> nn.Module:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    unify_linears(model)
    return model


def deberta() -> nn.Module:
    """It sets the embeddings of padding to zero, so that nothing tells what follows from it."""
    return hf.DebertaModel(hf.DebertaConfig(**COMMON, max_position_embeddings=16))


def opt() -> nn.Module:
    sizes = dict(vocab_size=60, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2)
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=16))


class Custom(nn.Module):
    """One or two texts, or a text and an image, through one block, with rows laid out in some way."""

    def __init__(self, lay: Callable[..., Any]) -> None:
        super().__init__()
        self.embed, self.patches = nn.Embedding(60, 8), nn.Linear(4, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))])
        self.lay = lay

    def forward(self, **batch: Tensor) -> Tensor:
        return self.lay(self, **batch)

    def run(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def both(model: Custom, query_input_ids: Tensor, passage_input_ids: Tensor, **_: Tensor) -> Tensor:
    return (model.run(model.embed(query_input_ids)) + model.run(model.embed(passage_input_ids)).mean()).sum()[None]


LAYS: dict[str, Callable[..., Tensor]] = {
    "tokens first": lambda m, input_ids, **_: m.run(m.embed(input_ids.T)),
    "flattened": lambda m, input_ids, **_: m.run(m.embed(input_ids).flatten(0, 1)),
    "flattened, tokens first": lambda m, input_ids, **_: m.run(m.embed(input_ids.T).flatten(0, 1)),
    "one row per sample": lambda m, input_ids, **_: m.run(m.embed(input_ids)[:, 0]),
    "two calls": both,
    "image": lambda m, input_ids, pixel_values, **_: m.run(m.patches(pixel_values)) + m.run(m.embed(input_ids)).mean(),
}

TEXT, TARGET, IMAGE = ("",), ("", "decoder_"), ("", "pixels")
# how to build the model, which sequences a batch has, what its layers are
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**COMMON, max_position_embeddings=16)), TEXT),
    "roberta": (lambda: hf.RobertaModel(hf.RobertaConfig(**COMMON, max_position_embeddings=24)), TEXT),
    "deberta": (deberta, TEXT),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON)), TEXT),
    "gpt2": (gpt2, TEXT),
    "opt": (opt, TEXT),
    "bart": (bart, TARGET),
    "bart, source alone": (bart, TEXT),
    "t5": (t5, TARGET),
    "clip": (clip, IMAGE),
    **{name: (lambda lay=lay: Custom(lay), TEXT) for name, lay in LAYS.items()},
    "two calls": (lambda: Custom(both), ("query_", "passage_")),
    "image": (lambda: Custom(LAYS["image"]), ("", "rows")),
}
SHAPES = {
    "as many samples as tokens": (9, 9, 9),
    "two of one length": (5, 9, 9),
    "two lengths": (5, 9, 6),
    "as many tokens as patches": (4, 5, 5),
}


def make(family: str, sizes: tuple[int, int, int], generator: torch.Generator) -> tuple[nn.Module, dict, list[dict]]:
    """A model, a padded batch, and its samples alone without padding."""
    build, sequences = FAMILIES[family]
    samples, *lengths = sizes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double().eval()
    batch: dict[str, Tensor] = {}
    alone: list[dict[str, Tensor]] = [{} for _ in range(samples)]
    for prefix, length in zip(sequences, lengths, strict=False):
        if prefix in ("pixels", "rows"):
            shape = (samples, 3, 8, 8) if prefix == "pixels" else (samples, 5, 4)
            batch["pixel_values"] = torch.randn(shape, generator=generator, dtype=torch.float64)
            for i, own in enumerate(alone):
                own["pixel_values"] = batch["pixel_values"][i : i + 1]
            continue
        ids = torch.randint(3, 59, (samples, length), generator=generator)
        real = torch.randint(2, length, (samples, 1), generator=generator)
        batch |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": (torch.arange(length) < real).long()}
        for i, own in enumerate(alone):
            own[f"{prefix}input_ids"] = ids[i : i + 1, : real[i, 0]]
    return model, batch, alone


def assert_equal(found: dict, expected: dict, fields: tuple[str, ...] = OF_ROWS) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert found[name].tokens == one.tokens, name
        for field in fields:
            a, b = getattr(found[name], field), getattr(one, field)
            assert (a - b).norm() <= 1e-9 * b.norm(), (name, field)


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_is_its_samples_alone(family, sizes, generator) -> None:
    model, batch, alone = make(family, sizes, generator)
    expected = collect_statistics(model, alone, products=torch.float64)
    assert_equal(collect_statistics(model, [batch], products=torch.float64), expected)


@pytest.mark.parametrize("family", ZOO)
def test_every_family_gives_the_moments_of_its_samples_alone(family) -> None:
    """Inputs and gradients, of texts, pairs of texts, images, sounds, and of two kinds at once."""
    model, (batch, _) = of_zoo(family, torch.float64)
    options: dict[str, Any] = dict(layers=REPLACED[family], loss=sum_of_samples, products=torch.float64)
    found = collect_statistics(model, [batch], **options)
    expected = collect_statistics(model, samples_alone(batch), **options)
    assert_equal(found, expected, (*OF_ROWS, "gradient_gram", "row_fisher"))


@pytest.mark.parametrize("family", ["bart", "t5", "tokens first", "two calls"])
def test_later_batches_go_by_what_the_first_showed(family, generator) -> None:
    """Padding in one sequence only, then in the other, then masks that are the same both ways, then other lengths."""
    model, first, alone = make(family, (9, 9, 9), generator)
    batches = [first]
    for sizes in ((4, 4, 4), (6, 6, 6), (5, 8, 7)):
        _, batch, samples = make(family, sizes, generator)
        batches, alone = [*batches, batch], alone + samples
    expected = collect_statistics(model, alone, products=torch.float64)
    for order in (batches, batches[::-1]):
        assert_equal(collect_statistics(model, order, products=torch.float64), expected)


@pytest.mark.parametrize("family", ["bert", "bart", "clip", "tokens first"])
def test_gradients_of_padding_do_not_count(family, generator) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return drop_padding(compute_logits(model, batch).sin().sum(-1), batch).sum()

    model, batch, alone = make(family, (5, 9, 9), generator)
    layers = [r".*(fc1|query|blocks\.\d\.0)"]
    if family == "clip":  # its loss joins samples
        loss = lambda model, batch: sum(out.sin().sum() for out in _features(model, batch))  # noqa: E731
    expected = collect_statistics(model, alone, layers, loss=loss, products=torch.float64)
    found = collect_statistics(model, [batch], layers, loss=loss, products=torch.float64)
    assert_equal(found, expected, ("gram", "gradient_gram"))


def _features(model: Any, batch: Any) -> list[Tensor]:
    output = model(**batch)
    return [output.text_embeds, output.image_embeds]


@pytest.mark.parametrize("family", ["bart", "clip", "tokens first"])
def test_inputs_themselves_are_without_padding(family, generator) -> None:
    model, batch, alone = make(family, (5, 9, 9), generator)
    names = list(collect_statistics(model, [batch]))
    for name in names:
        count = collect_statistics(model, alone, [name])[name].tokens
        found = collect_inputs(model, [batch], [name], count)[name]
        expected = collect_inputs(model, alone, [name], count)[name]
        assert (found.mean(0) - expected.mean(0)).norm() <= 1e-9 * expected.norm()


def test_padding_is_left_out_where_layers_are_retargeted(generator) -> None:
    """What is on padding has no say in a retargeted model."""
    results = []
    for fill in (7, 23):
        model, batch, _ = make("bart", (6, 9, 9), torch.Generator().manual_seed(3))
        for prefix in ("", "decoder_"):
            real = batch[f"{prefix}attention_mask"].bool()
            batch[f"{prefix}input_ids"] = batch[f"{prefix}input_ids"].where(real, fill)
        compress(model, [batch] * 2, 0.6, method="whitened", retarget=True, progress=False)
        results.append(model.state_dict())
    assert all(torch.allclose(value, results[1][name], atol=1e-6) for name, value in results[0].items())


def joined(model: Custom, input_ids: Tensor, pixel_values: Tensor, **_: Tensor) -> Tensor:
    return model.run(torch.cat([model.embed(input_ids), model.patches(pixel_values)], dim=1))


def gathered(model: Custom, input_ids: Tensor, **_: Tensor) -> Tensor:
    return model.run(model.embed(input_ids)[input_ids % 2 == 0])


@pytest.mark.parametrize("lay", [joined, gathered])
def test_what_cannot_be_known_is_refused_with_layer_and_remedy(lay, generator) -> None:
    _, batch, _ = make("image", (5, 9, 9), generator)
    model = Custom(lay).double().eval()
    batch = batch if lay is joined else {key: value for key, value in batch.items() if key != "pixel_values"}
    with pytest.raises(
        ValueError, match=r"attention_mask \(5, 9\)\) that does not fit layer 'blocks.0.0'.*leave the layer out"
    ):
        collect_statistics(model, [batch])


def test_a_batch_without_padding_costs_no_pass(generator) -> None:
    calls: list[int] = []
    model, batch, _ = make("bart", (5, 9, 9), generator)
    model.register_forward_hook(lambda *_: calls.append(1))
    for key in ("attention_mask", "decoder_attention_mask"):
        batch[key] = torch.ones_like(batch[key])
    collect_statistics(model, [batch] * 3)
    assert len(calls) == 1  # the others end at the head


def test_nothing_is_left_behind(generator) -> None:
    model, batch, _ = make("bart", (5, 9, 9), generator)
    Padding(model, dict(model.named_modules())).read(batch)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_processes_share_what_all_of_them_share() -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    create = lambda name: RunningMoments(["gram"], 4, torch.device("cpu"), torch.float64)  # noqa: E731
    inputs = SharedInputs(create)
    for name, value in (("a", x), ("b", x), ("c", y)):
        inputs.receive(name, value, lambda value=value: cut_blocks(value, torch.float64))
    inputs.end_batch()
    assert len(inputs.groups) == 2
    inputs.align([{"a": "a", "b": "a", "c": "c"}, {"a": "a", "b": "b", "c": "b"}])
    assert len(inputs.groups) == 3
    for name, value in (("a", x), ("b", x), ("c", y)):
        assert torch.allclose(inputs.group_of[name].sums.sums["gram"], (value.mT @ value).double(), atol=1e-5)
