"""Folders that `from_pretrained` of transformers reads: what their `config.json` says of layers that are not as in the base.

The factors of a layer are stored under its name, and `quantization_config` says which layers to put in. Each weight that they
replace is stored too, as a placeholder without elements: without this library, transformers finds a weight of another shape and
refuses the folder, where it would otherwise draw random weights.
"""

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank.compression.architecture import LAYER_KINDS, describe_layers
from lowrank.compression.stored_state import RECORD
from lowrank.io.checks import require
from lowrank.io.hub import NO_CODE, find_model_class, load_or_explain, read_config
from lowrank.nn.quantized import QuantizedLinear
from lowrank.nn.surgery import PackedLinear
from lowrank.nn.usv import USV_LAYERS

METHOD, PRETRAINED_FORMAT = "lowrank", "lowrank.pretrained/1"
CONFIG = "config.json"
KEYS = (
    "kind",
    "in",
    "out",
    "rank",
    "bias",
    "parts",
    "dtype",
    "bits",
    "group",
)  # of a description: what is needed to build the layer
OWN_LAYERS = (*LAYER_KINDS.values(), *USV_LAYERS.values(), PackedLinear, QuantizedLinear)
T = TypeVar("T")


def describe_config(layers: Mapping[str, Mapping[str, Any]] | None, why: str | None = None) -> dict[str, Any]:
    """Describe layers as `quantization_config` has them.

    **Arguments**

    - `layers`: layer -> description, see `describe_layers`; None if the base architecture could not be verified.
    - `why`: the reason, if it could not. Default None.
    """
    described = None
    if layers is not None:
        rows = {name: row for name, row in layers.items() if row.get("kind")}
        described = {name: {key: row[key] for key in KEYS if key in row} for name, row in rows.items()}
    return {"quant_method": METHOD, "format": PRETRAINED_FORMAT, "layers": described} | ({"why": why} if why else {})


def describe_replaced(model: Any) -> dict[str, Any]:
    """Describe the layers of a transformers model that differ from those that its configuration builds.

    **Returns** layer -> description, see `describe_layers`.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        skeleton = type(model)(copy.deepcopy(model.config))
    return {name: row for name, row in describe_layers(model, skeleton, {}).items() if row.get("kind")}


def find_placeholders(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Find the names of the weights that layers replace, and that a folder holds as empty tensors.

    A linear layer in the place of a `Conv1D` has a weight of the same name, and parts of a packed layer have no weight before.

    **Arguments**

    - `layers`: layer -> description, see `describe_layers`.
    """
    kinds = {name: row.get("kind") for name, row in layers.items()}
    replaced = [name for name, kind in kinds.items() if kind and kind != "linear"]
    return [f"{name}.weight" for name in replaced if kinds.get(name.rpartition(".")[0]) != "packed"]


def add_placeholders(tensors: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Add a tensor without elements for each weight that layers replace.

    **Arguments**

    - `tensors`: name -> tensor, the state of the model.
    - `layers`: layer -> description, see `describe_layers`.
    """
    return {**tensors, **{name: torch.empty(0) for name in find_placeholders(layers)}}


def drop_placeholders(tensors: Mapping[str, T], layers: Mapping[str, Mapping[str, Any]]) -> dict[str, T]:
    """Return tensors, or shapes, without those of the weights that layers replace.

    **Arguments**

    - `tensors`: name -> tensor or shape.
    - `layers`: layer -> description, see `describe_layers`.
    """
    placeholders = set(find_placeholders(layers))
    return {name: tensor for name, tensor in tensors.items() if name not in placeholders}


def write_pretrained_config(
    model: nn.Module, folder: Path, layers: Mapping[str, Mapping[str, Any]], why: str | None
) -> bool:
    """Add to the `config.json` of a folder what `from_pretrained` needs, if it is that of a transformers model.

    **Arguments**

    - `model`: the compressed model.
    - `folder`: has the configuration files already.
    - `layers`: layer -> description, see `describe_layers`.
    - `why`: why its base architecture could not be verified, None if it was. Then `from_pretrained` refuses the folder.

    **Returns** whether the weights that the layers replace must be stored as placeholders.
    """
    path = folder / CONFIG
    if not path.is_file() or not hasattr(model, "save_pretrained"):
        return False
    config = json.loads(path.read_text(encoding="utf8"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    config["architectures"] = [type(model).__name__]
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    replaced = any(row.get("kind") for row in layers.values())
    if replaced:
        config["quantization_config"] = describe_config(None if why else layers, why)
    elif is_ours(config.get("quantization_config")):
        del config["quantization_config"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf8")
    return replaced


def is_ours(config: Any) -> bool:
    """Return True if a `quantization_config`, an object or what a file holds of it, is one of this library."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return method == METHOD


def set_record(model: nn.Module, record: Mapping[str, Any] | None) -> None:
    """Set the record of what was done to a model, and make `save_pretrained` write the layers that it has now.

    **Arguments**

    - `model`: any PyTorch module.
    - `record`: the hash of its dense weights and the rows of its layers; None for a model that is dense again.
    """
    if record is not None:
        setattr(model, RECORD, record)
    elif hasattr(model, RECORD):
        delattr(model, RECORD)
    _update_quantizers(model)


def _update_quantizers(model: nn.Module) -> None:
    """Give each transformers model that has layers of this library the quantiser that saves them; take it from others."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return
    for module in model.modules():
        if isinstance(module, library.PreTrainedModel):
            _update_one(module)


def _update_one(model: Any) -> None:
    from lowrank.compression.quantizer import LowRankConfig, LowRankQuantizer  # noqa: PLC0415 (needs transformers)

    quantizer = getattr(model, "hf_quantizer", None)
    if not any(isinstance(part, OWN_LAYERS) for part in model.modules()):
        if isinstance(quantizer, LowRankQuantizer):
            quantizer.remove_quantization_config(model)
    elif quantizer is None:
        model.hf_quantizer = LowRankQuantizer(LowRankConfig({}))  # pyright: ignore[reportArgumentType]
        if is_ours(getattr(model.config, "quantization_config", None)):  # as a file has it, not as an object
            model.config.quantization_config = model.hf_quantizer.quantization_config


def load_saved(folder: Path, device: torch.device | str) -> nn.Module:
    """Load what `save_pretrained` has written of a compressed model; the class is the one that its `config.json` names.

    **Arguments**

    - `folder`: the folder.
    - `device`: where the tensors go.

    **Raises**

    - `ValueError`: a `config.json` that names no model class of transformers; weights that do not fit it.
    """
    names = getattr(read_config(folder), "architectures", None) or [None]
    model_class: Any = find_model_class(names[0])
    require(model_class is not None, "folder", f"name a model class of transformers in its {CONFIG}", names[0])
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, **NO_CODE}
    return load_or_explain("model", str(folder), lambda: model_class.from_pretrained(folder, **options)).to(device)


def is_saved_by_transformers(folder: Path) -> bool:
    """Return True if a folder has a `config.json` with a `quantization_config` of this library."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and is_ours(config.get("quantization_config"))
