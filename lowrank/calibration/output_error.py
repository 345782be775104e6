"""The output error of replaced weights, measured on the activations themselves."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lowrank.calibration.hooks import exact_products, visit_inputs
from lowrank.factorization.precision import with_float64
from lowrank.factorization.running_moments import BLOCK_TOKENS
from lowrank.nn.batches import Batch
from lowrank.nn.targets import find_linears


def output_errors(
    model: nn.Module, batches: Iterable[Batch], replacements: Mapping[str, Sequence[Tensor]]
) -> dict[str, list[float]]:
    """Measure ||(W - W') X||_F of each layer for each replacement W' of its weight, on the activations themselves.

    This streams the inputs of the unchanged model and never forms a second moment, so it can check the predictions of a second
    moment. A replacement of zeros gives ||W X||_F.

    **Arguments**

    - `model`: any PyTorch module; it is not changed.
    - `batches`: iterable of batches, see `lowrank.nn.batches`.
    - `replacements`: layer name -> weights of the layer's shape, `(out, in)`, any floating dtype.

    **Returns** layer name -> one norm per replacement, accumulated in float64.
    """
    linears = find_linears(model, replacements)
    weights = {name: with_float64(layer.weight.detach()).double() for name, layer in linears.items()}
    differences = {
        name: torch.cat([weight - new.to(weight) for new in replacements[name]]).to(linears[name].weight)
        for name, weight in weights.items()
    }
    del weights
    sums = {name: torch.zeros(len(new), dtype=torch.float64) for name, new in replacements.items()}

    def add(name: str, rows: Tensor) -> None:
        for block in rows.split(BLOCK_TOKENS):
            with exact_products(block.device):
                change = block @ differences[name].to(block).T
            per_output = with_float64(change).square().sum(0, dtype=torch.float64)
            sums[name] += per_output.view(len(sums[name]), -1).sum(1).cpu()

    visit_inputs(model, batches, linears, add)
    return {name: total.sqrt().tolist() for name, total in sums.items()}
