"""Write and read JSON files that carry the name and version of their format."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowrank.io.checks import require
from lowrank.io.files import writing


def write_record(path: Path | str, format_name: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all; equal content gives equal bytes.

    **Arguments**

    - `path`: the file. Missing parent folders are made.
    - `format_name`: format with version, for example "lowrank.scores/1". It becomes the key "format".
    - `content`: JSON values by name, without NaN or infinity.
    """
    text = json.dumps({"format": format_name} | dict(content), indent=1, sort_keys=True, allow_nan=False)
    with writing(path) as partial:
        partial.write_text(text + "\n", encoding="utf8")


def read_record(path: Path | str, format_name: str, keys: Iterable[str], writer: str) -> dict[str, Any]:
    """Read a JSON file of one format.

    **Arguments**

    - `path`: the file.
    - `format_name`: the format with its version that the file must have.
    - `keys`: keys that the file must have.
    - `writer`: the function that writes such files, for the message.

    **Returns** the content, the key "format" included.

    **Raises**

    - `FileNotFoundError`: no such file.
    - `ValueError`: the file is not JSON, has another format or version, or lacks a key.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a file written by {writer}, got {str(path)!r}, which does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`path` must be whole JSON, got {str(path)!r}: {error}.") from error
    format_read = content.get("format") if isinstance(content, dict) else content
    if format_read != format_name:
        raise ValueError(f"`path` must have format {format_name!r}, got {format_read!r} in {str(path)!r}.")
    for key in keys:
        require(key in content, "path", f"have the key {key!r}", str(path))
    return content
