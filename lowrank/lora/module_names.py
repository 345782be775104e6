"""Find the modules of a checkpoint in a model that may name them differently."""

import re
from collections.abc import Mapping

from torch import Tensor, nn


def find_modules(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Find the modules of a checkpoint in a model.

    The names differ if transformers keeps older names in checkpoints than in the model, as for Qwen2.5-VL:
    `model.layers.0.mlp.up_proj` is `model.language_model.layers.0.mlp.up_proj` in the model. A module without its exact name is
    found by its shape and by the end of its name. The longest end that matches counts, and it must contain the number of the
    block.

    **Arguments**

    - `model`: any PyTorch module.
    - `shapes`: name in the checkpoint -> (out, in) of the weight, kernels flattened to (out, in * kh * kw).

    **Returns** name in the checkpoint -> name in the model, in the order of `shapes`.

    **Raises**

    - `ValueError`: a module that the model does not have, or has in another shape, or has twice.
    """
    model_shapes = {name: _weight_shape(module) for name, module in model.named_modules()}
    names: dict[str, str] = {}
    for name, shape in shapes.items():
        candidates = [name] if name in model_shapes else _match_end(name, shape, model_shapes)
        if len(candidates) != 1 or model_shapes[candidates[0]] != shape:
            seen = model_shapes.get(name) or (" and ".join(map(repr, candidates[:2])) or "none")
            raise ValueError(f"`model` must have the modules of this file: {name!r} should be {shape}, got {seen}.")
        names[name] = candidates[0]
    if len(set(names.values())) < len(names):
        raise ValueError("`model` must have a separate module for each of this file, got one for two of them.")
    return names


def _match_end(name: str, shape: tuple[int, int], model_shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the modules of this shape that share the longest end of the name."""
    ends = [name.split(".", count)[-1] for count in range(name.count(".") + 1)]
    for end in ends:
        if re.search(r"(^|\.)\d+\.", end):
            matches = [other for other in model_shapes if other.endswith(f".{end}") and model_shapes[other] == shape]
            if matches:
                return matches
    return []


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a module's weight with flattened kernels, () if it has none of two or more dimensions."""
    weight = getattr(module, "weight", None)
    return tuple(weight.flatten(1).shape) if isinstance(weight, Tensor) and weight.dim() >= 2 else ()
