"""Model cards: front matter that the Hub reads, numbers that are those of the record, and what only the caller knows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
from families import bert, compressed, made, outputs, ranks_of
from huggingface_hub import ModelCard

from lowrank.compression.card import TITLE, format_card
from lowrank.compression.checkpoint import load_compressed, save_compressed
from lowrank.compression.configuration import Configuration
from lowrank.compression.model_folder import CARD, METADATA, TENSORS
from lowrank.compression.replace import replace_layers
from lowrank.io.dependencies import ROOT

ABOUT: dict[str, Any] = {
    "base_model": "google-bert/bert-base-uncased",
    "license": "apache-2.0",
    "calibration": {"data": "SetFit/sst2", "split": "train", "samples": 256},
    "quality": {"accuracy": {"dense": 0.9123, "compressed": 0.9012}, "loss | nats": 0.25},
}


def read_rows(text: str) -> dict[str, str]:
    """The first table of a card."""
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", text.partition("## Load")[0], flags=re.MULTILINE))


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_card_says_what_the_record_says(storage: str, tmp_path: Path) -> None:
    model, _, statistics = made("bert")
    dense = sum(p.numel() for p in model.parameters())
    rows = replace_layers(model, ranks_of(model, 0.6, storage), Configuration("whitened", storage), statistics)
    record = save_compressed(model, tmp_path / "small", card=ABOUT)
    text = (tmp_path / "small" / CARD).read_text(encoding="utf8")
    assert text == format_card(json.loads((tmp_path / "small" / METADATA).read_text(encoding="utf8")))
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": "google-bert/bert-base-uncased",
        "datasets": ["SetFit/sst2"],
        "library_name": "lowrank",
        "license": "apache-2.0",
        "tags": ["lowrank", "low-rank", "compression", "transformers", "whitened"],
    }
    before, after = (sum(row[key] for row in rows) for key in ("dense_parameters", "parameters"))
    left = sum(p.numel() for p in model.parameters())
    ranks = [row["rank"] for row in rows]
    size = (tmp_path / "small" / TENSORS).stat().st_size
    table = read_rows(text)
    bytes_said = int(table.pop("bytes of all tensors").replace(",", ""))
    assert bytes_said == record["bytes"]
    assert 0 < size - bytes_said < 10000  # the header
    assert table == {
        "architecture": "BertForSequenceClassification (transformers)",
        "method": "whitened",
        "storage": storage,
        "targeted layers": f"{len(rows)}, of which {len(rows)} have a low rank, {min(ranks)} to {max(ranks)}",
        "parameters of the targeted layers": f"{after:,} of {before:,} ({after / before:.1%})",
        "parameters of the model": f"{left:,} of {dense:,} ({left / dense:.1%})",
        "targeted layers' share of the dense model": f"{before / dense:.1%}",
    }
    assert "# google-bert/bert-base-uncased, compressed by low rank" in text
    assert "- samples: 256" in text
    assert "| metric | dense | compressed |\n|---|---|---|\n| accuracy | 0.9123 | 0.9012 |\n" in text
    assert r"| loss \| nats |  | 0.25 |" in text
    assert "arXiv:2403.07378" in text
    assert ("arXiv:2501.19090" in text) == (storage == "pivoted")


def test_the_lines_that_load_are_python_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = compressed("bert")
    save_compressed(model, tmp_path / "path/to/this/folder")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "path/to/this/folder" / CARD).read_text(), re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert outputs(names["model"], batches).equal(outputs(model, batches))


def test_unknown_things_are_said_to_be_unknown(tmp_path: Path) -> None:
    model, _ = compressed("plain")
    save_compressed(model, tmp_path / "small")
    text = (tmp_path / "small" / CARD).read_text(encoding="utf8")
    assert text.count("Not recorded.") == 2
    assert "A model (not of transformers or timm)" in text
    assert ", architecture=dense)" in text
    assert ModelCard(text).data.to_dict().keys() == {"library_name", "tags"}
    save_compressed(bert(), tmp_path / "dense")
    table = read_rows((tmp_path / "dense" / CARD).read_text(encoding="utf8"))
    assert table.keys() == {"architecture", "parameters of the model", "bytes of all tensors"}


def test_the_base_model_is_read_from_the_model_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = compressed("bert")
    model.config._name_or_path = "google-bert/bert-base-uncased"
    record = save_compressed(model, tmp_path / "small", card={"quality": {"loss": 1}, "license": "mit"})
    assert record["card"] == {"base_model": "google-bert/bert-base-uncased", "license": "mit", "quality": {"loss": 1}}
    again = save_compressed(load_compressed(tmp_path / "small"), tmp_path / "again")
    assert again["card"] == {"base_model": "google-bert/bert-base-uncased", "license": "mit"}  # measured before
    (tmp_path / "a/folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for place in ("a/folder", str(tmp_path / "gone")):  # of this machine
        model.config._name_or_path = place
        assert save_compressed(model, tmp_path / "local")["card"] == {}
    vit = timm.create_model("test_vit", num_classes=3)
    replace_layers(vit, {"blocks.0.mlp.fc1": 5}, "svd")
    assert (
        save_compressed(vit, tmp_path / "vit")["card"] == {}
    )  # timm does not say whether its weights are the published ones


def test_without_a_card_there_is_none(tmp_path: Path) -> None:
    model, _ = compressed("bert")
    assert save_compressed(model, tmp_path / "small", card=False)["card"] is None
    assert not (tmp_path / "small" / CARD).exists()
    save_compressed(model, tmp_path / "small")
    assert (tmp_path / "small" / CARD).exists()


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"licence": "mit"}, "`card` must have keys among .*, got \\['licence'\\]"),
        ({"license": 3}, "`card` must be a valid string at 'license', got 3"),
        ({"quality": {"loss": float("nan")}}, "`card` must be a finite number at 'quality.loss"),
        ({"calibration": {"data": ["a"]}}, "`card` must .* at 'calibration.data"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_written(card: dict[str, Any], words: str, tmp_path: Path) -> None:
    model, _ = compressed("bert")
    with pytest.raises(ValueError, match=words):
        save_compressed(model, tmp_path / "small", card=card)
    assert list(tmp_path.iterdir()) == []


def test_a_readme_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("my notes")
    with pytest.raises(ValueError, match=r"`folder` must be new, empty or contain only .*, got 'README.md'"):
        save_compressed(compressed("bert")[0], tmp_path)
    assert (tmp_path / CARD).read_text() == "my notes"


def test_text_of_others_cannot_leave_its_line(tmp_path: Path) -> None:
    record = save_compressed(compressed("bert")[0], tmp_path / "small", card={"calibration": {"data": "a\n# b | c"}})
    assert "- data: a # b \\| c\n" in format_card(record)


def test_the_title_is_that_of_the_citation_file() -> None:
    assert f'title: "{TITLE}"' in (ROOT / "CITATION.cff").read_text(encoding="utf8")
