"""Load models, tokenizers and data sets by Hub name or from a local folder, with errors that name the remedy."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from lowrank.io.checks import require
from lowrank.io.hashing import hash_options
from lowrank.io.network import cache_if_unreachable, is_offline

T = TypeVar("T")
NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # by default transformers asks whether to run a folder's code


def load_or_explain(kind: str, name: str, load: Callable[[], T]) -> T:
    """Call `load` and turn each error into one that names the missing thing and its reason, and the remedy if it is the Hub.

    **Arguments**

    - `kind`: the kind of thing, for the message: "model", "data set".
    - `name`: its Hub name or folder, for the message.
    - `load`: function without arguments that loads it.

    **Returns** the result of `load`.

    **Raises**

    - `FileNotFoundError`: `load` raised an `OSError`: a file is missing, or the Hub cannot be reached, which is found out within
      seconds.
    - `ValueError`: `load` raised another error, which tells of the content.
    """
    local, unreachable = Path(name).exists(), False
    try:
        with nullcontext(False) if local else cache_if_unreachable() as unreachable:
            return load()
    except OSError as error:
        remedy = "" if local else f"{_find_remedy(name, unreachable)}. "
        raise FileNotFoundError(f"{kind} {name!r} could not be loaded: {remedy}({_shorten(error)})") from error
    except Exception as error:  # of any kind: the libraries raise what they like
        raise ValueError(f"{kind} {name!r} could not be loaded: {_shorten(error)}") from error


def _find_remedy(name: str, unreachable: bool) -> str:
    if Path(name).is_absolute() or name.startswith("."):
        return "there is no such folder"
    if unreachable:
        return "the Hub cannot be reached and the cache at HF_HOME lacks it: check the network, or name a local folder"
    if is_offline():
        return (
            "HF_HUB_OFFLINE is set, so it must already be in the cache at HF_HOME: unset it once to download, or point "
            "HF_HOME at a cache that has it"
        )
    return "check the name and the network, log in with `hf auth login` if it is gated, or name a local folder"


def _shorten(error: Exception) -> str:
    """Return the lines of a message as one, at most 500 characters."""
    text = " ".join(str(error).split()) or repr(error)
    return text if len(text) <= 500 else f"{text[:500]}..."


def split_gguf(name: str) -> tuple[str, dict[str, str]]:
    """Split the name of a GGUF file into that of its folder or repository, and the option that names the file in it.

    **Arguments**

    - `name`: path of a file, `owner/repository/file.gguf` on the Hub, or the name of any other model.

    **Returns** the name, and `gguf_file` for transformers; nothing for a name that does not end with '.gguf'.
    """
    if not name.endswith(".gguf"):
        return name, {}
    path = Path(name)
    if path.is_file() or path.is_absolute() or name.startswith(".") or len(path.parts) < 3:
        return str(path.parent), {"gguf_file": path.name}
    return "/".join(path.parts[:2]), {"gguf_file": "/".join(path.parts[2:])}


def load_splits(path: str, config: str | None = None, **options: Any) -> Any:
    """Load a data set as a mapping of splits.

    **Arguments**

    - `path`: its Hub name or a local folder.
    - `config`: the configuration of a data set that has several. Default None.
    - `options`: passed on to `datasets.load_dataset`.

    **Raises**

    - `FileNotFoundError`, `ValueError`: see `load_or_explain`.
    """
    import datasets  # noqa: PLC0415

    datasets.disable_progress_bars()
    return load_or_explain("data set", path, lambda: datasets.load_dataset(path, config, **options))


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Load the fast tokenizer of a model; no code of the folder runs.

    **Arguments**

    - `name`: Hub name or local folder of the model, or a GGUF file, see `split_gguf`.
    - `revision`: branch, tag or commit on the Hub. Default None, the newest.
    """
    import transformers  # noqa: PLC0415

    place, file = split_gguf(name)
    options = {"use_fast": True, "revision": revision or "main", **file, **NO_CODE}
    load = lambda: transformers.AutoTokenizer.from_pretrained(place, **options)  # noqa: E731
    return load_or_explain("tokenizer", name, load)


def load_pretrained(auto: str, name: str, *, whole: bool = False, **options: Any) -> Any:
    """Load a transformers model with weights from safetensors or GGUF only; no code of the folder runs.

    **Arguments**

    - `auto`: name of its Auto class, for example "AutoModelForCausalLM".
    - `name`: its Hub name or a local folder; or a GGUF file, see `split_gguf`, whose weights are dequantised.
    - `whole`: refuse files that lack weights, instead of making new ones. Default False.
    - `options`: passed on to `from_pretrained`.

    **Returns** the model. A head that was saved in another size is a new one.

    **Raises**

    - `FileNotFoundError`: see `load_or_explain`.
    - `ValueError`: see `load_or_explain`; weights below the head that have other sizes than the configuration says, or that are
      missing, if all are wanted.
    """
    import transformers  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls = getattr(transformers, auto)
    place, file = split_gguf(name)
    safely = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True, **file, **NO_CODE}
    if file and hasattr(transformers, "GgufConfig"):  # former versions always dequantise
        safely["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, about = load_or_explain("model", name, lambda: cls.from_pretrained(place, **safely, **options))
    if file:
        _unmark(model)
    body = "" if model.base_model is model else f"{model.base_model_prefix}."
    for key, stored, needed in sorted(about["mismatched_keys"]):
        rule = f"hold {key} in the shape {tuple(needed)} that its config.json says"
        require(not key.startswith(body), f"model {name!r}", rule, tuple(stored))
    lacking = sorted(about["missing_keys"]) if whole else []
    require(
        not lacking, f"model {name!r}", f"hold all weights of {type(model).__name__}; its files lack some", lacking[:3]
    )
    return model


def _unmark(model: Any) -> None:
    """Remove the mark of quantisation from a model whose weights are dense, which would forbid saving it."""
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def read_config(folder: Path | str) -> Any:
    """Read the `config.json` of a transformers model in a local folder; no code of the folder runs.

    **Raises**

    - `FileNotFoundError`: no `config.json`.
    - `ValueError`: it is damaged, or of a model that transformers does not have.
    """
    import transformers  # noqa: PLC0415

    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"`folder` must contain a config.json, got {str(folder)!r} without it.")
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        rule = f"contain a config.json of a model that transformers has ({_shorten(error)})"
        raise ValueError(f"`folder` must {rule}, got {str(folder)!r}.") from error


def find_model_class(name: Any) -> Any:
    """Return the model class of transformers with a name, None if there is none; no other attribute of it counts."""
    import transformers  # noqa: PLC0415

    found = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def revision(name: str) -> str:
    """Return a string that changes with the files of a model.

    For a Hub name it is the commit in the cache, for a local folder a hash of names, sizes and times of its files.
    """
    import huggingface_hub  # noqa: PLC0415

    place, file = split_gguf(name)
    folder = Path(place)
    if folder.is_dir():
        return hash_options(sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir()))
    wanted = file.get("gguf_file", "config.json")
    found = load_or_explain("model", name, lambda: huggingface_hub.hf_hub_download(place, wanted))
    return Path(found).parents[wanted.count("/")].name  # .../snapshots/<commit>/config.json
