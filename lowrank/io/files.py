"""Write files and folders whole or not at all, and open safetensors files with one form of error."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lowrank.io.checks import require


def partial_path(path: Path | str) -> Path:
    """Return the temporary path beside `path`, or beside what it links to, that `writing` uses."""
    path = _follow(path)
    return path.with_name(f".{path.name}.partial")


@contextmanager
def writing(path: Path | str, *, resume: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block ends.

    A block that fails leaves `path` as it was and no temporary file. A folder replaces an older folder as a whole; a file never
    replaces a folder. A link stays, and what it points to is written.

    **Arguments**

    - `path`: the file or folder to write. Missing parent folders are made.
    - `resume`: keep what a failed block has written, so that the next block continues from it. Default False.

    **Raises**

    - `OSError`: `path` cannot be written, or is a folder where the block wrote a file.
    """
    path, partial = _follow(path), partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        _remove(partial)
    try:
        yield partial
        if path.is_dir():
            if not partial.is_dir():
                raise IsADirectoryError(f"`path` must be a file or new, got the folder {str(path)!r}.")
            shutil.rmtree(path)
        partial.replace(path)
    except BaseException:
        if not resume:
            _remove(partial)
        raise


def _follow(path: Path | str) -> Path:
    """Return where a path leads, if it is a link."""
    path = Path(path)
    return path.resolve() if path.is_symlink() else path


def path_inside(folder: Path, name: str, argument: str, root: Path | None = None) -> Path:
    """Return the path of a file that another file of a folder names, which must not lead out of the folder.

    **Arguments**

    - `folder`: the folder that the name starts from.
    - `name`: as the other file has it; absolute paths, `..` and links may stay inside.
    - `argument`: the argument to name in errors.
    - `root`: the folder to stay in. Default: `folder`.

    **Raises**

    - `ValueError`: the path lies outside.
    """
    path = folder / str(name)
    inside = path.resolve().is_relative_to((root or folder).resolve())
    require(inside, argument, f"name files inside {str(root or folder)!r}", name)
    return path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def open_safetensors(path: Path | str, name: str = "path") -> Iterator[Any]:
    """Open a safetensors file for reading, and turn what goes wrong inside the block into one clear error.

    **Arguments**

    - `path`: the file.
    - `name`: the argument to name in errors. Default "path".

    **Raises**

    - `FileNotFoundError`: no such file.
    - `ValueError`: the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`{name}` must be a safetensors file, got {str(path)!r}, which does not exist.")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"`{name}` must be a whole safetensors file, got {str(path)!r}: {error}.") from error
