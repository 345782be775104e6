"""What a file names stays inside its folder; a link is written through."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowrank.io.files import partial_path, path_inside, writing
from lowrank.io.weights import INDEX, open_weights
from lowrank.pi3.tum import tum_frames

OUTSIDE = ["../secret", "/etc/passwd", "inner/../../secret", "link", "folder_link/x", "..", "./../secret"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with links that lead out of it and one that does not, beside a secret."""
    (folder := tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("x")
    (folder.parent / "link").symlink_to(tmp_path / "secret")
    (folder.parent / "folder_link").symlink_to(tmp_path / "other")
    (folder / "a").write_text("a")
    (folder.parent / "own_link").symlink_to(folder / "a")
    return folder.parent


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_outside_are_refused(name, folder) -> None:
    with pytest.raises(ValueError, match=r"`model` must name files inside '.*folder', got '"):
        path_inside(folder, name, "model")


@pytest.mark.parametrize("name", ["inner/a", "inner/../inner/a", "own_link", "missing", "..name"])
def test_names_that_stay_inside_are_paths(name, folder, tmp_path) -> None:
    assert path_inside(folder, name, "model") == folder / name
    (tmp_path / "way").symlink_to(folder)  # the folder itself may be reached by a link
    assert path_inside(tmp_path / "way", name, "model") == tmp_path / "way" / name
    assert path_inside(folder, str(folder / name), "model") == folder / name


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_index_of_shards_names_files_of_its_folder(name, folder) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match="`model` must name files inside"), open_weights(folder, "model"):
        pass


def test_shards_in_the_cache_of_the_hub_are_links(tmp_path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"x": torch.ones(2)}, blobs / "4567")
    (snapshot / "one.safetensors").symlink_to(os.path.relpath(blobs / "4567", snapshot))
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"x": "one.safetensors"}}))
    with open_weights(snapshot, "model") as weights:
        assert weights.shapes == {"x": (2,)}
    (tmp_path / "secret").write_text("secret")
    (snapshot / "two.safetensors").symlink_to(tmp_path / "secret")
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"x": "two.safetensors"}}))
    with pytest.raises(ValueError, match="`model` must name files inside"), open_weights(snapshot, "model"):
        pass


@pytest.mark.parametrize("listed", ["rgb.txt", "depth.txt"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_the_lists_of_a_sequence_name_files_of_it(name, listed, folder) -> None:
    for file in ("rgb.txt", "depth.txt"):
        (folder / file).write_text(f"# time file\n1.0 {name if file == listed else 'inner/a'}\n")
    (folder / "groundtruth.txt").write_text("1.0 0 0 0 0 0 0 1\n")
    with pytest.raises(ValueError, match="`sequence` must name files inside"):
        tum_frames(folder)
    (folder / listed).write_text("1.0 inner/a\n")
    assert [frame.image for frame in tum_frames(folder)] == [folder / "inner" / "a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_points_to_is_written(kind, there, tmp_path) -> None:
    (place := tmp_path / "place").mkdir()
    target, link = place / "target", tmp_path / "link"
    link.symlink_to(target)
    if there:
        target.mkdir() if kind == "folder" else target.write_text("old")
    assert partial_path(link).parent == place
    with writing(link) as partial:
        partial.mkdir() if kind == "folder" else partial.write_text("new")
    assert link.is_symlink()
    assert target.is_dir() if kind == "folder" else target.read_text() == "new"
    with pytest.raises(RuntimeError, match="half"), writing(link) as partial:
        partial.mkdir()
        raise RuntimeError("half")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "place", "target"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path) -> None:
    (tmp_path / "d").mkdir()
    with (
        pytest.raises(IsADirectoryError, match="`path` must be a file or new, got the folder"),
        writing(tmp_path / "d") as p,
    ):
        p.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
