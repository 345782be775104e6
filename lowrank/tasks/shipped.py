"""The dense models that come with this package: weights in half precision, each beside a JSON file that says how it was made.

They are data: a training elsewhere ends with other weights, because it amplifies rounding, and every table would follow.
`lowrank.tasks.pretraining` writes the files.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt
from safetensors.torch import load_model, save_model
from torch import nn

from lowrank.io.checks import require
from lowrank.io.files import writing
from lowrank.io.hashing import hash_files, hash_options
from lowrank.io.schemas import Schema, read_json

PRETRAINED = Path(__file__).with_name("pretrained")
BLOCK = 25  # steps that each recorded loss is the mean of
IDENTITY = ("task", "recipe")  # the entries of the JSON file that the key is the hash of


class _RecipeRecord(Schema):
    steps: NonNegativeInt


class _ShippedRecord(Schema):
    """Hold the entries that a model is found, read and told by."""

    key: str
    weights: str
    task: dict[str, Any]
    recipe: _RecipeRecord
    loss: list[float]
    validation: dict[str, float]
    wall_s: float
    environment: dict[str, Any]


@dataclass(frozen=True)
class Shipped:
    """Describe a model that comes with this package.

    **Arguments**

    - `weights`: its safetensors file.
    - `metadata`: the content of the JSON file beside it.
    """

    weights: Path
    metadata: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return its name among `lowrank.tasks.pretraining.MODELS`."""
        return self.weights.stem

    @property
    def history(self) -> list[dict[str, int | float]]:
        """Return the mean loss of every `BLOCK` steps of its training, each with the last of these steps."""
        steps, losses = self.metadata["recipe"]["steps"], self.metadata["loss"]
        return [{"step": min((i + 1) * BLOCK, steps) - 1, "loss": loss} for i, loss in enumerate(losses)]

    def load(self, model: nn.Module) -> nn.Module:
        """Fill a model of the same task with the weights, in the model's own precision, and return it.

        **Raises**

        - `ValueError`: the file is missing, or is not the one that was written; the message names the remedy.
        """
        found = hash_files([self.weights]) if self.weights.exists() else None
        require(found == self.metadata["weights"], str(self.weights), _rule("have the hash", self.name), found)
        load_model(model, self.weights)
        return model


def find_shipped(made_from: Mapping[str, Any]) -> Shipped | None:
    """Find the model that was made from a task and a recipe, None if no such model comes with this package.

    **Arguments**

    - `made_from`: `lowrank.tasks.baseline.baseline_key` of the two.

    **Raises**

    - `ValueError`: a JSON file is not the one that was written; the message names the remedy.
    """
    wanted = hash_options(made_from)
    return next((shipped for shipped in list_shipped() if shipped.metadata["key"] == wanted), None)


def list_shipped() -> list[Shipped]:
    """List all models that come with this package, by name.

    **Raises**

    - `ValueError`: a JSON file is not the one that was written; the message names the remedy.
    """
    return [Shipped(path.with_suffix(".safetensors"), _read(path)) for path in sorted(PRETRAINED.glob("*.json"))]


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file. One whose key no longer fits may be the model that is asked for, so that it must not be passed over."""
    try:
        metadata = read_json(path, path.name, _ShippedRecord)
        found = hash_options({name: metadata[name] for name in IDENTITY})
        whole = metadata["key"] == found
    except ValueError as error:
        metadata, found, whole = {}, str(error), False
    require(whole, str(path), _rule("have the key, the hash of task and recipe,", path.stem), found)
    return metadata


def _rule(rule: str, name: str) -> str:
    remedy = f"restore both files of {name!r}, or train it anew with python -m lowrank.tasks.pretrain {name} --ship"
    return f"{rule} that {name}.json says ({remedy})"


def round_weights(model: nn.Module) -> None:
    """Round the parameters and buffers of a model in place to what half precision holds; whole numbers stay."""
    with torch.no_grad():
        for value in _floats(model):
            value.copy_(value.half())


def _floats(model: nn.Module) -> Iterator[torch.Tensor]:
    return (value for value in model.state_dict().values() if value.is_floating_point())


def write_shipped(name: str, model: nn.Module, metadata: Mapping[str, Any]) -> Shipped:
    """Write the two files of a model, in half precision.

    **Arguments**

    - `name`: a key of `lowrank.tasks.pretraining.MODELS`.
    - `model`: rounded already, so that what was measured on it holds for the file.
    - `metadata`: JSON, with the entries of `_ShippedRecord` but for `key` and `weights`.
    """
    weights, description = PRETRAINED / f"{name}.safetensors", PRETRAINED / f"{name}.json"
    with writing(weights) as path:
        save_model(copy.deepcopy(model).half(), str(path))
    key = hash_options({entry: metadata[entry] for entry in IDENTITY})
    content = {"key": key, "weights": hash_files([weights]), **metadata}
    with writing(description) as path:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")
    return Shipped(weights, content)
