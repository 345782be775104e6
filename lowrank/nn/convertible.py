"""Find the layers of a model that can be converted to `lowrank.nn.usv` layers, and say why others cannot."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowrank.nn.plain import find_obstacle
from lowrank.nn.targets import find_shared_weights, refuse_root, select_names
from lowrank.nn.usv import USV_LAYERS

MAX_ASPECT = 10  # a weight whose sides differ by more than this factor gains little from a lower rank


def find_convertible(
    model: nn.Module, include: Iterable[str], exclude: Iterable[str]
) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """Find the linear layers and convolutions that can be converted.

    **Arguments**

    - `model`: any PyTorch module; it is not changed.
    - `include`, `exclude`: names or patterns of layers, see `lowrank.nn.targets.select_names`.

    **Returns** layer -> shape of its weight, for layers that can be converted; layer -> reason, for selected layers that cannot.

    **Raises**

    - `ValueError`: as in `select_names`; no layer can be converted.
    """
    refuse_root(model, tuple(USV_LAYERS))
    modules: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, tuple(USV_LAYERS))}
    names = select_names(modules, include, exclude)
    shared = find_shared_weights(model, {name: modules[name] for name in names})
    layers, skipped = {}, {}
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if reason := find_obstacle(modules[name], parent) or _find_limit(modules[name], name in shared):
            skipped[name] = reason
        else:
            layers[name] = modules[name].weight.shape
    if not layers:
        some = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3]) or "none is named"
        raise ValueError(f"`model` must have a layer that can be converted, got none ({some}).")
    return layers, skipped


def _find_limit(module: Any, is_shared: bool) -> str | None:
    """Return the first reason why a plain layer cannot be converted, or None if it can."""
    sides = module.weight.flatten(1).shape
    limits = {
        "its weight is shared": is_shared,
        "its weight is frozen": not module.weight.requires_grad,
        "its groups or padding have no such form": getattr(module, "groups", 1) != 1
        or getattr(module, "padding_mode", "zeros") != "zeros",
        f"its sides, {tuple(sides)}, differ by more than {MAX_ASPECT} times": min(sides) * MAX_ASPECT < max(sides),
    }
    return next((reason for reason, holds in limits.items() if holds), None)
