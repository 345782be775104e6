"""Weights of π³ from files: what is stored is what is loaded, and damage is named. Compressed models come back as they were."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from pi3_models import TINY, images, model
from safetensors.torch import save_file
from torch import Tensor

from lowrank.compression.checkpoint import load_compressed, save_compressed
from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import replace_layers
from lowrank.pi3.checkpoint import METADATA_FILE, OFFICIAL, PRETRAINED, WEIGHTS_FILE, load_pi3
from lowrank.pi3.model import Pi3, Pi3Config
from lowrank.pi3.speed import published_ranks

CONFIG = Pi3Config(**TINY)


def written(made: Pi3, path: Path) -> Path:
    save_file(made.state_dict(), path)
    return path


def outputs(made: torch.nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return made(images(1, 2, 3, 16, 24))


def assert_same(made: torch.nn.Module, other: torch.nn.Module) -> None:
    one, two = outputs(made), outputs(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "folder", "text"])
def test_a_model_comes_back_from_a_file_and_from_a_folder(form: str, tmp_path: Path) -> None:
    made = model()
    path = written(made, tmp_path / WEIGHTS_FILE)
    loaded = load_pi3({"file": path, "folder": tmp_path, "text": str(path)}[form], CONFIG)
    assert loaded.config == CONFIG
    assert not any(module.training for module in loaded.modules())
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    assert list(loaded.state_dict()) == list(made.state_dict())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(buffer.requires_grad for buffer in loaded.buffers())
    assert_same(loaded, made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_become_single(dtype: torch.dtype, tmp_path: Path) -> None:
    made = model().to(dtype)
    loaded = load_pi3(written(made, tmp_path / "own.safetensors"), CONFIG)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert_same(loaded, made.float())


def test_a_loaded_model_does_not_change_with_its_file(tmp_path: Path) -> None:
    path = written(model(0), tmp_path / WEIGHTS_FILE)
    other = written(model(1), tmp_path / "other.safetensors").read_bytes()
    loaded = load_pi3(path, CONFIG)
    with path.open("r+b") as file:  # in place, as a copy over it would
        file.write(other)
    assert_same(loaded, model(0))
    assert_same(load_pi3(path, CONFIG), model(1))


def test_sizes_are_read_beside_the_weights(tmp_path: Path) -> None:
    written(model(), tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="`source` must hold the tensors of this configuration"):
        load_pi3(tmp_path)  # the published sizes
    (tmp_path / METADATA_FILE).write_text(json.dumps({"config": asdict(CONFIG)}), encoding="utf8")
    assert load_pi3(tmp_path).config == CONFIG
    with pytest.raises(ValueError, match="`source` must hold the tensors of this configuration"):
        load_pi3(tmp_path, Pi3Config())  # what is given goes first


def test_the_small_model_is_the_one_that_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(model(), tmp_path / WEIGHTS_FILE)
    (tmp_path / METADATA_FILE).write_text(json.dumps({"config": asdict(CONFIG)}), encoding="utf8")
    monkeypatch.setattr("lowrank.pi3.checkpoint.PRETRAINED", tmp_path)
    assert_same(load_pi3("small"), model())


@pytest.mark.skipif(
    not (PRETRAINED / WEIGHTS_FILE).exists(), reason="python -m lowrank.pi3.pretrain has not written its weights"
)
def test_the_small_model_loads_as_it_was_trained() -> None:
    loaded = load_pi3("small")
    assert asdict(loaded.config) == json.loads((PRETRAINED / METADATA_FILE).read_text(encoding="utf8"))["config"]
    side = 2 * loaded.config.patch_size
    with torch.no_grad():
        found = loaded(images(1, 2, 3, side, side))
    assert all(bool(value.isfinite().all()) for value in found.values())


def test_a_name_of_the_hub_is_looked_up_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = written(model(), tmp_path / "blob.safetensors"), []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: asked.append(names) or str(path))
    assert_same(load_pi3("someone/model", CONFIG), model())
    load_pi3(config=CONFIG)
    assert asked == [("someone/model", "model.safetensors"), (OFFICIAL, "model.safetensors")]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_file_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source, name in ((tmp_path / "none.safetensors", "none.safetensors"), (tmp_path, WEIGHTS_FILE)):
        with pytest.raises(
            FileNotFoundError, match=rf"`source` must be a checkpoint.*, got .*{name}'?, which does not exist"
        ):
            load_pi3(source, CONFIG)

    def absent(*_: str) -> str:
        raise OSError("404: no such repository")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    with pytest.raises(
        FileNotFoundError, match=r"model 'someone/nothing' could not be loaded: .*404: no such repository"
    ):
        load_pi3("someone/nothing", CONFIG)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:20],
        lambda content: content[:4],
        lambda content: b"",
        lambda content: b"<html>not found</html>" * 20,
    ],
    ids=["last byte", "half", "header", "length", "empty", "a web page"],
)
def test_a_damaged_file_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = written(model(), tmp_path / "own.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"`source` must be a whole safetensors file, got '.*own\.safetensors': "):
        load_pi3(path, CONFIG)


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["decoder.0.attn.proj.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["decoder.0.attn.extra"] = torch.zeros(2)


def shorten(tensors: dict[str, Tensor]) -> None:
    tensors["camera_head.fc_t.bias"] = torch.zeros(4)


def transpose(tensors: dict[str, Tensor]) -> None:
    tensors["conf_decoder.projects.weight"] = tensors["conf_decoder.projects.weight"].T.contiguous()


def without_buffer(tensors: dict[str, Tensor]) -> None:
    del tensors["image_std"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, "decoder.0.attn.proj.weight must be (32, 32), got none in"),
        (add, "decoder.0.attn.extra must be absent, got (2,) in"),
        (shorten, "camera_head.fc_t.bias must be (3,), got (4,) in"),
        (transpose, "conf_decoder.projects.weight must be (24, 64), got (64, 24) in"),
        (without_buffer, "image_std must be (1, 3, 1, 1), got none in"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change: Callable[..., None], words: str, tmp_path: Path) -> None:
    tensors = dict(model().state_dict())
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=re.escape(f"`source` must hold the tensors of this configuration: {words}")):
        load_pi3(tmp_path, CONFIG)


def test_weights_of_other_sizes_are_refused(tmp_path: Path) -> None:
    path = written(model(), tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"decoder\.4\.attn\.k_norm\.bias must be \(16,\), got none"):
        load_pi3(path, Pi3Config(**TINY | {"decoder_depth": 6}))
    with pytest.raises(ValueError, match=r"decoder\.2\.attn\.k_norm\.bias must be absent, got \(16,\)"):
        load_pi3(path, Pi3Config(**TINY | {"decoder_depth": 2}))


# --- compressed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("targets", ["decoder", "all linears"])
def test_a_compressed_model_comes_back_as_it_was(targets: str, storage: str, tmp_path: Path) -> None:
    made = model()
    replace_layers(made, published_ranks(made, targets, 0.5, storage), Configuration("svd", storage))
    about = save_compressed(made, tmp_path / "compressed")
    assert about["parameters"] < sum(tensor.numel() for tensor in model().state_dict().values())
    loaded = load_compressed(tmp_path / "compressed", architecture=model(1))  # whose weights do not matter
    assert isinstance(loaded, Pi3)
    assert_same(loaded, made)
    assert list(loaded.state_dict()) == list(made.state_dict())


def test_a_compressed_model_of_loaded_weights_comes_back_too(tmp_path: Path) -> None:
    """Down to the file: weights are loaded, compressed, stored and loaded, with no dense weight at hand."""
    made = load_pi3(written(model(), tmp_path / "dense.safetensors"), CONFIG)
    replace_layers(made, published_ranks(made, "decoder", 0.3), "svd")
    save_compressed(made, tmp_path / "compressed")
    (tmp_path / "dense.safetensors").unlink()
    with torch.device("meta"):
        empty = Pi3(CONFIG)
    assert_same(load_compressed(tmp_path / "compressed", architecture=empty), made)
