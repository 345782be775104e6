"""Cached results: built once, whole or not there, checked when read; damage is named and mended."""

from pathlib import Path

import pytest
from processes import run_mounted

from lowrank.io import cache as module
from lowrank.io.cache import HASHES, find_damage, load_or_build

FILES = {"model.bin": b"weights", "about/training.json": b"{}"}


class Builder:
    """Writes FILES, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        for name, content in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def entry(build: Builder, kind: str = "things") -> Path:
    return load_or_build(kind, {"number": 1}, Path(module.__file__), build)


def content(folder: Path) -> dict[str, bytes]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {HASHES}
    return {name: (folder / name).read_bytes() for name in names}


def flipped(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


DAMAGES = {
    "a flipped bit": ("model.bin", lambda folder: flipped(folder / "model.bin")),
    "a cut file": ("about/training.json", lambda folder: (folder / "about/training.json").write_bytes(b"{")),
    "an empty file": ("model.bin", lambda folder: (folder / "model.bin").write_bytes(b"")),
    "a lost file": ("model.bin", lambda folder: (folder / "model.bin").unlink()),
    "a foreign file": ("more.bin", lambda folder: (folder / "more.bin").write_bytes(b"")),
    "lost hashes": (HASHES, lambda folder: (folder / HASHES).unlink()),
    "cut hashes": (HASHES, lambda folder: (folder / HASHES).write_text("{")),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_result_is_named_and_built_again(cache: Path, kind: str) -> None:
    (name, spoil), build = DAMAGES[kind], Builder()
    folder = entry(build)
    assert find_damage(folder) is None
    spoil(folder)
    assert find_damage(folder) == name
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert entry(build) == folder
    assert (
        str(caught[0].message) == f"{folder} is damaged ({name} differs from the file that was built): rebuilding it."
    )
    assert build.calls == 2
    assert content(folder) == FILES
    assert entry(build) == folder  # without a warning, which would be an error
    assert build.calls == 2


def test_a_build_that_fails_leaves_what_it_has_to_the_next_one_and_no_result(cache: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "checkpoint").write_text("half")
        raise RuntimeError("killed")

    def resumed(folder: Path) -> None:
        assert (folder / "checkpoint").read_text() == "half"
        (folder / "checkpoint").rename(folder / "result")

    with pytest.raises(RuntimeError, match="killed"):
        load_or_build("things", {"number": 1}, Path(module.__file__), half)
    folder = load_or_build("things", {"number": 1}, Path(module.__file__), resumed)
    assert content(folder) == {"result": b"half"}
    assert find_damage(folder) is None


READ = """
import sys
from pathlib import Path
from lowrank.io import cache

def build(folder):
    print("built", end=" ")
    (folder / "result").write_text("and read")

try:
    print((cache.load_or_build(sys.argv[1], {"number": 1}, Path(cache.__file__), build) / "result").read_text())
except OSError as error:
    sys.exit(f"error: {error}")
"""


def test_what_a_cache_holds_is_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    (script := tmp_path / "read.py").write_text(READ)
    (folder := tmp_path / "cache").mkdir()
    commands = f"""
        mount -t tmpfs tmpfs {folder}
        python {script} things
        mount -o remount,ro {folder}
        python {script} things
        python {script} others
    """
    done = run_mounted(commands, LOWRANK_CACHE=str(folder))
    assert done.returncode == 1
    assert done.stdout == "built and read\nand read\n"
    assert done.stderr.startswith(f"error: `LOWRANK_CACHE` must be a writable folder, or have {folder}/others/")
    assert "Read-only file system" in done.stderr


def test_a_full_disk_leaves_no_result_and_loses_none(tmp_path: Path) -> None:
    (script := tmp_path / "read.py").write_text(
        READ.replace('"and read"', '"and read" + " " * 200_000 * (sys.argv[1] == "large")')
    )
    (folder := tmp_path / "cache").mkdir()
    commands = f"""
        mount -t tmpfs -o size=100k tmpfs {folder}
        python {script} small
        python {script} large || ls -A {folder}/large | grep -c partial
        python {script} small
    """
    done = run_mounted(commands, LOWRANK_CACHE=str(folder))
    assert done.returncode == 0
    assert done.stdout.split("\n") == ["built and read", "built 1", "and read", ""]
    assert "error: [Errno 28] No space left on device" in done.stderr
