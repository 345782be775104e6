"""Load models, tokenizers and data sets by Hub name or from a local folder, with errors that name the remedy."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lowrank.io.hashing import hash_options

T = TypeVar("T")


def load_or_explain(kind: str, name: str, load: Callable[[], T]) -> T:
    """Call `load` and turn each error of the Hub into one that names the missing thing and the remedy.

    **Arguments**

    - `kind`: the kind of thing, for the message: "model", "data set".
    - `name`: its Hub name or folder, for the message.
    - `load`: function without arguments that loads it.

    **Returns** the result of `load`.

    **Raises**

    - `FileNotFoundError`: `load` raised an `OSError`, a `ValueError` or a `RuntimeError`.
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
        raise FileNotFoundError(f"{kind} {name!r} could not be loaded: {remedy}. ({reason})") from error


def load_splits(path: str, config: str | None = None, **options: Any) -> Any:
    """Load a data set as a mapping of splits.

    **Arguments**

    - `path`: its Hub name or a local folder.
    - `config`: the configuration of a data set that has several. Default None.
    - `options`: passed on to `datasets.load_dataset`.

    **Raises**

    - `FileNotFoundError`: see `load_or_explain`.
    """
    import datasets  # noqa: PLC0415

    datasets.disable_progress_bars()
    return load_or_explain("data set", path, lambda: datasets.load_dataset(path, config, **options))


def load_tokenizer(name: str) -> Any:
    """Load the fast tokenizer of a model by Hub name or from a local folder."""
    import transformers  # noqa: PLC0415

    load = lambda: transformers.AutoTokenizer.from_pretrained(name, use_fast=True)  # noqa: E731
    return load_or_explain("tokenizer", name, load)


def load_pretrained(auto: str, name: str, **options: Any) -> Any:
    """Load a transformers model with weights from safetensors only.

    **Arguments**

    - `auto`: name of its Auto class, for example "AutoModelForCausalLM".
    - `name`: its Hub name or a local folder.
    - `options`: passed on to `from_pretrained`.

    **Raises**

    - `FileNotFoundError`: see `load_or_explain`.
    """
    import transformers  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls = getattr(transformers, auto)
    return load_or_explain("model", name, lambda: cls.from_pretrained(name, use_safetensors=True, **options))


def revision(name: str) -> str:
    """Return a string that changes with the files of a model.

    For a Hub name it is the commit in the cache, for a local folder a hash of names, sizes and times of its files.
    """
    import huggingface_hub  # noqa: PLC0415

    folder = Path(name)
    if folder.is_dir():
        return hash_options(sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir()))
    config = load_or_explain("model", name, lambda: huggingface_hub.hf_hub_download(name, "config.json"))
    return Path(config).parent.name  # .../snapshots/<commit>/config.json
