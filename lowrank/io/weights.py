"""Checkpoints as tensors by name: a folder with `model.safetensors` or its shards, a single such file, a Hub name, or a model in
memory; read one tensor at a time."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowrank.io.hashing import hash_model, hash_options
from lowrank.io.hub import found

Source = Path | str | nn.Module
SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@dataclass(frozen=True)
class Opened:
    """Tensors by name, read when they are asked for."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    architecture: str | None
    files: list[Path]


@contextmanager
def opened(source: Source, what: str) -> Iterator[Opened]:
    """A checkpoint, without a tensor read. `what`: the argument that errors name.

    **Raises:** `FileNotFoundError`: no such checkpoint, or a shard that its index names. `ValueError`: a file that is not whole.
    """
    if isinstance(source, nn.Module):
        state = source.state_dict()
        config: Any = getattr(source, "config", None)
        yield Opened({n: tuple(t.shape) for n, t in state.items()}, state.__getitem__, _architecture(config), [])
        return
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    files = _files(source, what)
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    where[name], shapes[name] = path, tuple(file.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ValueError(f"`{what}` must hold whole safetensors files, got {str(path)!r}: {error}.") from error

    def read(name: str) -> Tensor:
        with safe_open(where[name], "pt") as file:  # opened anew: a file that stays open stays in memory once read
            return file.get_tensor(name)

    about = files[0].parent / CONFIG
    config = json.loads(about.read_text(encoding="utf8")) if about.exists() else None
    yield Opened(shapes, read, _architecture(config), files)


def _architecture(config: Any) -> str | None:
    return (config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)) or None


def _files(source: Path | str, what: str) -> list[Path]:
    """The safetensors files of a checkpoint."""
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        if path.is_absolute() or str(source).count("/") > 1 or str(source).startswith("."):
            raise FileNotFoundError(
                f"`{what}` must be a folder, a safetensors file or a Hub name, got {str(source)!r}."
            )
        import huggingface_hub  # noqa: PLC0415

        wanted = ["*.safetensors", "*.safetensors.index.json", CONFIG]
        load = lambda: huggingface_hub.snapshot_download(str(source), allow_patterns=wanted)  # noqa: E731
        path = Path(found("checkpoint", str(source), load))
    if (index := path / INDEX).exists():
        shards = sorted({path / name for name in json.loads(index.read_text(encoding="utf8"))["weight_map"].values()})
        if missing := [shard.name for shard in shards if not shard.exists()]:
            raise FileNotFoundError(
                f"`{what}` must hold every shard of its index, got {str(path)!r} without {missing[0]!r}."
            )
        return shards
    if (single := path / SINGLE).exists():
        return [single]
    raise FileNotFoundError(f"`{what}` must be a folder with {SINGLE} or {INDEX}, got {str(path)!r} with neither.")


def read_tensors(source: Source, modules: Iterable[str]) -> dict[str, Tensor]:
    """The parameters of whole modules, by name, and nothing else of a checkpoint.

    **Raises:** as `opened`; `ValueError`: a module without parameters there.
    """
    with opened(source, "source") as held:
        tensors = {}
        for module in modules:
            names = [name for name in held.shapes if name.startswith(f"{module}.")]
            if not names:
                raise ValueError(f"`modules` must have parameters in `source`, got {module!r}.")
            tensors |= {name: held.read(name) for name in names}
        return tensors


def source_identity(source: Source) -> str:
    """A hash of what a checkpoint holds: the bytes of its files, or the tensors of a model in memory."""
    if isinstance(source, nn.Module):
        return hash_model(source)
    with opened(source, "source") as held:
        files = held.files
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "blake2b").hexdigest())
    return hash_options(sorted(digests))


def named(shapes: Mapping[str, tuple[int, ...]], layers: Iterable[str]) -> set[str]:
    """The modules with a weight of two or more dimensions that an entry of `layers` names or matches."""
    entries = list(layers)
    modules = {name.removesuffix(".weight") for name, s in shapes.items() if name.endswith(".weight") and len(s) >= 2}
    return {name for name in modules if any(name == entry or re.fullmatch(entry, name) for entry in entries)}


def distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state without repeats, contiguous on the CPU; and the repeats: name -> the name that is stored."""
    distinct: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in model.state_dict().items():
        stored = first.setdefault((tensor.data_ptr(), tensor.shape), name) if tensor.numel() else name
        if stored == name:
            distinct[name] = tensor.detach().cpu().contiguous()
        else:
            tied[name] = stored
    return distinct, tied
