"""Folders of strangers: none of their code runs, none of their names leads outside, none of their numbers fills the memory."""

import builtins
import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import bert, compressed, llama
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig

from lowrank.compression.bases import find_options
from lowrank.compression.checkpoint import METADATA, TENSORS, load_compressed, save_compressed
from lowrank.compression.replace import replace_layers
from lowrank.io.hub import load_pretrained, load_tokenizer
from lowrank.nn.targets import find_linears
from lowrank.selection.layer_sizes import layer_sizes
from lowrank.selection.scoring import layer_scores


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "stranger"


@pytest.fixture(autouse=True)
def nothing_is_asked_or_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked, or unpickled")

    monkeypatch.setattr(builtins, "input", refuse)
    monkeypatch.setattr(torch, "load", refuse)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def with_code(folder: Path, model_type: str) -> Path:
    """Put Python into a folder, and name it wherever transformers looks for code."""
    mark = folder.parent / "ran"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nConfig = Model = Tokenizer = object\n")
    classes = {name: f"code.{name.removeprefix('Auto')[:6].replace('ForSeq', '')}" for name in ("AutoConfig",)}
    classes |= {"AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}
    edit(folder / "config.json", lambda config: config.update(auto_map=classes, model_type=model_type))
    about = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return mark


@pytest.mark.parametrize("model_type", ["unheard_of", "llama"])
def test_no_code_of_a_folder_runs(model_type, folder, tmp_path) -> None:
    save_compressed(compressed("llama")[0], folder)
    mark = with_code(folder, model_type)
    edit(folder / "config.json", lambda config: config.update(architectures=["LlamaForCausalLM"]))
    other = {"unheard_of": pytest.raises(ValueError, match=r"`folder` must contain a config.json of a model that")}
    if model_type in other:
        with other[model_type]:
            load_compressed(folder)
        with pytest.raises(ValueError, match="model .* could not be loaded: .*trust_remote_code"):
            load_pretrained("AutoModelForCausalLM", str(folder))
    else:
        load_compressed(folder)
    with pytest.raises((ValueError, FileNotFoundError), match="tokenizer .* could not be loaded: "):
        load_tokenizer(str(folder))
    assert len(layer_sizes(folder, [".*proj.*"])) > 0
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({"layers.0.q.weight": torch.randn(40, 60)}, plain / TENSORS)
    (plain / "config.json").write_text((folder / "config.json").read_text())
    (plain / "code.py").write_text((folder / "code.py").read_text())
    assert layer_scores(plain).names == ["layers.0.q"]
    assert not mark.exists()


def write_architectures(folder: Path, names: Any) -> None:
    """Write one weight, and a configuration with the given names of classes."""
    folder.mkdir()
    LlamaConfig(num_hidden_layers=1).save_pretrained(folder)
    edit(folder / "config.json", lambda config: config.update(architectures=names))
    save_file({"layers.0.q.weight": torch.ones(9, 8)}, folder / TENSORS)


@pytest.mark.parametrize("name", ["set_seed", "pipeline", "TrainingArguments", "LlamaConfig", "AutoModel"])
def test_architectures_name_model_classes_alone(name, folder) -> None:
    write_architectures(folder, [name])
    assert layer_sizes(folder) == {"layers.0.q": (9, 8)}


@pytest.mark.parametrize("name", [7, None, ["x"]])
def test_architectures_that_are_no_names_are_refused(name, folder) -> None:
    write_architectures(folder, [name])
    words = rf"`model` must .* string at 'architectures.0', got {re.escape(repr(name))} in .*config.json"
    with pytest.raises(ValueError, match=words):
        layer_sizes(folder)


FACTORY = ["checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "scriptable"]


@pytest.mark.parametrize("option", [*FACTORY, "pretrained_strict", "kwargs_filter", "device", "no_such"])
def test_options_of_timm_are_those_of_the_architecture(option, folder) -> None:
    model = timm.create_model("test_resnet", num_classes=3).eval()
    save_compressed(model, folder)
    edit(folder / METADATA, lambda about: about["base"]["options"].update({option: str(folder / "other.pth")}))
    words = rf"`base` must have options of the architecture 'test_resnet' alone, got \['{option}'\]"
    with pytest.raises(ValueError, match=words):
        load_compressed(folder)
    with pytest.raises(ValueError, match=words):
        save_compressed(model, folder, {"timm": "test_resnet", "options": {option: "x"}})


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_no_architecture_of_timm_takes_options_of_the_factory(name) -> None:
    options = find_options(name)
    assert "num_classes" in options
    assert not options & {*FACTORY, "model_name", "variant", "file", "path"}


def test_values_that_an_option_cannot_have_are_named(folder) -> None:
    save_compressed(timm.create_model("test_vit", num_classes=3).eval(), folder)
    for value in ("x", [1], {"a": 1}, -1):
        edit(folder / METADATA, lambda about, value=value: about["base"]["options"].update(num_heads=value))
        with pytest.raises(ValueError, match="`(base|folder|model)` must"):
            load_compressed(folder)


HUGE = 10**6


@pytest.mark.parametrize(
    ("make", "file", "change"),
    [
        (bert, "config.json", lambda c: c.update(num_hidden_layers=HUGE)),
        (bert, "config.json", lambda c: c.update(vocab_size=10**10)),
        (bert, "config.json", lambda c: c.update(hidden_size=2 * HUGE)),
        (bert, "config.json", lambda c: c.update(max_position_embeddings=10**10)),
        (llama, "config.json", lambda c: c.update(intermediate_size=10**10)),
        (lambda: timm.create_model("test_vit"), METADATA, lambda c: c["base"]["options"].update(embed_dim=2 * HUGE)),
        (lambda: timm.create_model("test_vit"), METADATA, lambda c: c["base"]["options"].update(depth=HUGE)),
        (lambda: timm.create_model("test_vit"), METADATA, lambda c: c["base"]["options"].update(img_size=HUGE)),
        (llama, METADATA, lambda c: [row.update(rank=HUGE) for row in c["layers"].values()]),
        (llama, METADATA, lambda c: [row.update({"in": HUGE, "out": HUGE}) for row in c["layers"].values()]),
        (llama, METADATA, lambda c: [row.update(kind="usv", rank=HUGE) for row in c["layers"].values()]),
        (llama, METADATA, lambda c: c["probe"]["inputs"]["input_ids"].update(shape=[HUGE, HUGE])),
    ],
)
def test_numbers_are_compared_with_the_file_before_memory_is_taken(make, file, change, folder) -> None:
    model = make().eval()
    replace_layers(model, dict.fromkeys(list(find_linears(model))[:2], 3), "svd")
    save_compressed(model, folder)
    edit(folder / file, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="`(base|folder|model)` must"):
        load_compressed(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_buffers_that_no_file_holds_are_bounded_too(folder, monkeypatch) -> None:
    save_compressed(compressed("bert")[0], folder)
    monkeypatch.setattr("lowrank.compression.rebuild.SPARE", -(10**9))
    with pytest.raises(ValueError, match="`folder` must need at most -.* elements for buffers that no file holds"):
        load_compressed(folder)


# --- what saving may touch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [METADATA, TENSORS, "config.json", "generation_config.json"])
def test_folders_with_the_names_of_files_are_left_alone(name, folder) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "precious.txt").write_text("x")
    with pytest.raises(
        ValueError, match=f"`folder` must be new, empty or contain only a compressed model.*got '{name}'"
    ):
        save_compressed(nn.Linear(3, 3), folder)
    assert (folder / name / "precious.txt").read_text() == "x"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_file_in_the_place_of_the_folder_is_named(folder) -> None:
    folder.write_text("x")
    with pytest.raises(ValueError, match="`folder` must be a folder"):
        save_compressed(nn.Linear(3, 3), folder)


@pytest.mark.parametrize("target", ["nothing", "an empty folder", "a model"])
def test_a_link_is_saved_through(target, folder, tmp_path) -> None:
    real = tmp_path / "elsewhere" / "real"
    real.parent.mkdir()
    if target == "an empty folder":
        real.mkdir()
    model = nn.Sequential(nn.Linear(3, 3))
    if target == "a model":
        save_compressed(nn.Sequential(nn.Linear(5, 5)), real)
    folder.symlink_to(real)
    save_compressed(model, folder)
    assert folder.is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name.startswith(".")) == []
    x = torch.randn(2, 3)
    assert torch.equal(load_compressed(folder, architecture=nn.Sequential(nn.Linear(3, 3)))(x), model(x))
