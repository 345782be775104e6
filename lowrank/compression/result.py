"""Say what a compression did: one row per layer, and the totals of the targeted layers, the model and its bytes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lowrank.compression.configuration import Configuration
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.nn.profiling import weight_bytes
from lowrank.nn.quantized import count_parameters
from lowrank.nn.targets import find_linears

COLUMNS = {"layer": "", "out": "d", "in": "d", "rank": "d", "storage": "", "keep": ".3f"}
ERRORS = {"predicted": "predicted_error", "measured": "measured_error"}


@dataclass(frozen=True)
class ModelSize:
    """Count what a model stores.

    **Arguments**

    - `targeted`: parameters of the weights of the targeted layers, biases left out.
    - `model`: all parameters of the model, shared ones once.
    - `bytes`: of all parameters and buffers, shared ones once.
    """

    targeted: int
    model: int
    bytes: int


def measure_model(model: nn.Module, targeted: int) -> ModelSize:
    """Count parameters and bytes of a model.

    **Arguments**

    - `model`: any PyTorch module.
    - `targeted`: parameters of the weights of its targeted layers.

    **Returns** `ModelSize`.
    """
    return ModelSize(targeted, count_parameters(model), weight_bytes(model))


def dense_row(name: str, layer: nn.Linear, method: str) -> dict[str, Any]:
    """Return the row of a layer that is dense.

    **Arguments**

    - `name`: of the layer.
    - `layer`: the layer.
    - `method`: a key of `METHODS`.
    """
    out, inputs = layer.weight.shape
    sizes = {"layer": name, "out": out, "in": inputs, "rank": min(out, inputs), "storage": "dense", "method": method}
    counts = {"centre": False, "parameters": out * inputs, "indices": 0, "dense_parameters": out * inputs, "keep": 1.0}
    return sizes | counts | {"predicted_error": 0.0, "measured_error": 0.0, "measured_on": None, "statistics": None}


@dataclass(frozen=True, repr=False)
class CompressionResult:
    """Hold what `compress` did; `print(result)` shows it as a table.

    **Arguments**

    - `layers`: one row per layer, as `replace_layers` returns them; ready for a DataFrame.
    - `configuration`: how the model was compressed.
    - `before`, `after`: what the model stored and stores.
    - `trials`: one row per candidate that was measured to choose ranks: its settings, such as `alpha` and `gamma`, and the
      `divergence` of the whole model. Default none.
    - `left_out`: layers that the patterns match but that cannot be replaced, and stacks of matrices, such as experts -> why.
      Default none.
    """

    layers: list[dict[str, Any]]
    configuration: Configuration
    before: ModelSize
    after: ModelSize
    trials: Sequence[Mapping[str, Any]] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Return layer name -> rank."""
        return {row["layer"]: row["rank"] for row in self.layers}

    @property
    def share_of_model(self) -> float:
        """Return the share of the model's parameters that was in scope: those of the targeted weights."""
        return self.before.targeted / self.before.model

    @property
    def keep_targeted(self) -> float:
        """Return the share of the targeted weights' parameters that is left."""
        return self.after.targeted / self.before.targeted

    @property
    def keep_model(self) -> float:
        """Return the share of all parameters of the model that is left."""
        return self.after.model / self.before.model

    @property
    def keep_bytes(self) -> float:
        """Return the share of the model's bytes that is left, parameters and buffers."""
        return self.after.bytes / self.before.bytes

    def __str__(self) -> str:
        head = [*COLUMNS, *(f"{name} error" for name in ERRORS)]
        body = [
            [format(row[name], form) for name, form in COLUMNS.items()] + [f"{row[key]:.3f}" for key in ERRORS.values()]
            for row in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [
            "  ".join(_padded(cell, width) for cell, width in zip(line, widths, strict=True)) for line in [head, *body]
        ]
        rows = [line.rstrip() for line in lines]
        return "\n".join([*rows, "", *self._totals()])

    __repr__ = __str__

    def _totals(self) -> list[str]:
        how = self.configuration
        centred = ", centred" if how.centre else ""
        multiples = f" in multiples of {how.multiple}" if how.multiple > 1 else ""
        retargeted = "" if how.retarget is None else ", retargeted"
        return [
            f"{how.method}, {how.storage}{centred}{retargeted}, ranks: {how.allocation}{multiples}",
            f"{len(self.layers)} targeted layers: {_change(self.before.targeted, self.after.targeted)} parameters",
            f"whole model: {_change(self.before.model, self.after.model)} parameters",
            f"whole model: {_change(self.before.bytes, self.after.bytes)} bytes",
            f"in scope: {self.share_of_model:.1%} of the model's parameters",
            *(f"left out: {name}: {reason}" for name, reason in self.left_out.items()),
        ]


def _padded(cell: str, width: int) -> str:
    numeric = cell[:1].isdigit() or cell.startswith("-")
    return cell.rjust(width) if numeric else cell.ljust(width)


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / before:.1%})"


@check_arguments
def parameter_counts(
    model: nn.Module, dense: nn.Module, layers: Iterable[str], *, with_bytes: bool = False
) -> dict[str, int | float]:
    """Compare the parameters of a compressed model with those of its dense form. A quantised weight counts as if it were not.

    **Arguments**

    - `model`: the compressed model.
    - `dense`: the dense model.
    - `layers`: names or patterns of the targeted layers, as the dense model has them.
    - `with_bytes`: also count the bytes of all parameters and buffers, which quantised weights make fewer. Default False.

    **Returns** `targeted_parameters`, stored for the targeted weights without biases; `keep_targeted`, their share of the dense
    ones; `model_parameters`, all parameters; `keep_model`, their share; with bytes also `model_bytes` and their share
    `keep_bytes`.
    """
    names = list(find_linears(dense, layers))
    have = {name for name, _ in model.named_modules()}
    lacking = [name for name in names if name not in have]
    require(not lacking, "model", "have the layers of `dense`", lacking)
    replaced = [model.get_submodule(name) for name in names]
    biases = sum(p.numel() for module in replaced for key, p in module.named_parameters() if key.endswith("bias"))
    targeted = sum(map(count_parameters, replaced)) - biases
    before = sum(layer.weight.numel() for layer in find_linears(dense, names).values())
    whole, whole_before = count_parameters(model), count_parameters(dense)
    counts = {
        "targeted_parameters": targeted,
        "keep_targeted": targeted / before,
        "model_parameters": whole,
        "keep_model": whole / whole_before,
    }
    if not with_bytes:
        return counts
    return counts | {"model_bytes": weight_bytes(model), "keep_bytes": weight_bytes(model) / weight_bytes(dense)}
