"""Write and read JSON files that carry the name and version of their format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.io.files import writing
from lowrank.io.schemas import check_schema, read_json


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


def read_record(path: Path | str, format_name: str, schema: Any, writer: str, name: str = "path") -> dict[str, Any]:
    """Read a JSON file of one format.

    **Arguments**

    - `path`: the file.
    - `format_name`: the format with its version that the file must have.
    - `schema`: the fields that the file must have, see `lowrank.io.schemas.check_schema`.
    - `writer`: the function that writes such files, for the message.
    - `name`: the argument to name in errors. Default "path".

    **Returns** the content, the key "format" included.

    **Raises**

    - `FileNotFoundError`: no such file.
    - `ValueError`: the file is not JSON, has another format or version, or has a field that breaks the schema.
    """
    content = read_json(path, name, writer=writer)
    format_read = content.get("format") if isinstance(content, dict) else content
    if format_read != format_name:
        raise ValueError(f"`{name}` must have format {format_name!r}, got {format_read!r} in {str(path)!r}.")
    return check_schema(content, schema, name, path)
