"""Models and data sets by Hub name or local folder, with errors that say what to do when they are missing."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lowrank.io.hashing import hash_options

T = TypeVar("T")


def found(what: str, name: str, load: Callable[[], T]) -> T:
    """`load()`, with every way in which a Hub can lack something turned into one clear error.

    **Raises:** `FileNotFoundError`: names what is missing and the remedy.
    """
    try:
        return load()
    except (OSError, ValueError, RuntimeError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        remedy = (
            "HF_HUB_OFFLINE is set, so it must already be in the cache at HF_HOME: unset it once to download, or point "
            "HF_HOME at a cache that has it"
            if offline
            else "check the name and the network, log in with `hf auth login` if it is gated, or name a local folder"
        )
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise FileNotFoundError(f"{what} {name!r} could not be loaded: {remedy}. ({reason})") from error


def load_splits(path: str, config: str | None = None, **options: Any) -> Any:
    """A data set of the Hub, of its cache or of a folder, as a mapping of splits."""
    import datasets  # noqa: PLC0415

    datasets.disable_progress_bars()
    return found("data set", path, lambda: datasets.load_dataset(path, config, **options))


def load_tokenizer(name: str) -> Any:
    """The fast tokenizer of a model."""
    import transformers  # noqa: PLC0415

    return found("tokenizer", name, lambda: transformers.AutoTokenizer.from_pretrained(name, use_fast=True))


def load_pretrained(auto: str, name: str, **options: Any) -> Any:
    """A transformers model by the name of its Auto class, weights from safetensors only."""
    import transformers  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls = getattr(transformers, auto)
    return found("model", name, lambda: cls.from_pretrained(name, use_safetensors=True, **options))


def revision(name: str) -> str:
    """What pins a model's files: the Hub commit in the cache, or the names, sizes and times of a local folder's files."""
    import huggingface_hub  # noqa: PLC0415

    folder = Path(name)
    if folder.is_dir():
        return hash_options(sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir()))
    config = found("model", name, lambda: huggingface_hub.hf_hub_download(name, "config.json"))
    return Path(config).parent.name  # .../snapshots/<commit>/config.json
