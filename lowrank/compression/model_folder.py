"""The files in the folder of a compressed model."""

import json
from pathlib import Path
from typing import Any

from lowrank.io.checks import require

FORMAT = "lowrank.compressed/1"
TENSORS, METADATA, CARD = "model.safetensors", "lowrank.json", "README.md"
FILES = {TENSORS, METADATA, CARD, "config.json", "generation_config.json"}


def save_processor(processor: Any, folder: Path) -> list[str]:
    """Save a processor to an empty folder, and return the names of its files.

    **Arguments**

    - `processor`: a tokenizer, image processor or other object with `save_pretrained`; None saves nothing.
    - `folder`: the empty folder.

    **Raises**

    - `ValueError`: an object without `save_pretrained`, or one that writes a file of the model.
    - `OSError`: a file that cannot be written.
    """
    if processor is None:
        return []
    has_method = hasattr(processor, "save_pretrained")
    require(has_method, "processor", "have the method save_pretrained", type(processor).__name__)
    try:
        processor.save_pretrained(folder)
    except Exception as error:  # tokenizers raises no OSError where a file cannot be written
        raise OSError(f"`processor` could not be saved: {error}") from error
    files = sorted(path.name for path in folder.iterdir())
    own = sorted(FILES & set(files))
    require(not own, "processor", "be a tokenizer or image processor, which writes none of the model's files", own)
    return files


def check_content(folder: Path) -> None:
    """Check that a folder holds nothing that a compressed model may not replace.

    **Arguments**

    - `folder`: where a model is to be saved.

    **Raises**

    - `ValueError`: a file, or a folder with other content.
    """
    require(folder.is_dir() or not folder.exists(), "folder", "be a folder", str(folder))
    content = list(folder.iterdir()) if folder.exists() else []
    known = FILES if folder / METADATA in content else FILES - {CARD}  # a README alone may be of anything
    known = known | _files_of_processor(folder)
    if other := {path.name for path in content if path.name not in known or path.is_dir()}:
        raise ValueError(
            f"`folder` must be new, empty or contain only a compressed model to replace, got {sorted(other)[0]!r} in "
            f"{str(folder)!r}."
        )


def _files_of_processor(folder: Path) -> set[str]:
    """Return the names that the record of a folder has for the files of a processor; none if it is missing or damaged."""
    try:
        files = json.loads((folder / METADATA).read_text(encoding="utf8")).get("files", [])
    except (OSError, ValueError, RecursionError, AttributeError):
        return set()
    return {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()
