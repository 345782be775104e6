"""Files and folders are written whole or not at all, and damaged safetensors files are named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowrank.io.files import open_safetensors, partial_path, writing


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_gets_its_name_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with writing(path) as partial:
        partial.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with writing(str(path)) as partial:
        partial.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert names(path.parent) == {"a.txt"}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with writing(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / name).touch()
    assert names(tmp_path / "folder") == {"new"}
    assert names(tmp_path) == {"folder"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_what_was_there_and_no_more(tmp_path: Path, error: type[BaseException]) -> None:
    (path := tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), writing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (partial_path(tmp_path / "a.txt") / "half").mkdir(parents=True)
    with writing(tmp_path / "a.txt") as partial:
        partial.write_text("whole")
    assert names(tmp_path) == {"a.txt"}


def test_a_block_that_resumes_starts_from_what_the_last_one_wrote(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(ValueError, match="killed"), writing(path, resume=True) as partial:
        partial.mkdir()
        (partial / "half").touch()
        raise ValueError("killed")
    assert not path.exists()
    with writing(path, resume=True) as partial:
        assert names(partial) == {"half"}
    assert names(path) == {"half"}
    assert names(tmp_path) == {"folder"}


def test_a_safetensors_file_is_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"`base` must be a safetensors file, got '.*', which does not exist"):
        open_safetensors(path, "base").__enter__()
    save_file({"x": torch.arange(3)}, path)
    with open_safetensors(path) as file:
        assert file.get_tensor("x").tolist() == [0, 1, 2]
    with (
        pytest.raises(
            ValueError, match="`path` must be a whole safetensors file, got .*: File does not contain tensor y"
        ),
        open_safetensors(path) as file,
    ):
        file.get_tensor("y")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="`base` must be a whole safetensors file"):
        open_safetensors(path, "base").__enter__()


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    (folder := tmp_path / "config.json").mkdir()
    (folder / "kept").write_text("kept")
    with pytest.raises(OSError, match="config.json"), writing(folder) as partial:
        partial.write_text("{}")
    assert (folder / "kept").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
