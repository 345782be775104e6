"""Read the shapes of the layers of a model, from the model itself or from the headers of its files."""

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.io.checks import require
from lowrank.io.hub import find_model_class, read_config
from lowrank.io.patterns import matches
from lowrank.io.schemas import read_json
from lowrank.io.tensor_places import count_elements
from lowrank.io.weights import (
    CONFIG,
    ModelConfig,
    Source,
    match_modules,
    match_stacks,
    open_weights,
    warn_of_stacks,
)
from lowrank.nn.skeletons import bounded_skeleton, check_counts
from lowrank.nn.targets import BLOCKS, is_conv1d


class LayerSizes(dict[str, tuple[int, ...]]):
    """Hold layer -> shape of its weight.

    **Arguments**

    - `sizes`: layer -> shape.
    - `share_of_model`: the weights of these layers as a share of all parameters of the model.
    - `left_out`: name -> shape of the stacks of matrices, such as experts, that `layers` matches and that are not among them.
    """

    def __init__(
        self, sizes: Mapping[str, tuple[int, ...]], share_of_model: float, left_out: Mapping[str, tuple[int, ...]]
    ) -> None:
        super().__init__(sizes)
        self.share_of_model, self.left_out = share_of_model, dict(left_out)


def layer_sizes(model: Source, layers: Iterable[str] = BLOCKS) -> LayerSizes:
    """Read the shapes of the weights of linear layers, GPT-2's `Conv1D` and convolutions.

    No weight is read. For files, the order and the kind of the layers come from the config.json beside them, if it names a class
    of transformers. A weight that the class names otherwise counts if it has two or more dimensions, as the experts do that
    transformers stacks when it loads them; layers are sorted by name then.

    **Arguments**

    - `model`: a model (also on the meta device), a folder with safetensors, a safetensors file, or a Hub name.
    - `layers`: names or regular expressions that must match a whole name; by default the layers inside numbered blocks.

    **Returns** layer -> `(out, in, *kernel)`, in the order of the model, and the share of the model that they are.

    **Raises**

    - `ValueError`: an entry that matches no layer; no entry at all.
    - `FileNotFoundError`: no such checkpoint, see `lowrank.io.weights.open_weights`.

    **Warns**

    - `LeftOutWarning`: stacks of matrices, such as the experts of a mixture, that are left out.
    """
    patterns = list(layers)
    require(len(patterns) > 0, "layers", "hold at least one name or pattern", patterns)
    with open_weights(model, "model") as checkpoint:
        shapes, files = checkpoint.shapes, checkpoint.files
    modules = model if isinstance(model, nn.Module) else _build_skeleton(files[0].parent / CONFIG, len(shapes))
    names = _order(match_modules(shapes, patterns), modules)
    stacks = match_stacks(shapes, patterns)
    left_out = {name: shape for name, shape in stacks.items() if name.removesuffix(".weight") not in names}
    for entry in patterns:
        if not any(matches(name, entry) for name in names):
            others = match_stacks(left_out, [entry])
            hint = f", but stacks of matrices, such as {next(iter(others.items()))}" if others else ""
            raise ValueError(f"`layers` must match weights of the model, got none for {[entry]}{hint}.")
    sizes = {name: shapes[f"{name}.weight"] for name in names}
    whole = model.parameters() if isinstance(model, nn.Module) else None
    total = sum(map(prod, shapes.values())) if whole is None else count_elements(whole)
    share = sum(map(prod, sizes.values())) / max(total, 1)
    warn_of_stacks(left_out, share)
    return LayerSizes(sizes, share, left_out)


def _order(names: set[str], modules: nn.Module | None) -> list[str]:
    """Return the names that are layers of an architecture, in its order; with names that it does not have, by name."""
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    known = {} if modules is None else dict(modules.named_modules())
    layers = [name for name, module in known.items() if isinstance(module, kinds) or is_conv1d(module)]
    if renamed := names - known.keys():
        return sorted(names & set(layers) | renamed, key=_split_numbers)
    return [name for name in layers if name in names]


def _build_skeleton(config: Path, tensors: int) -> nn.Module | None:
    """Build the architecture of a config.json without weights; None if transformers does not have it."""
    content = read_json(config, "model", ModelConfig) if config.exists() else {}
    names = content.get("architectures")
    model_class = find_model_class(names[0]) if names else None
    if model_class is None:
        return None
    try:
        check_counts(content, tensors)
        with bounded_skeleton(tensors):
            return model_class(read_config(config.parent))
    except Exception:  # a model builds itself with any error; its layers then come in the order of their names
        return None


def _split_numbers(name: str) -> list[Any]:
    """Return a key that sorts `layers.2` before `layers.11`; shards list names in no useful order."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
