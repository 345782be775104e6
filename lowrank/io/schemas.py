"""Check what a file holds against a schema, one per format, and name the first field that breaks it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

LONGEST = 80  # characters of a value in a message
T = TypeVar("T")


class Schema(BaseModel):
    """Describe a JSON object by its fields; what a class does not name may be there too.

    Types are strict: neither "3" nor true is an int, and numbers are finite.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def one_of(names: Iterable[str]) -> AfterValidator:
    """Return what a field is annotated with, so that its text must be one of some names."""
    known = sorted(names)

    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"be one of {known}")
        return value

    return AfterValidator(check)


def check_schema(content: T, schema: Any, name: str, where: Path | str) -> T:
    """Raise an error that names the first field that breaks a schema.

    **Arguments**

    - `content`: what a file holds.
    - `schema`: a subclass of `Schema`, or a type made of such, for example `dict[str, Row]`.
    - `name`: the argument to name in errors.
    - `where`: the file, for the message.

    **Returns** the content as it was passed.

    **Raises**

    - `ValueError`: "`path` must have an integer at 'layers.0.rank', got '8' in 'scores.json'."
    """
    try:
        TypeAdapter(schema).validate_python(content, strict=True)
    except ValidationError as error:
        raise ValueError(_explain(error, name, where)) from None  # its own text takes many lines
    return content


def _explain(error: ValidationError, name: str, where: Path | str) -> str:
    first = error.errors(include_url=False)[0]
    place, value = ".".join(str(part) for part in first["loc"]), f"{first['input']!r:.{LONGEST}}"
    if first["type"] == "missing":
        owner, _, key = place.rpartition(".")
        return f"`{name}` must have the key {key!r}{f' in {owner!r}' if owner else ''}, got none in {str(where)!r}."
    message = first["msg"].removeprefix("Value error, ").partition(" after validation")[0]
    rule = message.partition(" should ")[2] or message
    return f"`{name}` must {rule}{f' at {place!r}' if place else ''}, got {value} in {str(where)!r}."


def read_file(path: Path | str, name: str, writer: str = "") -> str:
    """Read a text file.

    **Arguments**

    - `path`: the file.
    - `name`: the argument to name in errors.
    - `writer`: the function that writes such files, for the message. Default "": a file from elsewhere.

    **Raises**

    - `FileNotFoundError`: no such file.
    - `ValueError`: the file is no text in UTF-8.
    """
    if not Path(path).is_file():
        by = f" written by {writer}" if writer else ""
        raise FileNotFoundError(f"`{name}` must be a file{by}, got {str(path)!r}, which does not exist or is none.")
    try:
        return Path(path).read_text(encoding="utf8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{name}` must be text in UTF-8, got {str(path)!r}: {error}.") from error


def parse_json(text: str, name: str, where: Path | str, schema: Any = Any) -> Any:
    """Read JSON from a text, and check it against a schema.

    **Arguments**

    - `text`: the JSON.
    - `name`: the argument to name in errors.
    - `where`: the file, for the message.
    - `schema`: see `check_schema`. Default: any JSON value.

    **Raises**

    - `ValueError`: no JSON; a key twice in one object; nested too deeply; a field that breaks the schema.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"`{name}` must be JSON of some levels, got a deeper one in {str(where)!r}.") from None
    except ValueError as error:
        raise ValueError(f"`{name}` must be whole JSON, got {str(where)!r}: {error}.") from error
    return check_schema(content, schema, name, where)


def read_json(path: Path | str, name: str, schema: Any = Any, writer: str = "") -> Any:
    """Read a JSON file, and check it against a schema.

    **Arguments**

    - `path`: the file.
    - `name`: the argument to name in errors.
    - `schema`: see `check_schema`. Default: any JSON value.
    - `writer`: the function that writes such files, for the message. Default "": a file from elsewhere.

    **Raises**

    - `FileNotFoundError`: no such file.
    - `ValueError`: as for `parse_json`; the file is no text in UTF-8.
    """
    return parse_json(read_file(path, name, writer), name, path, schema)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, and refuse a key that comes twice, of which readers keep the last without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return content
