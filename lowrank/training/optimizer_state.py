"""Put a parameter in other coordinates into an optimiser, and convert the moments of the old one."""

from typing import Any

import torch
from torch import Tensor, nn

ADAM = {"step", "exp_avg", "exp_avg_sq"}  # keys of the state of a parameter


def replace_parameter(optimizer: Any, old: nn.Parameter, new: nn.Parameter, left: Tensor, right: Tensor) -> None:
    """Replace a parameter in its group of the optimiser, and rotate its moments into the new coordinates.

    The new gradient is L G R^T for the old gradient G. A first moment is linear in the gradients and rotates like them. A
    second moment does not rotate. For Adam and its variants, the rotated and debiased first moment m counts as the only
    gradient so far: exp_avg = (1 - beta1) m, exp_avg_sq = (1 - beta2) m^2, step = 1. The next update is then at most one
    learning rate in every entry. Zero moments beside an old step count would allow three, and a kept first moment beside a
    zero second moment ten. A momentum buffer of SGD rotates exactly. The state of other optimisers is dropped.

    **Arguments**

    - `optimizer`: of torch, or wrapped by accelerate.
    - `old`: the parameter to replace; flattened to `(m, n)`.
    - `new`: its replacement, `(p, q)`; may be `old` itself.
    - `left`: L, `(p, m)`.
    - `right`: R, `(q, n)`.

    **Raises**

    - `ValueError`: the optimiser does not have `old`.
    """
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][place] = new
                state = optimizer.state.pop(old, {})
                if rotated := _rotate_state(state, group, left, right, new):
                    optimizer.state[new] = rotated
                return
    raise ValueError(
        f"`optimizer` must hold every trained weight of the model, got none for one of shape {tuple(old.shape)}."
    )


def _rotate_state(
    state: dict[str, Any], group: dict[str, Any], left: Tensor, right: Tensor, new: Tensor
) -> dict[str, Any]:
    def rotate(moment: Tensor) -> Tensor:
        return (left.to(moment) @ moment.flatten(1) @ right.to(moment).T).to(new)

    momentum = state.get("momentum_buffer")
    if state.keys() == {"momentum_buffer"} and momentum is not None:
        return {"momentum_buffer": rotate(momentum)}
    if not (ADAM <= state.keys() <= ADAM | {"max_exp_avg_sq"}) or float(state["step"]) < 1:
        return {}
    beta1, beta2 = group["betas"]
    mean = rotate(state["exp_avg"]) / (1 - beta1 ** float(state["step"]))
    step = state["step"]
    rotated = {
        "step": torch.ones_like(step) if isinstance(step, Tensor) else 1,
        "exp_avg": (1 - beta1) * mean,
        "exp_avg_sq": (1 - beta2) * mean.square(),
    }
    return rotated | {key: rotated["exp_avg_sq"].clone() for key in state.keys() - ADAM}
