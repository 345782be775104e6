"""Calibration data of any form: the right tokens, masks and columns, and errors that name what is missing."""

import json
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
import transformers

from lowrank.tasks.calibration_data import calibration_batches, labelled_batches
from lowrank.tasks.named_data import DataSource, read_rows
from lowrank.tasks.named_model import NamedModel, load_named
from lowrank.tasks.text import train_tokenizer

POSITIONS = stand_ins.POSITIONS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NamedModel]:
    made = stand_ins.make_models(tmp_path_factory.mktemp("models"))
    names = {"encoder": "sentence-transformers/all-MiniLM-L6-v2", "llama": "meta-llama/Llama-3.2-1B"}
    names |= {"instruct": "meta-llama/Llama-3.2-1B-Instruct", "classifier": "classifier"}
    return {key: load_named(made[name]) for key, name in names.items()}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_files_of_every_form_give_the_same_texts(suffix, tmp_path) -> None:
    path = tmp_path / f"rows.{suffix}"
    texts = stand_ins.TEXTS[:5]
    if suffix == "parquet":
        import pyarrow.parquet  # noqa: PLC0415

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    elif suffix == "jsonl":
        write(path, [{"text": text} for text in texts])
    else:
        path.write_text("\n".join([*(["text"] if suffix == "csv" else []), *texts]))
    assert list(read_rows(DataSource(str(path)))["text"]) == texts


def test_chunks_are_pieces_of_the_text_in_order(models, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("\n".join(stand_ins.TEXTS))
    llama = models["llama"]
    stream = llama.processor("\n\n".join(stand_ins.TEXTS * 2))["input_ids"]
    batches = calibration_batches(llama, DataSource(str(tmp_path / "notes.txt")), 5, length=20, batch_size=2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    starts = {
        len(llama.processor("\n\n".join([*stand_ins.TEXTS[:i], ""]))["input_ids"]) for i in range(len(stand_ins.TEXTS))
    }
    for chunk in torch.cat([batch["input_ids"] for batch in batches]).tolist():
        assert any(stream[start : start + 20] == chunk for start in starts)


def test_the_draw_depends_on_the_seed_alone(models, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("\n".join(stand_ins.TEXTS))
    source = DataSource(str(tmp_path / "notes.txt"))
    for name in ("llama", "encoder"):
        draws = [
            torch.cat(
                [batch["input_ids"] for batch in calibration_batches(models[name], source, 4, batch_size=4, seed=seed)]
            )
            for seed in (0, 0, 1)
        ]
        assert torch.equal(draws[0], draws[1])
        assert draws[0].shape != draws[2].shape or not torch.equal(draws[0], draws[2])


def test_chats_go_through_the_template(models, tmp_path) -> None:
    chat = [{"role": "user", "content": "good film"}, {"role": "assistant", "content": "bad film"}]
    source = DataSource(write(tmp_path / "chats.jsonl", [{"messages": chat}]))
    (batch,) = calibration_batches(models["instruct"], source, 1, length=6)
    text = "<s>user: good film<s>assistant: bad film"
    expected = models["instruct"].processor(text, add_special_tokens=False)["input_ids"]
    assert batch["input_ids"][0].tolist() == expected[:6]
    with pytest.raises(ValueError, match="`model` must have a tokenizer with a chat template"):
        calibration_batches(models["llama"], source, 1, length=6)
    odd = DataSource(write(tmp_path / "odd.jsonl", [{"messages": [{"role": "user", "content": "x"}] * 2}]))
    models["instruct"].processor.chat_template = "{{ raise_exception('roles must take turns') }}"
    try:
        with pytest.raises(ValueError, match="roles must take turns"):
            calibration_batches(models["instruct"], odd, 1, length=6)
    finally:
        models["instruct"].processor.chat_template = stand_ins.TEMPLATE


def test_rows_of_an_encoder_are_cut_padded_and_not_empty(models, tmp_path) -> None:
    texts = ["", "good", " ".join(stand_ins.TEXTS), "bad film"]
    source = DataSource(write(tmp_path / "rows.jsonl", [{"text": text} for text in texts]))
    (batch,) = calibration_batches(models["encoder"], source, 10, length=12)
    lengths = sorted(batch["attention_mask"].sum(1).tolist())
    expected = [len(models["encoder"].processor(text)["input_ids"]) for text in ("good", "bad film")]
    assert lengths == [*sorted(expected), 12]
    assert "labels" not in batch


def test_pairs_of_columns_are_pairs_of_sentences(models, tmp_path) -> None:
    rows = [{"first": "good", "second": "bad film", "label": 1}]
    source = DataSource(write(tmp_path / "rows.jsonl", rows), columns=("first", "second"))
    (batch,) = labelled_batches(models["classifier"], source)
    assert batch["input_ids"].tolist() == models["classifier"].processor(["good"], ["bad film"])["input_ids"]
    assert batch["labels"].tolist() == [1]
    with pytest.raises(ValueError, match="`columns` must be a single one for a language model"):
        calibration_batches(models["llama"], source, 1, length=4)


def test_a_model_with_encoder_and_decoder_gets_both(tmp_path) -> None:
    config = transformers.T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    train_tokenizer(stand_ins.TEXTS, 280, sentence=True).save_pretrained(tmp_path / "t5")
    named = load_named(str(tmp_path / "t5"))
    (tmp_path / "notes.txt").write_text("\n".join(stand_ins.TEXTS))
    (batch,) = calibration_batches(named, DataSource(str(tmp_path / "notes.txt")), 3)
    assert named.model(**batch).logits.shape[:2] == batch["input_ids"].shape


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"a": "x", "b": "y"}], {}, "`data` must have a column of text among"),
        ([{"a": 1}], {}, "`data` must have a column of text among"),
        ([{"text": "x"}], {"columns": ("body",)}, r"without \['body'\], got \['text'\]"),
        ([{"text": ""}, {"text": None}], {}, "`data` must hold a row with text"),
    ],
)
def test_what_is_missing_is_named(rows, options, message, models, tmp_path) -> None:
    source = DataSource(write(tmp_path / "rows.jsonl", rows), **options)
    with pytest.raises(ValueError, match=message):
        calibration_batches(models["encoder"], source, 2)


def test_too_little_text_is_named(models, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("good film")
    with pytest.raises(ValueError, match=r"`length` must be at most the \d+ tokens of the data, got 30"):
        calibration_batches(models["llama"], DataSource(str(tmp_path / "notes.txt")), 2, length=30)


def test_a_tokenizer_of_another_model_is_named(models, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("\n".join(stand_ins.TEXTS))
    sizes = stand_ins.SMALL | {"vocab_size": 20}
    other = NamedModel(
        "x", transformers.BertModel(transformers.BertConfig(**sizes)), "input_ids", models["encoder"].processor, None
    )
    with pytest.raises(ValueError, match=r"`model` must have the tokenizer of its own: it knows 20 tokens"):
        calibration_batches(other, DataSource(str(tmp_path / "notes.txt")), 4)
