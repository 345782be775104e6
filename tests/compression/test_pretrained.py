"""Folders of compressed models and `from_pretrained` of transformers: loaded, saved, trained, and refused if damaged."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from families import ZOO, llama
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank import (
    compress,
    fold,
    load_compressed,
    replace_layers,
    save_compressed,
    split_packed,
    unify_linears,
)
from lowrank.compression.checkpoint import METADATA, TENSORS
from lowrank.compression.configuration import Configuration
from lowrank.compression.quantize import quantize
from lowrank.compression.quantizer import LowRankConfig
from lowrank.factorization.storages import STORAGES
from lowrank.io.dependencies import ROOT
from lowrank.io.hashing import hash_model
from lowrank.io.hub import load_pretrained
from lowrank.lora.adapters import add_adapter
from lowrank.lora.deltas import DeltaSpectrum
from lowrank.lora.rank_config import RankConfig
from lowrank.nn.batches import Batch, compute_logits
from lowrank.nn.targets import find_linears

AUTO = {
    "BERT": "AutoModelForSequenceClassification",
    "BART": "AutoModelForSeq2SeqLM",
    "T5": "AutoModelForSeq2SeqLM",
    "Llama": "AutoModelForCausalLM",
    "Gemma 3": "AutoModelForCausalLM",
    "Mixtral": "AutoModelForCausalLM",
    "GPT-2": "AutoModelForCausalLM",
    "OPT": "AutoModelForCausalLM",
    "CLIP": "AutoModel",
    "Whisper": "AutoModelForSpeechSeq2Seq",
    "ViT": "AutoModelForImageClassification",
}
BATCH = {"input_ids": torch.arange(24).reshape(2, 12)}


def made(family: str, storage: str = "pivoted", split: bool = False) -> tuple[Any, Batch]:
    """A compressed model of a family with random weights, and a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = ZOO[family].build().eval()
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    if family == "GPT-2":
        unify_linears(model)
    if split:
        split_packed(model, [r".*\.c_attn"])
    ranks = dict.fromkeys(find_linears(model), 3)
    first = next(iter(ranks))
    whole = min(model.get_submodule(first).weight.shape)  # the first stays dense
    replace_layers(model, ranks | {first: whole}, Configuration("svd", storage))
    return model, ZOO[family].sample(torch.Generator().manual_seed(1))


def small() -> Any:
    """A compressed Llama with tied embeddings."""
    torch.manual_seed(0)
    model: Any = llama().eval()
    replace_layers(model, dict.fromkeys(find_linears(model), 3), Configuration("svd", "pivoted"))
    return model


