"""What an optimiser remembers of a parameter, carried over to one in other coordinates."""

from typing import Any

import torch
from torch import Tensor, nn

ADAM = {"step", "exp_avg", "exp_avg_sq"}


def replace_parameter(optimizer: Any, old: nn.Parameter, new: nn.Parameter, left: Tensor, right: Tensor) -> None:
    """Puts a parameter in the place of another, in its group, with what the optimiser knows of the direction.

    The new gradient is L G R^T for the old one G. A first moment is linear in the gradients, so it turns in the same way. A
    second moment does not: for Adam and its kin the turned, debiased first moment m counts as the one gradient seen so far,
    exp_avg = (1 - beta1) m, exp_avg_sq = (1 - beta2) m^2, step = 1. The next update is then at most one learning rate in every
    entry, while zeroed moments beside an old step count allow three, and a kept first moment beside zeroed others ten. A
    momentum buffer of SGD turns exactly. What is known of other optimisers is forgotten.

    **Arguments:** `optimizer`: of torch, or wrapped by accelerate. `old`: flattened to `(m, n)`. `new`: `(p, q)`; may be `old`
    itself. `left`, `right`: L `(p, m)`, R `(q, n)`.

    **Raises:** `ValueError`: the optimiser does not hold `old`.
    """
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][place] = new
                known = optimizer.state.pop(old, {})
                if carried := _carried(known, group, left, right, new):
                    optimizer.state[new] = carried
                return
    raise ValueError(
        f"`optimizer` must hold every trained weight of the model, got none of shape {tuple(old.shape)} that is this one."
    )


def _carried(known: dict[str, Any], group: dict[str, Any], left: Tensor, right: Tensor, new: Tensor) -> dict[str, Any]:
    def turned(moment: Tensor) -> Tensor:
        return (left.to(moment) @ moment.flatten(1) @ right.to(moment).T).to(new)

    momentum = known.get("momentum_buffer")
    if known.keys() == {"momentum_buffer"} and momentum is not None:
        return {"momentum_buffer": turned(momentum)}
    if not (ADAM <= known.keys() <= ADAM | {"max_exp_avg_sq"}) or float(known["step"]) < 1:
        return {}
    beta1, beta2 = group["betas"]
    mean = turned(known["exp_avg"]) / (1 - beta1 ** float(known["step"]))
    step = known["step"]
    seen = {
        "step": torch.ones_like(step) if isinstance(step, Tensor) else 1,
        "exp_avg": (1 - beta1) * mean,
        "exp_avg_sq": (1 - beta2) * mean.square(),
    }
    return seen | {key: seen["exp_avg_sq"].clone() for key in known.keys() - ADAM}
