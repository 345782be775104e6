"""Start an adapter from the change that fine-tuning made, in whatever form a module keeps its weight.

The change of a weight with n rows is B A after the other dimensions are flattened. A linear layer `(out, in)` and a convolution
`(out, in, *kernel)` take the factors as they are. An embedding `(tokens, size)` and a `Conv1D` of transformers `(in, out)` keep
the transpose of what an adapter multiplies, so there they change places.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.nn.targets import is_conv1d

STRAIGHT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_warm_start(model: nn.Module, names: Iterable[str], use_dora: bool) -> None:
    """Check that factors of a change can be put into the adapters of all modules, before the model is wrapped.

    **Arguments**

    - `model`: the plain model.
    - `names`: the modules that get adapters.
    - `use_dora`: whether the adapters scale the columns of the weight too.

    **Raises**

    - `ValueError`: a kind of module whose factors have no place; a convolution with groups; scaled columns, for which the change
      is no product of two factors.
    """
    for name in names:
        module: Any = model.get_submodule(name)
        known = isinstance(module, (*STRAIGHT, nn.Embedding)) or is_conv1d(module)
        if not known or getattr(module, "groups", 1) != 1:
            raise ValueError(
                f"`config` must name linear layers, embeddings or convolutions of one group for `start` 'warm', got {name!r}, a "
                f"{type(module).__name__}."
            )
        if use_dora:
            raise ValueError(
                f"`use_dora` must be False for `start` 'warm', got True: module {name!r} would be scaled too."
            )


@torch.no_grad()
def set_factors(adapted: Any, names: Mapping[str, str], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put the factors of changes into the adapters of a wrapped model.

    **Arguments**

    - `adapted`: the `peft.PeftModel`; it is changed.
    - `names`: module in `factors` -> module in the model.
    - `factors`: module -> (B, A), see `lowrank.lora.deltas.delta_factors`.
    """
    for name, (left, right) in factors.items():
        layer = adapted.base_model.model.get_submodule(names[name])
        base = layer.get_base_layer()
        embeds = isinstance(base, nn.Embedding)
        if embeds or is_conv1d(base):
            left, right = right.T, left.T
        a, b = (
            (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
            if embeds
            else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        )
        a.copy_(right.reshape(a.shape))
        b.copy_((left / layer.scaling["default"]).reshape(b.shape))
