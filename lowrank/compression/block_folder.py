"""A folder with the new layers of each block that is done, so that a run that was stopped goes on with the next block."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank.calibration.on_demand import OnDemand
from lowrank.calibration.storage import hash_statistics
from lowrank.compression.checks import Statistics
from lowrank.compression.configuration import Configuration
from lowrank.io.checks import require
from lowrank.io.files import open_safetensors, writing
from lowrank.io.hashing import hash_model, hash_options, hash_tensors
from lowrank.io.records import read_record, write_record
from lowrank.io.schemas import Schema, one_of, parse_json
from lowrank.nn.batches import Batch
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.nn.nests import list_tensors
from lowrank.nn.surgery import copy_mode
from lowrank.nn.targets import find_linears

FORMAT = "lowrank.blocks/1"
IDENTITY = "identity.json"


def identify(
    model: nn.Module,
    ranks: Mapping[str, int],
    batches: Sequence[Batch],
    configuration: Configuration,
    statistics: Statistics | None,
) -> dict[str, Any]:
    """Describe all that the layers of a retargeted model follow from, as JSON.

    **Arguments**

    - `model`: the dense model.
    - `ranks`: layer name -> rank.
    - `batches`: the calibration data.
    - `configuration`: method, storage, centring and retargeting; its folder does not count.
    - `statistics`: of the dense model. Those that are collected on demand follow from the model and their own batches, and are
      not compared.
    """
    options = asdict(configuration)
    options["retarget"].pop("folder")
    given = {} if statistics is None or isinstance(statistics, OnDemand) else {n: statistics[n] for n in ranks}
    tensors = {str(place): leaf for place, leaf in enumerate(list_tensors(list(batches)))}
    content = {
        "model": hash_model(model),
        "ranks": hash_options({name: int(rank) for name, rank in ranks.items()}),
        "batches": [len(batches), hash_tensors(tensors)],
        "configuration": options,
        "statistics": hash_options({name: hash_statistics(moments) for name, moments in given.items()}),
    }
    return json.loads(json.dumps(content))  # as it is read again: lists, no tuples


class _BlockRow(Schema):
    """Hold the fields of a row that its layer is built from."""

    storage: Annotated[str, one_of(["dense", *FACTORED_LAYERS])]
    rank: PositiveInt | None
    inputs: PositiveInt = Field(alias="in")
    out: PositiveInt

    @model_validator(mode="after")
    def _check_rank(self) -> "_BlockRow":
        if self.rank is None and self.storage != "dense":
            raise ValueError("have a rank unless it is dense")
        return self


class BlockFolder:
    """Write the layers of finished blocks, one safetensors file each, and read them again.

    **Arguments**

    - `folder`: a new or empty folder, or that of a run which was stopped.
    - `identity`: from `identify`.

    **Raises**

    - `ValueError`: a folder with the blocks of another run, or with other content.
    """

    def __init__(self, folder: Path | str, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        if not (self.folder / IDENTITY).exists():
            empty = not self.folder.exists() or not any(self.folder.iterdir())
            require(empty, "folder", "be new, empty or that of a run which was stopped", str(folder))
            write_record(self.folder / IDENTITY, FORMAT, identity)
        found = read_record(self.folder / IDENTITY, FORMAT, dict[str, Any], "retarget_layers", "folder")
        other = [key for key, value in identity.items() if found.get(key) != value]
        require(not other, "folder", f"hold blocks of this run: not with other {', '.join(other)}", str(folder))

    def write(self, block: str, modules: Mapping[str, nn.Module], rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Write a finished block, whole or not at all.

        **Arguments**

        - `block`: its name.
        - `modules`: layer name -> new layer, for those that are not dense.
        - `rows`: layer name -> row of its table, for all its layers.
        """
        tensors = {f"{n}.{key}": t.contiguous() for n, m in modules.items() for key, t in m.state_dict().items()}
        with writing(self._path(block)) as partial:
            save_file(tensors, partial, metadata={"rows": json.dumps(dict(rows))})

    def read(self, block: str, model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, dict[str, Any]]] | None:
        """Return what `write` was given for a block, with the layers on the devices of the dense ones; None if it is not done.

        **Arguments**

        - `block`: its name.
        - `model`: the dense model.

        **Raises**

        - `ValueError`: a damaged file.
        """
        if not self._path(block).exists():
            return None
        with open_safetensors(self._path(block), "folder") as file:
            text = (file.metadata() or {}).get("rows", "")
            rows: dict[str, Any] = parse_json(text, "folder", self._path(block), dict[str, _BlockRow])
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (no mapping)
        dense = find_linears(model, rows) if rows else {}
        factored = {name: row for name, row in rows.items() if row["storage"] != "dense"}
        try:
            return {name: _build(dense[name], name, row, tensors) for name, row in factored.items()}, rows
        except RuntimeError as error:  # of `load_state_dict`, a line per tensor
            reason = " ".join(str(error).split())
            raise ValueError(
                f"`folder` must hold the layers of its rows, got {str(self._path(block))!r}: {reason}"
            ) from error

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"


def _build(dense: Any, name: str, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        layer = FACTORED_LAYERS[row["storage"]](row["in"], row["out"], row["rank"], bias=dense.bias is not None)
    state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    layer.load_state_dict(state, assign=True)
    return copy_mode(layer.to(dense.weight.device), dense)
