"""Compressed models on the Hub, here one on 127.0.0.1: pushed whole, loaded at a commit, refused in one line."""

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import OTHERS, FakeHub, serve
from families import compressed, outputs
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from lowrank.compression.card import PLACE
from lowrank.compression.checkpoint import load_compressed, save_compressed
from lowrank.compression.model_folder import CARD, METADATA, TENSORS
from lowrank.compression.push import push_compressed

REPO = "someone/small"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub, an empty cache and a token."""
    with serve() as hub:
        at = {"ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}
        for name, value in at.items():
            monkeypatch.setattr(constants, name, value)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "a-token")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    save_compressed(compressed("bert", "pivoted")[0], folder)
    return folder


def test_a_model_comes_back_from_the_hub_at_its_commit(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    pushed = push_compressed(folder, REPO)
    assert pushed == {
        "repo": REPO,
        "url": f"{hub.url}/{REPO}/commit/{pushed['revision']}",
        "revision": pushed["revision"],
    }
    other, batches = compressed("bert", "factors")
    save_compressed(other, tmp_path / "other")
    assert push_compressed(tmp_path / "other", REPO, message="Another")["revision"] != pushed["revision"]
    first, newest = load_compressed(REPO, revision=pushed["revision"]), load_compressed(REPO)
    assert torch.equal(outputs(first, batches), outputs(load_compressed(folder), batches))
    assert torch.equal(outputs(newest, batches), outputs(other, batches))
    asked = len(hub.requests)
    load_compressed(REPO, revision=pushed["revision"])
    assert len(hub.requests) == asked  # a commit in the cache needs no network


def test_a_commit_holds_the_files_of_the_folder_and_no_others(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "notes.txt").write_text("of an older version")
    (copy / ".hidden").write_text("a secret")
    push_compressed(copy, REPO, private=True)
    assert hub.private[REPO]
    files = {path.name: path.read_bytes() for path in copy.iterdir() if path.name != ".hidden"}
    held = dict(hub.commits[REPO][-1][1])
    assert held.pop(".gitattributes") == b""
    assert held.pop(CARD) == files.pop(CARD).replace(PLACE.encode(), REPO.encode())
    assert f'load_compressed("{REPO}")' in hub.commits[REPO][-1][1][CARD].decode()
    assert held == files
    (copy / "notes.txt").unlink()
    (copy / CARD).unlink()  # the record suffices to write it again
    push_compressed(copy, REPO)
    assert hub.commits[REPO][-1][1].keys() == held.keys() - {"notes.txt"} | {".gitattributes", CARD}
    assert f'load_compressed("{REPO}")' in hub.commits[REPO][-1][1][CARD].decode()


def test_what_is_no_whole_model_is_not_sent(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`folder` must be a file written by save_compressed"):
        push_compressed(tmp_path / "nowhere", REPO)
    for damage, words in {
        METADATA: "`folder` must be whole JSON",
        TENSORS: "`folder` must be a whole safetensors file",
    }.items():
        copy = shutil.copytree(folder, tmp_path / damage)
        (copy / damage).write_bytes((copy / damage).read_bytes()[:-10])
        with pytest.raises(ValueError, match=words):
            push_compressed(copy, REPO)
    copy = shutil.copytree(folder, tmp_path / "changed")
    tensors = load_file(copy / TENSORS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / TENSORS)
    with pytest.raises(ValueError, match=f"`folder` must have the tensors that its {METADATA} was written for"):
        push_compressed(copy, REPO)
    copy = shutil.copytree(folder, tmp_path / "without")
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"`folder` must have the config.json of its model"):
        push_compressed(copy, REPO)
    with pytest.raises(ValueError, match="`repo` must be a name on the Hub like 'user/name', got 'small'"):
        push_compressed(folder, "small")
    assert hub.requests == []


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_push_that_is_refused_says_so_in_one_line(hub: FakeHub, folder: Path, monkeypatch) -> None:
    with pytest.raises(PermissionError, match="`repo` must be a repository that your token may write to") as refused:
        push_compressed(folder, f"{OTHERS}/small")
    assert f"{OTHERS}/small" in one_line(refused)
    monkeypatch.setenv("HF_TOKEN", "another-token")
    with pytest.raises(PermissionError, match="`repo` must be a repository that your token may write to"):
        push_compressed(folder, REPO)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="needs a token that may write: run `hf auth login`, or set HF_TOKEN"):
        push_compressed(folder, REPO)
    assert hub.commits == {}


def test_without_a_network_each_way_ends_in_one_line(hub: FakeHub, folder: Path, monkeypatch) -> None:
    with socket.socket() as closed:  # a port that nobody listens on
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    with pytest.raises(ConnectionError, match=f"'{REPO}' could not be written: the Hub cannot be reached") as pushed:
        push_compressed(folder, REPO)
    assert one_line(pushed)
    start = time.monotonic()
    for revision in (None, 40 * "a"):
        with pytest.raises(
            FileNotFoundError, match=f"'{REPO}' could not be loaded: the Hub cannot be reached"
        ) as loaded:
            load_compressed(REPO, revision=revision)
        assert one_line(loaded)
    assert time.monotonic() - start < 5  # at once, without trying again


def test_a_model_or_revision_that_the_hub_has_not_is_named(hub: FakeHub, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model 'someone/none' could not be loaded: check the name") as absent:
        load_compressed("someone/none")
    push_compressed(folder, REPO)
    with pytest.raises(FileNotFoundError, match=f"model '{REPO}' could not be loaded.*no-such-tag") as unknown:
        load_compressed(REPO, revision="no-such-tag")
    assert one_line(absent)
    assert one_line(unknown)
    with pytest.raises(ValueError, match="`revision` must be None for the local folder"):
        load_compressed(folder, revision="main")


def test_a_folder_that_has_the_name_of_a_repository_is_taken_first(
    hub: FakeHub, folder: Path, tmp_path, monkeypatch
) -> None:
    shutil.copytree(folder, tmp_path / REPO)
    monkeypatch.chdir(tmp_path)
    assert load_compressed(REPO) is not None
    assert hub.requests == []
    assert huggingface_hub.get_token() == "a-token"
