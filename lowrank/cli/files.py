"""The file that a command writes: its option, and a check before the work starts."""

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
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    require(writable, "--out", "be in a folder that can be written", str(path))