@torch.no_grad()
def logits(model: nn.Module, batch: Batch = BATCH) -> torch.Tensor:
    return compute_logits(model, batch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "small"


@pytest.fixture
def saved(folder: Path) -> Path:
    save_compressed(small(), folder)
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- in processes of their own ----------------------------------------------------------------------------------------

FRESH = """
import json, sys
import transformers, lowrank
assert "lowrank.compression.quantizer" not in sys.modules
import torch

for auto, folder, again in json.loads(sys.stdin.read()):
    batch, expected = torch.load(folder + ".pt")
    for place in (folder, again):
        model, about = getattr(transformers, auto).from_pretrained(place, output_loading_info=True)
        assert not any(about.values()), (place, about)
        with torch.no_grad():
            assert torch.equal(model(**batch)[0], expected), place
        if place == folder:
            model.save_pretrained(again, max_shard_size="20KB")
"""
WITHOUT = """
import json, sys
import transformers

cases = json.loads(sys.stdin.read())
for auto, *folders in cases:
    for folder in folders:
        try:
            getattr(transformers, auto).from_pretrained(folder)
        except RuntimeError as error:
            assert "mismatch" in str(error), error
        else:
            raise AssertionError(f"{folder} was loaded")
import lowrank
for auto, *folders in cases[:1]:
    for folder in folders:
        getattr(transformers, auto).from_pretrained(folder)
"""


def run(script: str, cases: Any) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "REPORT" not in done.stderr or script is WITHOUT


def test_a_fresh_process_loads_every_family_and_nothing_loads_it_without_lowrank(tmp_path: Path) -> None:
    """One process with `import transformers, lowrank`, one with transformers alone."""
    cases, built = [], {}
    for family, auto in AUTO.items():
        for storage in STORAGES:
            for split in (False, True) if family == "GPT-2" else (False,):
                model, batch = made(family, storage, split)
                place = str(tmp_path / f"{family} {storage} {split}")
                with torch.no_grad():
                    torch.save((dict(batch), model(**batch)[0]), f"{place}.pt")
                if storage == "factors":
                    model.save_pretrained(place)
                else:
                    save_compressed(model, place)
                cases.append((auto, place, f"{place} again"))
                built[place] = model, batch
    run(FRESH, cases)
    run(WITHOUT, cases[:4])
    for place, (model, batch) in built.items():
        if "pivoted" in place:
            assert torch.equal(logits(load_compressed(f"{place} again"), batch), logits(model, batch)), place


# --- what from_pretrained and save_pretrained offer -------------------------------------------------------------------


def test_placeholders_are_all_that_a_folder_holds_more(saved: Path) -> None:
    stored, loaded = load_file(saved / TENSORS), load_compressed(saved)
    empty = {name for name, tensor in stored.items() if tensor.numel() == 0}
    assert empty == {
        f"{name}.weight" for name, _ in loaded.named_modules() if hasattr(loaded.get_submodule(name), "left")
    }
    assert stored.keys() - empty | {"lm_head.weight"} == loaded.state_dict().keys()


def test_dtype_device_map_and_ties(saved: Path) -> None:
    expected = load_compressed(saved)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    state = model.state_dict()
    assert all(torch.equal(state[name], t.to(state[name])) for name, t in expected.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.float().dtype == torch.float32  # a quantised model would refuse


def test_the_dtype_at_saving_comes_back(folder: Path) -> None:
    model = small().to(torch.bfloat16)
    save_compressed(model, folder)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    loaded.to(torch.bfloat16)  # transformers computes the angles of positions anew, in float32
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", ["BERT", "Llama"])
def test_a_head_is_left_out_or_added(family: str, folder: Path) -> None:
    model, batch = made(family)
    model.save_pretrained(folder)
    body: Any = transformers.AutoModel.from_pretrained(folder)
    assert torch.equal(body(**batch)[0], model.base_model(**batch)[0])
    body.save_pretrained(folder)
    headed: Any = getattr(transformers, AUTO[family]).from_pretrained(folder)
    assert torch.equal(headed.base_model(**batch)[0], model.base_model(**batch)[0])


def test_a_compressed_head_need_not_be_loaded(folder: Path) -> None:
    model, batch = made("BERT")
    replace_layers(model, {"classifier": 1}, "svd")
    save_compressed(model, folder)
    loaded: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    body: Any = transformers.AutoModel.from_pretrained(folder)
    assert torch.equal(body(**batch)[0], model.base_model(**batch)[0])


@pytest.mark.parametrize("kind", ["nested", "factors in 8 bits", "dense in 4 bits"])
def test_every_kind_of_layer_is_loaded_and_saved_again(kind: str, folder: Path, tmp_path: Path) -> None:
    model: Any = llama().eval()
    if kind == "nested":
        compress(model, keep="any", method="svd", progress=False)
    if kind == "factors in 8 bits":
        compress(model, keep=0.5, method="svd", progress=False)
    if kind != "nested":
        quantize(model, 4 if "4" in kind else 8)
    save_compressed(model, folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    for place in (folder, tmp_path / "again"):
        assert torch.equal(logits(load_compressed(place)), logits(model))


def test_folded_models_are_saved_as_dense_ones(folder: Path) -> None:
    model = small()
    model.save_pretrained(folder)
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    fold(model)
    assert getattr(model, "hf_quantizer", None) is None
    model.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(logits(loaded), logits(model))


def test_dequantize_folds(saved: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(saved)
    dense = model.dequantize()
    assert hash_model(dense) == hash_model(fold(load_compressed(saved)))
    save_compressed(dense, saved)
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())


def test_a_dense_model_is_not_marked() -> None:
    model: Any = llama()
    twin = copy.deepcopy(model)
    replace_layers(model, {"model.layers.0.mlp.up_proj": 3}, "svd")
    assert getattr(twin, "hf_quantizer", None) is None
    assert not hasattr(model.config, "quantization_config")


def test_adapters_train_on_the_parts_of_factored_layers(saved: Path, tmp_path: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises(ValueError, match=r"(?s)Target module PivotedLinear.*\(right\): Linear.*\(left\): Linear"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    name, spectrum = "model.layers.0.self_attn.q_proj", DeltaSpectrum((24, 24), torch.ones(3).double(), 3.0, 1.0)
    with pytest.raises(ValueError, match=r"its layers are 'model.*q_proj.left' and 'model.*q_proj.right'"):
        add_adapter(model, RankConfig.from_ranks({name: spectrum}, {name: 2}, {}))
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["left", "right"]))
    before = logits(adapted)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=10.0)
    adapted(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    optimizer.step()
    after = logits(adapted)
    assert not torch.equal(before, after)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh: Any = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")), after)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))


def test_factors_are_trained_as_they_are(saved: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(saved)
    transformers.trainer_utils.validate_quantization_for_training(model)
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models  # noqa: PLC0415

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")


def test_a_processor_is_saved_with_the_model(folder: Path) -> None:
    model = small()
    about = save_compressed(model, folder, processor=tokenizer())
    assert "tokenizer.json" in about["files"]
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == 3
    assert torch.equal(logits(load_compressed(folder)), logits(model))
    save_compressed(model, folder)  # replaces it, with all files that it wrote
    assert not (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("processor", "words"), [(7, "have the method save_pretrained"), (llama().config, "tokenizer or")]
)
def test_what_is_no_processor_is_refused(processor: Any, words: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"`processor` must .*{words}"):
        save_compressed(small(), folder, processor=processor)
    assert not folder.exists()


# --- what is refused --------------------------------------------------------------------------------------------------


def layers_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["layers"]


def change_layer(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: next(iter(layers_of(config).values())).update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_layer(kind="unheard_of"), "have kinds among"),
        (change_layer(rank="3"), "`quantization_config` must .*integer at 'layers.*rank'"),
        (change_layer(rank=None), "have the key 'rank'"),
        (change_layer(rank=10**9), "have a rank of at most its sizes"),
        (change_layer(**{"in": 10**9, "out": 10**9}), "`folder` must describe a model of its"),
        (lambda config: config["quantization_config"].update(format="lowrank.pretrained/9"), "must have format"),
        (lambda config: config["quantization_config"].update(layers=None), "does not say how to build its model"),
        (
            lambda config: layers_of(config).update({"no.such": {"kind": "linear", "in": 1, "out": 1, "bias": True}}),
            "no.such",
        ),
        (lambda config: config.update(num_hidden_layers=10**6), "`folder` must describe a model"),
        (lambda config: config.update(vocab_size=10**10), "`folder` must describe a model"),
    ],
)
def test_a_configuration_that_is_wrong_is_named(change: Any, words: str, saved: Path) -> None:
    edit(saved / "config.json", change)
    with pytest.raises(ValueError, match=words):
        transformers.AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
@pytest.mark.parametrize("damage", ["missing", "shape", "layer"])
def test_no_weight_is_drawn(damage: str, options: dict[str, Any], saved: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    if damage == "layer" and options:
        pytest.skip("to draw the weight is what this option asks for")
    tensors = load_file(saved / TENSORS)
    if damage == "missing":
        del tensors[f"{name}.left.weight"]
    elif damage == "shape":
        tensors[f"{name}.left.weight"] = tensors[f"{name}.left.weight"][:-1].contiguous()
    else:
        edit(saved / "config.json", lambda config: layers_of(config).pop(name))
    save_file(tensors, saved / TENSORS, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"have the tensors of all recorded|ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(saved, **options)


@pytest.mark.parametrize("values", [[0, 0, 1], [0, 1, 99], [-1, 1, 2]])
def test_pivots_are_distinct_rows(values: list[int], saved: Path) -> None:
    tensors = load_file(saved / TENSORS)
    tensors["model.layers.0.mlp.up_proj.pivots"] = torch.tensor(values)
    save_file(tensors, saved / TENSORS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="`pivots` must be 3 distinct rows of 40"):
        transformers.AutoModelForCausalLM.from_pretrained(saved)


def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(load_file(saved / TENSORS), saved / "pytorch_model.bin")
    (saved / TENSORS).unlink()
    monkeypatch.setattr(torch, "load", pytest.fail)
    with pytest.raises(ValueError, match="`folder` must hold its weights in safetensors files"):
        transformers.AutoModelForCausalLM.from_pretrained(saved)


def test_a_dense_model_is_not_compressed_at_loading(folder: Path) -> None:
    llama().save_pretrained(folder)
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=LowRankConfig({}))


def test_a_model_of_unknown_architecture_asks_for_it(folder: Path) -> None:
    model = small()
    model.model.layers[1].mlp = nn.Sequential(nn.Linear(24, 24))  # no configuration builds this
    about = save_compressed(model, folder)
    assert about["base"] is None
    with pytest.raises(ValueError, match=r"lowrank.load_compressed\(folder, architecture=...\)"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    dense = llama()
    dense.model.layers[1].mlp = nn.Sequential(nn.Linear(24, 24))
    assert torch.equal(logits(load_compressed(folder, architecture=dense)), logits(model))


def test_adapters_are_merged_before_saving(folder: Path) -> None:
    adapted: Any = peft.get_peft_model(small(), peft.LoraConfig(r=2, target_modules=["left"]))
    with pytest.raises(ValueError, match="merge them first"):
        adapted.base_model.model.save_pretrained(folder)


@pytest.mark.parametrize("name", [None, "LlamaConfig", "pipeline"])
def test_only_model_classes_are_built_from_their_names(name: str | None, folder: Path) -> None:
    small().save_pretrained(folder)
    edit(folder / "config.json", lambda config: config.update(architectures=[name]))
    with pytest.raises(ValueError, match="`folder` must name a model class of transformers in its config.json"):
        load_compressed(folder)


def test_folders_of_earlier_versions_load_as_before(saved: Path) -> None:
    expected = logits(load_compressed(saved))
    stored = load_file(saved / TENSORS)
    save_file({name: t for name, t in stored.items() if t.numel()}, saved / TENSORS, metadata={"format": "pt"})
    edit(saved / "config.json", lambda config: config.pop("quantization_config"))
    edit(saved / METADATA, lambda about: about.pop("files"))
    assert torch.equal(logits(load_compressed(saved)), expected)


def test_our_own_loader_of_tasks_reads_such_folders(saved: Path) -> None:
    assert torch.equal(logits(load_pretrained("AutoModelForCausalLM", str(saved))), logits(load_compressed(saved)))
