"""Compressed models on disk: they come back as they were, need nothing else, and damage is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, LAYERS, bert, compressed, llama, made, outputs, plain, ranks_of, relative, weights_below
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lowrank.calibration.collect import collect_statistics
from lowrank.compression.checkpoint import FORMAT, METADATA, RECORD, TENSORS, load_compressed, save_compressed
from lowrank.compression.configuration import Configuration
from lowrank.compression.model_folder import CARD
from lowrank.compression.replace import fold, replace_layers
from lowrank.factorization.storages import STORAGES
from lowrank.io.hashing import hash_model, hash_tensors
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.nn.surgery import split_packed
from lowrank.nn.targets import find_linears

VIT = {
    "timm": "VisionTransformer",
    "options": dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3),
}
BASES: dict[str, dict[str, Any] | None] = dict.fromkeys(FAMILIES) | {"vit": VIT}
KNOWN = [family for family in FAMILIES if family != "plain"]  # those of which a folder says how to build them


def load(folder: Path, family: str) -> nn.Module:
    return load_compressed(folder, architecture=plain() if family == "plain" else None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "compressed"


@pytest.fixture
def saved(folder: Path) -> Path:
    """A folder with a compressed BERT."""
    save_compressed(compressed("bert", "pivoted")[0], folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_as_it_was(family, storage, folder) -> None:
    model, batches = compressed(family, storage)
    about = save_compressed(model, folder, BASES[family])
    loaded = load(folder, family)
    assert torch.equal(outputs(loaded, batches), outputs(model, batches))
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert hash_model(loaded) == hash_model(model)
    assert [str(module) for module in loaded.modules()] == [str(module) for module in model.modules()]
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    buffers, before = dict(loaded.named_buffers()), dict(model.named_buffers())
    assert buffers.keys() == before.keys()
    assert all(torch.equal(buffers[name], before[name]) for name in buffers)  # also those that no file holds
    assert all(p.requires_grad for p in loaded.parameters())
    assert not any(module.training for module in loaded.modules())
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    record, rows = getattr(loaded, RECORD), getattr(model, RECORD)["layers"]
    assert record["model"] == about["model"] == getattr(model, RECORD)["model"]
    assert record["layers"].keys() == rows.keys()
    assert all(record["layers"][name].items() >= row.items() for name, row in rows.items())


@pytest.mark.parametrize("family", ["llama", "t5", "opt", "gpt2"])
def test_tied_weights_are_stored_once_and_are_one_again(family, folder) -> None:
    model, _ = compressed(family)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is embedding
    about = save_compressed(model, folder)
    stored = {name: tensor for name, tensor in load_file(folder / TENSORS).items() if tensor.numel()}  # no placeholders
    assert sum(t.shape == head.shape and torch.equal(t, head) for t in stored.values()) == 1
    assert set(about["tied"]) & set(stored) == set()
    assert set(about["tied"]) | set(stored) == set(model.state_dict())
    assert set(about["tied"].values()) <= set(stored)
    loaded = load_compressed(folder)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    aliases = [
        n for n, p in loaded.named_parameters(remove_duplicate=False) if p is loaded.get_input_embeddings().weight
    ]
    assert aliases == [n for n, p in model.named_parameters(remove_duplicate=False) if p is head]
    loaded.get_input_embeddings().weight.data.zero_()
    assert not bool(loaded.get_output_embeddings().weight.any())


@pytest.mark.parametrize("storage", STORAGES)
def test_split_projections_come_back(storage, folder) -> None:
    model, batches, _ = made("vit")
    names = split_packed(model, [r".*\.qkv"])
    ranks = ranks_of(model, 0.5, storage) | {names[4]: 24}  # one part stays dense
    replace_layers(model, ranks, Configuration("whitened", storage), collect_statistics(model, batches))
    about = save_compressed(model, folder, VIT)
    assert about["layers"]["blocks.0.attn.qkv"] == {"kind": "packed", "parts": ["q", "k", "v"]}
    assert about["layers"][names[4]]["kind"] == "linear"
    loaded = load_compressed(folder)
    assert torch.equal(outputs(loaded, batches), outputs(model, batches))
    assert hash_model(loaded) == hash_model(model)
    assert list(fold(loaded).state_dict()) == list(made("vit")[0].state_dict())


def test_split_projections_of_an_uncompressed_model_come_back(folder) -> None:
    model, batches, _ = made("vit", torch.float64)
    split_packed(model, ["blocks.1.attn.qkv"])
    save_compressed(model, folder, VIT)
    loaded = load_compressed(folder)
    assert hash_model(loaded) == hash_model(model)
    assert torch.allclose(outputs(loaded, batches), outputs(model, batches), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", ["bert", "llama", "vit", "plain"])
def test_half_precision_comes_back_in_its_dtype(family, storage, folder) -> None:
    model, batches = compressed(family, storage)
    model.to(torch.bfloat16)
    save_compressed(model, folder, BASES[family])
    loaded = load(folder, family)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert hash_model(loaded) == hash_model(model)
    halves = [batch.bfloat16() if isinstance(batch, torch.Tensor) else batch for batch in batches]
    assert torch.equal(outputs(loaded, halves), outputs(model, halves))
    assert {n: b.dtype for n, b in loaded.named_buffers()} == {n: b.dtype for n, b in model.named_buffers()}


def test_mixed_dtypes_come_back(folder) -> None:
    model, _ = compressed("llama", "pivoted")
    model.model.norm.double()
    model.model.layers[0].mlp.to(torch.bfloat16)
    save_compressed(model, folder)
    loaded = load_compressed(folder)
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert hash_model(loaded) == hash_model(model)


def test_a_model_that_timm_made_is_rebuilt_by_its_name(folder) -> None:
    model, batches = compressed("created vit")
    about = save_compressed(model, folder)
    assert about["base"]["timm"] == "test_vit"
    assert about["base"]["options"]["num_classes"] == 3
    assert torch.equal(outputs(load_compressed(folder), batches), outputs(model, batches))


def test_options_of_a_timm_model_can_be_given(folder) -> None:
    model = timm.create_model("test_vit", num_classes=4, depth=1, embed_dim=32).eval()
    replace_layers(model, {"blocks.0.mlp.fc1": 5}, "svd")
    options = {"num_classes": 4, "depth": 1, "embed_dim": 32}
    with pytest.raises(ValueError, match="`base` must fit"):
        save_compressed(model, folder, {"timm": "test_vit", "options": options | {"depth": 2}})
    for base in (None, {"timm": "test_vit", "options": options}):
        assert save_compressed(model, folder, base)["base"]["options"].items() >= options.items()
        assert hash_model(load_compressed(folder)) == hash_model(model)


def test_a_model_of_neither_library_needs_its_architecture(folder) -> None:
    model, batches = compressed("plain", "pivoted")
    assert save_compressed(model, folder)["base"] is None
    with pytest.raises(ValueError, match="`architecture` must be the dense model.*got None"):
        load_compressed(folder)
    dense = plain()
    assert load_compressed(folder, architecture=dense) is dense
    assert torch.equal(outputs(dense, batches), outputs(model, batches))
    with pytest.raises(ValueError, match=r"`base` must have a layer '0'|`folder` must fit"):
        load_compressed(folder, architecture=nn.Sequential())


@pytest.mark.parametrize("family", ["bert", "plain"])
def test_a_folded_model_comes_back(family, folder) -> None:
    model, batches = compressed(family)
    save_compressed(fold(model), folder)
    loaded = load(folder, family)
    assert torch.equal(outputs(loaded, batches), outputs(model, batches))
    rows = json.loads((folder / METADATA).read_text())["layers"]
    assert [name for name, row in rows.items() if row.get("storage", "dense") != "dense"] == []  # none is factored now


def test_the_settings_of_generation_are_kept(folder) -> None:
    model, batches = compressed("llama")
    model.generation_config.max_new_tokens, model.generation_config.pad_token_id = 7, 0
    save_compressed(model, folder)
    loaded = load_compressed(folder)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    found, expected = loaded.config.to_dict(), model.config.to_dict()
    written = {"_name_or_path": "", "architectures": None, "dtype": None}  # what a configuration has from a folder
    assert found.pop("quantization_config")["quant_method"] == "lowrank"
    assert found | written == expected | written
    ids = batches[0]["input_ids"][:2]
    found, expected = (m.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False) for m in (loaded, model))
    assert torch.equal(found, expected)


# --- what a folder holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "created vit"])
def test_the_file_holds_what_the_tables_say(family, storage, folder) -> None:
    model, _, statistics = made(family)
    dense = {name: layer.weight.numel() for name, layer in find_linears(model, LAYERS).items()}
    rows = replace_layers(model, ranks_of(model, 0.6, storage), Configuration("whitened", storage), statistics)
    about = save_compressed(model, folder, BASES[family])
    stored = load_file(folder / TENSORS)
    assert sum(t.numel() for t in stored.values()) == about["parameters"] + about["indices"]
    assert about["parameters"] == sum(p.numel() for p in model.parameters())
    assert about["indices"] == sum(row["indices"] for row in rows) == sum(r["rank"] for r in rows if r["indices"])
    for row in rows:
        assert weights_below(stored, row["layer"]) == (row["parameters"], row["indices"])
    assert sum(weights_below(stored, name)[0] for name in dense) <= 0.6 * sum(dense.values())
    size = (folder / TENSORS).stat().st_size
    assert size >= 4 * about["parameters"] + 8 * about["indices"]
    assert size <= 4 * about["parameters"] + 8 * about["indices"] + 200 * len(stored) + 1000  # and names


@pytest.mark.parametrize("family", KNOWN)
def test_nothing_else_is_needed(family, folder, tmp_path) -> None:
    model, batches = compressed(family)
    save_compressed(model, folder, BASES[family])
    allowed = {TENSORS, METADATA, CARD, "config.json", "generation_config.json"}
    assert {TENSORS, METADATA} <= contents(folder).keys() <= allowed
    expected = outputs(model, batches)
    del model
    moved = tmp_path / "elsewhere" / "m"
    moved.parent.mkdir()
    folder.rename(moved)
    assert torch.equal(outputs(load_compressed(moved), batches), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("storage", STORAGES)
def test_the_record_tells_how_every_layer_was_made(storage, folder) -> None:
    model, _, statistics = made("bert")
    before = hash_model(model)
    rows = replace_layers(model, ranks_of(model, 0.6, storage), Configuration("whitened", storage), statistics)
    about = save_compressed(model, folder)
    assert json.loads((folder / METADATA).read_text()) == about
    assert about["format"] == FORMAT
    assert about["base"] == {"transformers": "BertForSequenceClassification"}
    assert about["model"] == before
    assert list(about["layers"]) == [row["layer"] for row in rows]
    for row in rows:
        found = about["layers"][row["layer"]]
        assert found.items() >= row.items()
        assert found["kind"] == storage
        assert (found["rank"], found["method"]) == (row["rank"], "whitened")
        assert 0 < found["predicted_error"] == pytest.approx(found["measured_error"], abs=1e-6)
        assert len(found["statistics"]) == 32
    one, other = (about["layers"][f"bert.encoder.layer.0.{part}.dense"] for part in ("intermediate", "output"))
    assert one["statistics"] != other["statistics"]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_saving_a_loaded_model_gives_the_same_again(family, folder, tmp_path) -> None:
    model, _ = compressed(family, "pivoted")
    first = save_compressed(model, folder, BASES[family])
    second = save_compressed(load_compressed(folder), tmp_path / "again", BASES[family])
    assert second == first
    assert contents(tmp_path / "again") == contents(folder)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_compressed_model_is_replaced_as_a_whole(folder) -> None:
    save_compressed(compressed("llama")[0], folder)
    assert (folder / "generation_config.json").exists()
    model, batches = compressed("bert", "pivoted")
    save_compressed(model, folder)
    assert contents(folder).keys() == {TENSORS, METADATA, CARD, "config.json"}
    assert torch.equal(outputs(load_compressed(folder), batches), outputs(model, batches))
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_new_and_empty_folders_are_filled(tmp_path) -> None:
    model, _ = compressed("bert")
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "not" / "yet", str(tmp_path / "text")):
        save_compressed(model, place)
        assert hash_model(load_compressed(place)) == hash_model(model)


def test_a_folder_with_other_content_is_left_alone(folder) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="contain only a compressed model to replace, got 'thesis.txt'"):
        save_compressed(compressed("bert")[0], folder)
    assert contents(folder) == {"thesis.txt": b"years of work"}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a model"])
@pytest.mark.parametrize(
    "base",
    [
        {"timm": "VisionTransformer", "options": VIT["options"] | {"embed_dim": 32}},
        {"timm": "VisionTransformer", "options": VIT["options"] | {"depth": 1}},
        {"timm": "VisionTransformer", "options": VIT["options"] | {"depth": 3}},
        {"timm": "os"},
        {"timm": "no_such_model"},
        {"transformers": "os"},
        {"transformers": "PreTrainedConfig"},
        {"nothing": "known"},
    ],
    ids=lambda base: "-".join(map(str, base.values()))[:40],
)
def test_saving_that_fails_leaves_nothing_behind(base, before, folder) -> None:
    if before == "an empty folder":
        folder.mkdir()
    elif before == "a model":
        save_compressed(compressed("bert")[0], folder)
    model, _ = compressed("vit")
    content, state = contents(folder.parent), hash_model(model)
    with pytest.raises(ValueError, match="`base` must"):
        save_compressed(model, folder, base)
    assert contents(folder.parent) == content
    assert [p.name for p in folder.parent.iterdir()] == ([] if before == "nothing" else [folder.name])
    assert hash_model(model) == state


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.05, 0.5, 0.999])
def test_truncated_tensors_are_named(saved, share) -> None:
    content = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"`folder` must be a whole safetensors file, got .*compressed/{TENSORS}'"):
        load_compressed(saved)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9999])
def test_a_single_flipped_bit_is_found(saved, place) -> None:
    content = bytearray((saved / TENSORS).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + int(place * (len(content) - start))] ^= 1
    (saved / TENSORS).write_bytes(content)
    with pytest.raises(ValueError, match=f"`folder` must contain the tensors that {METADATA} was written for"):
        load_compressed(saved)


def test_tensors_of_another_model_of_these_shapes_are_found(saved, tmp_path) -> None:
    other, _ = compressed("bert", "pivoted")
    with torch.no_grad():
        other.classifier.bias += 1e-3
    save_compressed(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / TENSORS, saved / TENSORS)
    with pytest.raises(ValueError, match=f"`folder` must contain the tensors that {METADATA} was written for"):
        load_compressed(saved)


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{QUERY}.left.weight"), rf"{QUERY}.left.weight is missing"),
        (lambda t: t.pop(f"{QUERY}.pivots"), rf"{QUERY}.pivots is missing"),
        (lambda t: t.pop("classifier.bias"), "classifier.bias is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra is left over"),
        (
            lambda t: t.update({"classifier.bias": torch.zeros(5)}),
            r"classifier.bias has shape \(5,\) instead of \(3,\)",
        ),
        (
            lambda t: t.update({f"{QUERY}.right.weight": t[f"{QUERY}.right.weight"].T.contiguous()}),
            rf"{QUERY}.right.weight has shape \(24, 8\) instead of \(8, 24\)",
        ),
        (lambda t: t.clear(), r"is missing; .* and \d+ more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, change, words) -> None:
    tensors = load_file(saved / TENSORS)
    change(tensors)
    save_file(tensors, saved / TENSORS)
    with pytest.raises(ValueError, match=rf"`folder` must fit the model's tensors, got: .*{words}"):
        load_compressed(saved)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = METADATA) -> None:
    about = json.loads((folder / name).read_text())
    change(about)
    (folder / name).write_text(json.dumps(about))


def test_a_tied_tensor_that_is_missing_is_named(folder) -> None:
    save_compressed(compressed("llama")[0], folder)
    tensors = load_file(folder / TENSORS)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / TENSORS)
    with pytest.raises(
        ValueError,
        match="hold the tensor that .lm_head.weight. is tied to, got .model.embed_tokens.weight.",
    ):
        load_compressed(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", f"be whole JSON, got .*{METADATA}"),
        ('{"format": "lowr', f"be whole JSON, got .*{METADATA}"),
        (b"\xff\xfe\x00", f"be text in UTF-8, got .*{METADATA}"),
        ("[1, 2]", rf"format '{FORMAT}', got \[1, 2\]"),
        ("null", f"format '{FORMAT}', got None"),
        ("{}", f"format '{FORMAT}', got None"),
        ('{"format": "lowrank.compressed/9"}', "got 'lowrank.compressed/9'"),
    ],
)
def test_a_damaged_record_is_named(saved, content, words) -> None:
    (saved / METADATA).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"`folder` must .*{words}"):
        load_compressed(saved)


def test_a_folder_with_a_hash_of_former_versions_is_read_and_checked(saved) -> None:
    tensors = {name: tensor for name, tensor in load_file(saved / TENSORS).items() if tensor.numel()}
    edit(saved, lambda about: about.update(tensors=hash_tensors(tensors, 16)))
    load_compressed(saved)
    edit(saved, lambda about: about.update(tensors=hash_tensors({}, 16)))
    with pytest.raises(ValueError, match="`folder` must contain the tensors"):
        load_compressed(saved)


@pytest.mark.parametrize("key", ["base", "layers", "tensors", "tied"])
def test_a_record_without_one_of_its_parts_is_named(saved, key) -> None:
    edit(saved, lambda about: about.pop(key))
    with pytest.raises(ValueError, match=f"`folder` must .*{key}"):
        load_compressed(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda about: about.update(layers=[]), "at 'layers', got"),
        (lambda about: about["layers"][QUERY].update(rank="2"), f"integer at 'layers.{QUERY}.rank', got '2'"),
        (lambda about: about["layers"][QUERY].pop("out"), f"key 'out' at 'layers.{QUERY}', got"),
        (lambda about: about["base"].update(transformers=3), "at 'base.transformers', got 3"),
        (lambda about: about["tied"].update(a="b"), "tensor that 'a' is tied to, got 'b'"),
        (lambda about: about.update(tensors=None), "at 'tensors', got None"),
    ],
    ids=["layers", "rank", "sizes", "base", "tied", "hash"],
)
def test_a_field_of_the_record_of_another_kind_is_named(saved, change, words) -> None:
    edit(saved, change)
    with pytest.raises(ValueError, match=f"`folder` must .*{words}"):
        load_compressed(saved)


def test_a_kind_of_layer_that_is_not_known_is_named(saved) -> None:
    edit(saved, lambda about: about["layers"][QUERY].update(kind="butterfly"))
    with pytest.raises(ValueError, match=r"butterfly"):
        load_compressed(saved)


def test_a_layer_that_the_base_lacks_is_named(saved) -> None:
    edit(saved, lambda about: about["layers"].update({"bert.nowhere": about["layers"][QUERY]}))
    with pytest.raises(ValueError, match=r"must have a layer 'bert.nowhere'"):
        load_compressed(saved)


@pytest.mark.parametrize("name", [METADATA, TENSORS, "config.json"])
def test_missing_files_are_named(saved, name) -> None:
    if name == METADATA:  # without it, config.json alone would make this a folder of `save_pretrained`
        edit(saved, lambda config: config.pop("quantization_config"), "config.json")
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_compressed(saved)


def test_a_missing_folder_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`folder` must contain a model .*nowhere"):
        load_compressed(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"hidden_size": 48}, "has shape .* instead of"),
        ({"vocab_size": 61}, r"word_embeddings.weight has shape \(60, 24\) instead of \(61, 24\)"),
        ({"num_labels": 4}, r"classifier.weight has shape \(3, 24\) instead of \(4, 24\)"),
        ({"num_hidden_layers": 1}, r"must have a layer 'bert.encoder.layer.1"),
        ({"num_hidden_layers": 3}, r"bert.encoder.layer.2.* is missing"),
    ],
)
def test_another_size_of_the_base_is_named(saved, tmp_path, sizes, words) -> None:
    usual = dict(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
    config = BertConfig(**usual | {"max_position_embeddings": 16, "num_labels": 3} | sizes)
    BertForSequenceClassification(config).config.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", saved / "config.json")
    with pytest.raises(ValueError, match=words):
        load_compressed(saved)


def test_another_family_of_the_base_is_named(saved, tmp_path) -> None:
    llama().config.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", saved / "config.json")
    with pytest.raises(ValueError, match="`(base|folder)` must"):
        load_compressed(saved)


def test_a_damaged_configuration_is_named(saved) -> None:
    (saved / "config.json").write_text('{"model_type": ')
    with pytest.raises((ValueError, OSError), match="config.json"):
        load_compressed(saved)


@pytest.mark.parametrize("kind", ["transformers", "timm"])
@pytest.mark.parametrize("name", ["os", "PreTrainedConfig", "AutoModel", "torch", "no_such_model"])
def test_a_base_that_is_no_model_is_named(saved, kind, name) -> None:
    edit(saved, lambda about: about.update(base={kind: name}))
    with pytest.raises(ValueError, match=f"`base` must name a model .*got '{name}'"):
        load_compressed(saved)


def test_a_base_of_another_library_is_named(saved) -> None:
    edit(saved, lambda about: about.update(base={"keras": "BERT"}))
    with pytest.raises(ValueError, match="`base` must have the key 'transformers' or 'timm', got .*keras"):
        load_compressed(saved)


def test_a_loaded_model_does_not_hang_on_its_file(saved) -> None:
    model = load_compressed(saved)
    state, content = hash_model(model), (saved / TENSORS).read_bytes()
    (saved / TENSORS).open("r+b").write(bytes(len(content)))  # in place
    assert hash_model(model) == state


def test_the_random_state_is_left_alone(saved) -> None:
    state = torch.get_rng_state()
    load_compressed(saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_model_is_compressed_further_and_trained(folder) -> None:
    model, batches, statistics = made("bert")
    names = list(find_linears(model))
    replace_layers(model, {names[0]: 5}, "whitened", statistics)
    save_compressed(model, folder)
    loaded = load_compressed(folder)
    rows = replace_layers(loaded, {names[1]: 5}, "whitened", statistics)
    assert list(getattr(loaded, RECORD)["layers"]) == [names[0], names[1]]
    assert getattr(loaded, RECORD)["model"] == hash_model(made("bert")[0])
    assert isinstance(loaded.get_submodule(rows[0]["layer"]), tuple(FACTORED_LAYERS.values()))
    loaded(**batches[0]).logits.sum().backward()
    assert loaded.get_submodule(names[0]).left.weight.grad.norm() > 0
    assert bert().state_dict().keys() != loaded.state_dict().keys()


def test_a_folder_with_the_bias_of_pivots_before_the_coefficients_is_read(folder) -> None:
    model, batches = compressed("bert", "pivoted")
    metadata = save_compressed(model, folder)
    tensors = {name: tensor for name, tensor in load_file(folder / TENSORS).items() if tensor.numel()}
    for name in [name.removesuffix(".pivot_bias") for name in tensors if name.endswith(".pivot_bias")]:
        bias, weight = tensors.pop(f"{name}.pivot_bias"), tensors[f"{name}.left.weight"]
        tensors |= {f"{name}.right.bias": bias, f"{name}.left.bias": tensors[f"{name}.left.bias"] - weight @ bias}
    save_file(tensors, folder / TENSORS)
    record = {key: value for key, value in metadata.items() if key != "probe"}
    (folder / METADATA).write_text(json.dumps(record | {"tensors": hash_tensors(tensors)}))
    assert relative(outputs(load_compressed(folder), batches), outputs(model, batches)) < 1e-6
