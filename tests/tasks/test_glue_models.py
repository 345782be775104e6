"""GLUE with any classifier: decoders without a token for padding, heads of other sizes, and errors that tell the real reason."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import OF_TIMM, ZOO
from safetensors.torch import load_file, save_file

from lowrank.io.hub import load_or_explain, load_pretrained, read_config
from lowrank.tasks.registry import load_task
from lowrank.tasks.text import train_tokenizer

SENTENCES = [f"a {word} film {'indeed ' * (i % 5)}number {i}" for i in range(10) for word in ("good", "bad")]
TOKENS = 300
SMALL = dict(vocab_size=TOKENS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


def llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(**SMALL, intermediate_size=24, **options)
    return transformers.LlamaForSequenceClassification(config)


def gpt2(**options: Any) -> Any:
    config = transformers.GPT2Config(vocab_size=TOKENS, n_embd=16, n_layer=1, n_head=2, n_positions=64, **options)
    return transformers.GPT2ForSequenceClassification(config)


def opt(**options: Any) -> Any:
    sizes = dict(ffn_dim=24, max_position_embeddings=64, word_embed_proj_dim=16)
    return transformers.OPTForSequenceClassification(transformers.OPTConfig(**SMALL, **sizes, **options))


def bert(**options: Any) -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, intermediate_size=24, **options))


FAMILIES = {"llama": llama, "gpt2": gpt2, "opt": opt, "bert": bert}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentences")
    for split in ("train", "validation"):
        rows = (json.dumps({"sentence": text, "label": i % 2}) for i, text in enumerate(SENTENCES))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def saved(folder: Path, model: Any, pad: str | None = None, special: str | None = "<s>") -> Path:
    tokenizer = train_tokenizer(SENTENCES, TOKENS, sentence=False)
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token = pad, special, special
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", [None, "<s>"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_classifier_is_evaluated_and_padding_does_not_count(family, pad, tmp_path, data) -> None:
    torch.manual_seed(0)
    folder = saved(tmp_path / "model", FAMILIES[family](), pad)
    task = load_task("glue", model=str(folder), data=str(data), max_length=32)
    model = task.make_model().eval()
    one, seven = (task.evaluate(model, batch_size=size) for size in (1, 7))
    assert one["loss"] == pytest.approx(seven["loss"], rel=1e-4)


def test_a_tokenizer_without_any_token_to_pad_with_is_named(tmp_path, data) -> None:
    folder = saved(tmp_path / "model", llama(), None, None)
    with pytest.raises(ValueError, match="`model` must have a tokenizer with a token for padding"):
        load_task("glue", model=str(folder), data=str(data))


def test_a_padding_token_that_the_model_does_not_know_is_named(tmp_path, data) -> None:
    model = llama()
    model.resize_token_embeddings(50)
    folder = saved(tmp_path / "model", model, "[ADDED]")
    task = load_task("glue", model=str(folder), data=str(data))
    with pytest.raises(ValueError, match=r"`model` must know the padding token .* more than \d+ tokens, got 50"):
        task.make_model()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_another_size_is_a_new_one(family, tmp_path, data) -> None:
    model = FAMILIES[family](num_labels=3)
    task = load_task("glue", model=str(saved(tmp_path / "model", model, "<s>")), data=str(data))
    made = task.make_model()
    assert made.config.num_labels == 2
    states = [dict(m.base_model.state_dict()) for m in (made, model)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("family", [family for family in ZOO if family not in OF_TIMM])
def test_a_body_of_another_size_is_named(family, tmp_path) -> None:
    model = ZOO[family].build()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if re.search(r"\.0\..*(att|Att).*weight", name) and tensors[name].dim() == 2)
    shape, tensors[name] = re.escape(str(tuple(tensors[name].shape))), torch.ones(5, 5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=rf"`model .*` must hold .*\.0\..* in the shape {shape} that its config.json says, got \(5, 5\)",
    ):
        load_pretrained(type(model).__name__, str(tmp_path))


@pytest.mark.parametrize("offline", ["0", "1"])
@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, TypeError, ImportError, AssertionError])
def test_the_real_reason_is_shown(error, offline, monkeypatch, tmp_path) -> None:
    def fail() -> None:
        raise error("the\nreal   reason")

    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    for name in ("some/model", str(tmp_path)):
        with pytest.raises(ValueError, match=f"^model '{name}' could not be loaded: ") as caught:
            load_or_explain("model", name, fail)
        assert "real" in str(caught.value)
        assert "HF_HUB_OFFLINE" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"), [("some/model", "HF_HUB_OFFLINE is set, .* HF_HOME"), ("/no/such", "there is no such folder")]
)
def test_what_cannot_be_found_names_the_remedy(name, words, monkeypatch, tmp_path) -> None:
    def fail() -> None:
        raise OSError("x" * 900)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=f"could not be loaded: {words}") as caught:
        load_or_explain("model", name, fail)
    assert len(str(caught.value)) < 900
    with pytest.raises(FileNotFoundError, match=r"could not be loaded: \(xxx"):  # the folder is there: no remedy
        load_or_explain("model", str(tmp_path), fail)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": 3}', '{"model_type": "unheard_of"}', "{}"])
def test_a_configuration_that_transformers_does_not_read_is_named(content, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="`folder` must contain a config.json, got"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="`folder` must contain a config.json of a model that transformers has"):
        read_config(tmp_path)
