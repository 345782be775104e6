"""Read any data set by name: of the Hub, a folder or a file; texts, chats, images and labels by their columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.hub import load_or_explain, load_splits
from lowrank.tasks.images import IMAGE_COLUMNS, LABEL_COLUMNS

FILES = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # suffix -> reader
TEXT_COLUMNS = ("messages", "text", "sentence", "content")  # the first that a data set has is read


@check_arguments
@dataclass(frozen=True)
class DataSource:
    """Describe the rows of a data set by names.

    **Arguments**

    - `name`: `NAME` or `NAME:CONFIG` on the Hub; a folder of data files; a file that ends in .txt, .json, .jsonl, .csv or
      .parquet.
    - `split`: as `datasets.load_dataset` takes it, such as 'train' or 'train[:1000]'; of several names, the first that the data
      set has. One that has only one split gives that. Default 'train', and 'validation' if there is none.
    - `columns`: the column to read, or two for pairs of sentences. Default none: found by name, see `TEXT_COLUMNS`, or by type.
    - `label`: the column of labels. Default None: found by name.
    - `revision`: branch, tag or commit on the Hub. Default None, the newest.
    """

    name: str
    split: str | Sequence[str] = ("train", "validation")
    columns: Sequence[str] = ()
    label: str | None = None
    revision: str | None = None

    @cached_property
    def rows(self) -> Any:
        """Return the rows, see `read_rows`; they are read once."""
        return read_rows(self)

    def __str__(self) -> str:
        return f"{self.name} ({self.rows.split})"


def read_rows(source: DataSource) -> Any:
    """Return the rows, as a `datasets.Dataset`.

    **Raises**

    - `FileNotFoundError`: no such data set, or it cannot be reached.
    - `ValueError`: a damaged file; an unknown configuration or split; a named column that is missing; no row.
    """
    path, reader = Path(source.name), FILES.get(Path(source.name).suffix)
    asked = source.split if isinstance(source.split, str) else None
    if path.is_file():
        require(reader is not None, "data", f"be a file that ends in one of {list(FILES)}", source.name)
        rows = _read_file(path, str(reader), asked)
    else:
        if reader is not None and not path.exists():
            raise FileNotFoundError(
                f"`data` must be a file, a folder or a data set of the Hub: no file {source.name!r}."
            )
        name, _, config = (source.name, "", "") if path.exists() else source.name.partition(":")
        rows = load_splits(name, config or None, split=asked, revision=source.revision)
    if asked is None:
        names = [*source.split, *(rows if len(rows) == 1 else ())]
        found = next((name for name in names if name in rows), None)
        require(found is not None, "split", f"be named, one of {list(rows)}", None)
        rows = rows[found]
    wanted = [*source.columns, *([source.label] if source.label else [])]
    missing = [name for name in wanted if name not in rows.column_names]
    require(not missing, "data", f"have the columns {wanted}, without {missing}", rows.column_names)
    require(len(rows) > 0, "data", "hold at least one row", f"{source.name!r} without any")
    return rows


def _read_file(path: Path, reader: str, split: str | None) -> Any:
    import datasets  # noqa: PLC0415

    datasets.disable_progress_bars()
    load = lambda: datasets.load_dataset(reader, data_files=str(path), split=split)  # noqa: E731
    return load_or_explain("data set", str(path), load)


def find_text_columns(rows: Any, source: DataSource) -> list[str]:
    """Return the columns of text to read: those that are named, or a usual one, or the only one that holds text.

    **Arguments**

    - `rows`: from `read_rows`.
    - `source`: the names.

    **Raises**

    - `ValueError`: none or several; the message lists the columns.
    """
    usual = [name for name in TEXT_COLUMNS if name in rows.column_names][:1]
    text = [
        name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    found = list(source.columns) or usual or text
    rule = f"have a column of text among {list(TEXT_COLUMNS)}, or just one of text: name yours"
    require(0 < len(found) <= (2 if source.columns else 1), "data", rule, rows.column_names)
    return found


def find_image_column(rows: Any, source: DataSource) -> str:
    """Return the column of images: the one that is named, or a usual one, or the only one that holds images.

    **Arguments**

    - `rows`: from `read_rows`.
    - `source`: the names.

    **Raises**

    - `ValueError`: none or several; the message lists the columns.
    """
    images = [name for name, feature in rows.features.items() if type(feature).__name__ == "Image"]
    usual = [name for name in IMAGE_COLUMNS if name in images][:1]
    found = list(source.columns) or usual or images
    rule = f"have a column of images among {list(IMAGE_COLUMNS)}, or just one of images: name yours"
    require(len(found) == 1 and found[0] in images, "data", rule, rows.column_names)
    return found[0]


def find_label_column(rows: Any, source: DataSource) -> str:
    """Return the column of labels.

    **Arguments**

    - `rows`: from `read_rows`.
    - `source`: the names.

    **Raises**

    - `ValueError`: there is none; the message lists the columns.
    """
    found = source.label or next((name for name in LABEL_COLUMNS if name in rows.column_names), None)
    require(
        found is not None, "data", f"have a column of labels among {list(LABEL_COLUMNS)}: name yours", rows.column_names
    )
    return str(found)


def is_chat(value: Any) -> bool:
    """Return True for a list of messages, each with a role and a content, as chat templates take them."""
    return isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)


def render_chat(messages: Any, tokenizer: Any) -> str:
    """Return a chat as the text that a tokenizer's own template makes of it, special tokens included.

    **Arguments**

    - `messages`: a list of mappings with `role` and `content`.
    - `tokenizer`: of transformers.

    **Raises**

    - `ValueError`: the tokenizer has no template, or its template does not take these messages.
    """
    rule = "have a tokenizer with a chat template to read chats"
    require(getattr(tokenizer, "chat_template", None) is not None, "model", rule, tokenizer.name_or_path)
    known = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return tokenizer.apply_chat_template(known, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise ValueError(
            f"`data` must hold chats that the template of the tokenizer takes, got {known!r:.200}: {error}."
        ) from error
