"""Read the shapes of the layers of a model, from the model itself or from the headers of its files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from lowrank.io.schemas import read_json
from lowrank.io.weights import CONFIG, ModelConfig, Source, match_modules, open_weights
from lowrank.nn.targets import BLOCKS, is_conv1d


def layer_sizes(model: Source, layers: Iterable[str] = BLOCKS) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the weights of linear layers, GPT-2's `Conv1D` and convolutions.

    No weight is read. For files, the order and the kind of the layers come from the config.json beside them, if it names a class
    of transformers that has their tensors. Otherwise every weight of two or more dimensions counts, sorted by name.

    **Arguments**

    - `model`: a model (also on the meta device), a folder with safetensors, a safetensors file, or a Hub name.
    - `layers`: names or regular expressions that must match a whole name; by default the layers inside numbered blocks.

    **Returns** layer -> `(out, in, *kernel)`, in the order of the model.

    **Raises**

    - `ValueError`: no such layer.
    - `FileNotFoundError`: no such checkpoint, see `lowrank.io.weights.open_weights`.
    """
    patterns = list(layers)
    with open_weights(model, "model") as checkpoint:
        shapes, files = checkpoint.shapes, checkpoint.files
    sizes = {name: shapes[f"{name}.weight"] for name in match_modules(shapes, patterns)}
    modules = model if isinstance(model, nn.Module) else _build_skeleton(files[0].parent / CONFIG)
    if modules is not None:
        kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
        names = [name for name, module in modules.named_modules() if isinstance(module, kinds) or is_conv1d(module)]
        if ordered := [name for name in names if name in sizes]:
            return {name: sizes[name] for name in ordered}
    if not sizes:
        raise ValueError(f"`layers` must match weights of the model, got none for {patterns}.")
    return {name: sizes[name] for name in sorted(sizes, key=_split_numbers)}


def _build_skeleton(config: Path) -> nn.Module | None:
    """Build the architecture of a config.json without weights; None if transformers does not have it."""
    import transformers  # noqa: PLC0415

    names = read_json(config, "model", ModelConfig).get("architectures") if config.exists() else None
    kind: Any = getattr(transformers, names[0], None) if names else None
    if kind is None:
        return None
    with init_empty_weights():
        return kind(transformers.AutoConfig.from_pretrained(config.parent))


def _split_numbers(name: str) -> list[Any]:
    """Return a key that sorts `layers.2` before `layers.11`; shards list names in no useful order."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
