"""The file or folder that a command writes: checks before the work starts, and the option for a file."""

import argparse
import os
from pathlib import Path

from lowrank.io.checks import require


def add_file(parser: argparse.ArgumentParser, example: str) -> None:
    """Add `--out`, the file that the command writes.

    **Arguments**

    - `parser`: of the command.
    - `example`: name of such a file, for the help.
    """
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"file to write, such as {example}")


def check_file(path: Path) -> None:
    """Check that a file can be written: a command that works for an hour should not find out at its end.

    **Arguments**

    - `path`: the file. Its folder may be new.

    **Raises**

    - `ValueError`: it is a folder, or its folder cannot be written or made.
    """
    require(not path.is_dir(), "--out", "be a file, not a folder", str(path))
    _check_parent(path)


def check_folder(path: Path) -> None:
    """Check that a folder can be written, before the work starts.

    **Arguments**

    - `path`: the folder, new or empty.

    **Raises**

    - `ValueError`: it has files, is a file, or cannot be written or made.
    """
    empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    require(empty, "--out", "be a new or empty folder", str(path))
    _check_parent(path)


def _check_parent(path: Path) -> None:
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    require(writable, "--out", "be in a folder that can be written", str(path))
