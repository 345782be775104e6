"""Say how the dense architecture of a model is built again, and build it: by transformers, or by timm."""

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from lowrank.io.checks import require
from lowrank.io.hub import find_model_class, read_config
from lowrank.nn.skeletons import bounded_skeleton, check_counts

# What timm's factory itself makes of an option, besides the classes of the architecture. None of these opens a file.
FEATURES = {"features_only", "feature_cls", "out_indices", "output_stride", "bn_eps", "bn_momentum"}
NOT_SIZES = {"self", "kwargs", "args", "cfg", "device", "dtype", "pretrained", "checkpoint_path", "cache_dir"}
WRAPPERS = {"_orig_mod": "`torch.compile`", "merge_and_unload": "an adapter"}


def describe_base(model: Any) -> dict[str, Any] | None:
    """Describe how to build the architecture of a model, from what the model knows about itself.

    **Returns** `{"transformers": class}`, or `{"timm": name, "options": {...}}`, or None for a model of neither library.
    """
    if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
        name = type(model).__name__
        return {"transformers": name} if find_model_class(name) is type(model) else None
    settings = getattr(model, "pretrained_cfg", None) or {}
    return _describe_timm(model, settings) if settings.get("architecture") else None


def _describe_timm(model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Take the options from timm's own notes, with what was changed since; older versions know the classes alone."""
    import timm  # noqa: PLC0415

    name = settings["architecture"]
    usual = timm.models.get_pretrained_cfg(name)
    if settings.get("tag") and usual is not None and settings["tag"] != usual.tag:
        name = f"{name}.{settings['tag']}"  # other tags have other sizes
    options = dict(getattr(model, "_model_args", {}))
    if hasattr(timm.models, "get_model_args"):
        options |= timm.models.get_model_args(model)
    if getattr(model, "num_classes", None) is not None:
        options["num_classes"] = model.num_classes
    allowed = find_options(name)
    return {
        "timm": name,
        "options": {key: value for key, value in options.items() if key in allowed and _is_json(value)},
    }


def _is_json(value: Any) -> bool:
    try:
        return bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return False


def find_options(name: str) -> set[str]:
    """Find the options of an architecture of timm: what the classes that its module knows take, and no other of its factory.

    **Raises**

    - `ValueError`: timm has no such model or model class.
    """
    import timm  # noqa: PLC0415

    found = timm.models.model_entrypoint(name.partition(".")[0]) if timm.is_model(name) else _find_timm_class(name)
    known = [value for value in vars(sys.modules[found.__module__]).values() if isinstance(value, type)]
    classes = [value for value in known if issubclass(value, nn.Module) and value.__module__.startswith("timm.models.")]
    taken = {parameter for value in classes for parameter in inspect.signature(value.__init__).parameters}
    return (taken | FEATURES) - NOT_SIZES


def _find_timm_class(name: Any) -> Any:
    import timm  # noqa: PLC0415

    found = getattr(timm.models, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, nn.Module)
    require(is_model, "base", "name a model or a model class of timm", name)
    return found


def check_wrappers(model: nn.Module) -> None:
    """Check that a model is not inside a wrapper, which would give its tensors other names.

    **Raises**

    - `ValueError`: a model that is compiled, parallel, or holds adapters.
    """
    made = next((what for name, what in WRAPPERS.items() if hasattr(model, name)), None)
    made = "`DataParallel`" if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else made
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "get_base_layer")), None)
    made = f"an adapter in {adapted!r}" if made is None and adapted is not None else made
    rule = "be the module inside a wrapper, without adapters: merge them first, or save them by themselves"
    require(made is None, "model", rule, f"{type(model).__name__}, with {made}")


def save_config(model: Any, folder: Path) -> None:
    """Write the configuration files of a transformers model as they are, valid or not; other models have none.

    **Arguments**

    - `model`: any PyTorch module.
    - `folder`: an existing folder; it gets `config.json`, and `generation_config.json` for models that generate.
    """
    for part in ("config", "generation_config"):
        if hasattr(getattr(model, part, None), "to_json_file"):
            getattr(model, part).to_json_file(folder / f"{part}.json", use_diff=True)


def build_skeleton(base: Mapping[str, Any], folder: Path, tensors: int | None = None) -> nn.Module:
    """Build the base architecture with parameters on the meta device, so that it takes no memory.

    **Arguments**

    - `base`: the description, see `describe_base`.
    - `folder`: the folder with the `config.json` of a transformers model.
    - `tensors`: how many tensors its file holds; then its buffers are on the meta device too, and a model of far more is
      refused. Default: None, buffers are computed.

    **Raises**

    - `FileNotFoundError`: no `config.json`.
    - `ValueError`: an unknown library, model or option; a `config.json` of another model.
    """
    place: AbstractContextManager[Any] = (
        init_empty_weights(include_buffers=False) if tensors is None else bounded_skeleton(tensors)
    )
    if tensors is not None:
        check_counts(base, tensors)
        check_counts(_read_json(folder / "config.json"), tensors)
    if "transformers" in base:
        return _build_transformers(base["transformers"], folder, place)
    if "timm" in base:
        return _build_timm(base["timm"], base.get("options") or {}, place)
    raise ValueError(f"`base` must have the key 'transformers' or 'timm', got {dict(base)}.")


def _read_json(path: Path) -> Any:
    """Return the content of a file, None if it is missing or damaged, which transformers will say."""
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        return None


def _build_transformers(name: Any, folder: Path, place: AbstractContextManager[Any]) -> nn.Module:
    import transformers  # noqa: PLC0415

    model_class = find_model_class(name)
    require(model_class is not None, "base", "name a model class of transformers", name)
    config = read_config(folder)
    with place, _explaining(f"`folder` must contain a config.json of {name}, got one of another model"):
        model = model_class(config)
    if (path := folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_dict(json.loads(path.read_text(encoding="utf8")))
    return model


def _build_timm(name: Any, options: Mapping[str, Any], place: AbstractContextManager[Any]) -> nn.Module:
    import timm  # noqa: PLC0415

    made = not isinstance(name, str) or not timm.is_model(name)
    model_class = _find_timm_class(name) if made else None
    unknown = sorted(options.keys() - find_options(name))
    require(not unknown, "base", f"have options of the architecture {name!r} alone", unknown)
    with place, _explaining(f"`base` must have options that {name} takes, got {dict(options)}"):
        return timm.create_model(name, pretrained=False, **options) if model_class is None else model_class(**options)


@contextmanager
def _explaining(problem: str) -> Iterator[None]:
    """Build a model without touching the random state, and turn the errors of its constructor into one kind."""
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
    ) as error:
        raise ValueError(f"{problem}: {error}.") from error
