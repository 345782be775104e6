"""JSON files with a format and its version in them: written whole or not at all, and read with errors that say what is wrong."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_record(path: Path | str, form: str, about: Mapping[str, Any]) -> None:
    """Writes a file of a format; the same content gives the same bytes."""
    path = Path(path)
    text = json.dumps({"format": form} | dict(about), indent=1, sort_keys=True, allow_nan=False)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text + "\n", encoding="utf8")
    os.replace(partial, path)


def read_record(path: Path | str, form: str, keys: Iterable[str], writer: str) -> dict[str, Any]:
    """Reads a file of a format. `keys`: that it must have. `writer`: what writes such files, for the error.

    **Raises:** `FileNotFoundError`. `ValueError`: no JSON; another format or version; a key that is missing.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a file written by {writer}, got {str(path)!r}, which does not exist.")
    try:
        about = json.loads(path.read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`path` must be whole JSON, got {str(path)!r}: {error}.") from error
    given = about.get("format") if isinstance(about, dict) else about
    if given != form:
        raise ValueError(f"`path` must have format {form!r}, got {given!r} in {str(path)!r}.")
    if lacking := [key for key in keys if key not in about]:
        raise ValueError(f"`path` must have the key {lacking[0]!r}, got none in {str(path)!r}.")
    return about
