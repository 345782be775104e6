"""Verify that a folder builds a model again: every tensor by name and shape, and its outputs for a fixed input."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Size, Tensor, nn

from lowrank.compression.architecture import describe_layers, insert_layers
from lowrank.compression.bases import build_skeleton
from lowrank.compression.probes import (
    SAME,
    compare_outputs,
    describe_probe,
    find_difference,
    find_dtype,
    find_probe,
    run_probe,
)
from lowrank.compression.stored_state import EXTRA, find_buffers, put_buffers
from lowrank.io.checks import require
from lowrank.nn.batches import device_of

SPARE = 2**26  # elements of buffers that a model may compute by itself, besides as many as its file has


@dataclass(frozen=True)
class BuildPlan:
    """Hold what a folder says of how to build a model.

    **Arguments**

    - `base`: the dense architecture, None if the folder does not say.
    - `why`: why it does not, None if nothing is wrong.
    - `layers`: layer -> description, see `describe_layers`.
    - `buffers`: name -> buffer that no state holds, and that the base does not have as the model has it.
    - `probe`: inputs and outputs, see `describe_probe`; None if no proposed input fits the model.
    """

    base: dict[str, Any] | None
    why: str | None
    layers: dict[str, dict[str, Any]]
    buffers: dict[str, Tensor]
    probe: dict[str, Any] | None


def plan_build(
    model: nn.Module, base: dict[str, Any] | None, rows: Mapping[str, Any], folder: Path, given: bool
) -> BuildPlan:
    """Find out how a model is built again, and verify it.

    **Arguments**

    - `model`: the model to save; it is not changed.
    - `base`: how to build its dense architecture, or None.
    - `rows`: layer -> row of the table that `compress` returned.
    - `folder`: has the configuration files already.
    - `given`: whether the caller gave `base`. Otherwise a base that does not fit is left out, and the plan says why.

    **Raises**

    - `ValueError`: a given base builds another model.
    """
    found = find_probe(model)
    probe = None if found is None else describe_probe(*found, find_dtype(model))
    why = None
    if base is not None:
        try:
            layers, buffers = _verify(model, base, rows, folder, found)
        except Exception as error:  # a library builds another model with any error
            if given:
                raise
            why = str(error)
        else:
            return BuildPlan(base, None, layers, buffers, probe)
    return BuildPlan(None, why, describe_layers(model, None, rows), find_buffers(model, None), probe)


def _verify(
    model: nn.Module, base: dict[str, Any], rows: Mapping[str, Any], folder: Path, found: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Build the model as `load_compressed` will, and compare it; return its layers, and the buffers that it lacks."""
    state = model.state_dict()
    skeleton = build_skeleton(base, folder, len(state))
    layers = describe_layers(model, skeleton, rows)
    rebuilt = build_model(base, layers, folder, shapes_of(state), "base")
    buffers = find_buffers(model, rebuilt)
    rebuilt.load_state_dict(state, assign=True)
    put_buffers(rebuilt, buffers)
    rebuilt.to(device_of(model)).eval()
    difference = find_difference(model, rebuilt)
    if found is None:
        problem = difference
    else:
        inputs, outputs = found
        problem = compare_outputs(run_probe(rebuilt, inputs), outputs, SAME[find_dtype(model)])
        problem = problem and f"{problem} ({difference or 'all modules are alike'})"
    if problem:
        raise ValueError(f"`base` must build the model again, got {problem}.")
    return layers, buffers


def build_model(
    base: Mapping[str, Any], layers: Mapping[str, Any], folder: Path, shapes: Mapping[str, Size], argument: str
) -> nn.Module:
    """Build the architecture of a compressed model with parameters on the meta device, once its shapes are known to fit.

    The first attempt takes no memory, however large the description says the model is.

    **Arguments**

    - `base`, `layers`: see `BuildPlan`.
    - `folder`: with the configuration files.
    - `shapes`: tensor name -> shape, as the file has them.
    - `argument`: the argument to name in errors.

    **Raises**

    - `ValueError`: a tensor that is missing, left over, or of another shape; see also `build_skeleton` and `insert_layers`.
    """
    for tensors in (len(shapes), None):
        model = build_skeleton(base, folder, tensors)
        insert_layers(model, layers)
        compare_shapes(shapes_of(state := model.state_dict()), shapes, argument)
        room = sum(shape.numel() for shape in shapes.values()) + SPARE
        needed = sum(buffer.numel() for name, buffer in model.named_buffers() if name not in state)
        rule = f"need at most {room} elements for buffers that no file holds"
        require(needed <= room, argument, rule, needed)
    return model


def shapes_of(state: Mapping[str, Any]) -> dict[str, Size]:
    """Return the shape of every tensor of a state; extra state may have any, and counts as empty."""
    return {name: Size() if name.split(".")[-1] == EXTRA else value.shape for name, value in state.items()}


def compare_shapes(expected: Mapping[str, Size], shapes: Mapping[str, Size], argument: str) -> None:
    """Raise an error that names tensors that are missing, left over or of another shape.

    **Arguments**

    - `expected`: tensor name -> shape of the architecture.
    - `shapes`: tensor name -> shape of the file.
    - `argument`: the argument to name in errors.
    """
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} is left over" for name in shapes if name not in expected]
    problems += [
        f"{name} has shape {tuple(shapes[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"`{argument}` must fit the model's tensors, got: {'; '.join(problems[:5])}{more}.")
