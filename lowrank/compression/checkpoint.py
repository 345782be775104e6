"""Save and load compressed models: a folder with `model.safetensors`, the configuration of the base model, and `lowrank.json`.

Loading builds the base architecture without weights, inserts the recorded layers and reads the tensors. Every tensor is checked
by name and shape before memory is taken, and the outputs for a fixed input are compared with those at saving. No weight of the
dense model is needed, nothing is unpickled, and no code of the folder runs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Size, Tensor, nn

from lowrank.compression.architecture import insert_layers
from lowrank.compression.bases import check_wrappers, describe_base, save_config
from lowrank.compression.card import collect_card, format_card
from lowrank.compression.model_folder import CARD, FORMAT, METADATA, TENSORS, check_content, save_processor
from lowrank.compression.nested import ANY, cut_layers
from lowrank.compression.pretrained import (
    add_placeholders,
    drop_placeholders,
    is_saved_by_transformers,
    load_saved,
    set_record,
    write_pretrained_config,
)
from lowrank.compression.probes import check_probe
from lowrank.compression.rebuild import build_model, compare_shapes, plan_build, shapes_of
from lowrank.compression.record_schema import CompressedRecord
from lowrank.compression.stored_state import EXTRA, RECORD, check_state, put_buffers
from lowrank.factorization.storages import PIVOTED
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.files import open_safetensors, writing
from lowrank.io.hashing import hash_tensors
from lowrank.io.records import read_record
from lowrank.io.snapshots import fetch_folder
from lowrank.io.weights import distinct_tensors
from lowrank.nn.low_rank import move_pivot_bias
from lowrank.nn.nested import NestedLinear
from lowrank.nn.quantized import QuantizedLinear

UNKNOWN = "it is of neither transformers nor timm"


@check_arguments
def save_compressed(
    model: nn.Module,
    folder: Path | str,
    base: Mapping[str, Any] | None = None,
    processor: Any = None,
    card: bool | Mapping[str, Any] = True,
) -> dict[str, Any]:
    """Write a compressed model to a folder, whole or not at all.

    After `import lowrank`, the `from_pretrained` of transformers loads the folder of a transformers model too.

    **Arguments**

    - `model`: a model that `compress` has changed, or any other with layers of this library; it is not changed.
    - `folder`: a new or empty folder, or one with a compressed model, which is replaced.
    - `base`: how to build the base architecture, `{"timm": name, "options": {...}}` with the name of a timm model or model class
      and its keyword arguments. Models of transformers and of `timm.create_model` need none. For other models, and those that
      were changed by hand, pass the dense architecture to `load_compressed`.
    - `processor`: a tokenizer, image processor or other object with `save_pretrained`, to be saved beside the model. Default:
      None.
    - `card`: write a README.md that says how the model was compressed, how large it is and how it is loaded. A mapping adds what
      only you know: `base_model`, `license`, `calibration`, `quality`, see `CardRecord`. Default True.

    **Returns** the content of `lowrank.json`:

    - `format`: "lowrank.compressed/1".
    - `base`: the description of the base architecture, or None; `why`: the reason, if it could not be verified.
    - `model`: the hash of the dense weights, or None for a model that `compress` has not changed.
    - `layers`: layer -> its row in the table of `compress`, with its kind and sizes.
    - `parameters`, `indices`: numbers of stored elements; a quantised weight counts as if it were not.
    - `bytes`: of all stored tensors.
    - `tensors`: the hash of the stored tensors.
    - `tied`: name -> the name that its tensor is stored under, for tied weights.
    - `buffers`: names of stored buffers that are no part of the model's state.
    - `files`: names of the processor's files.
    - `extra`: name -> extra state that is no tensor.
    - `probe`: a fixed input and some of its outputs, which `load_compressed` compares; None if no input could be found.
    - `card`: what the model card says beside this, None without one.

    **Raises**

    - `ValueError`: a folder with other content; an unknown field of the card; a given base that builds another model; a model
      inside a wrapper or with adapters; a tensor that is sparse, quantised or not in memory; extra state that is not JSON; a
      processor that cannot be saved beside a model. The folder stays as it was.
    """
    folder = Path(folder)
    check_content(folder)
    check_wrappers(model)
    extra = check_state(model)
    tensors, tied = distinct_tensors(model)
    record: dict[str, Any] = getattr(model, RECORD, {})
    described = describe_base(model) if base is None else _as_json(base)
    with writing(folder) as partial:
        partial.mkdir()
        files = save_processor(processor, partial)
        save_config(model, partial)
        plan = plan_build(model, described, record.get("layers", {}), partial, base is not None)
        stored = tensors | plan.buffers
        replaced = write_pretrained_config(model, partial, plan.layers, None if plan.base else plan.why or UNKNOWN)
        metadata = {
            "format": FORMAT,
            "base": plan.base,
            "why": plan.why,
            "model": record.get("model"),
            "layers": plan.layers,
            **_count(model, tensors, stored),
            "tensors": hash_tensors(stored),
            "tied": tied,
            "buffers": list(plan.buffers),
            "files": files,
            "extra": extra,
            "probe": plan.probe,
            "card": collect_card(model, record.get("card"), card),
        }
        stored = add_placeholders(stored, plan.layers) if replaced else stored
        save_file(stored, partial / TENSORS, metadata={"format": "pt"})
        _write_record(metadata, partial)
    return metadata


def _count(model: nn.Module, tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, int]:
    """Count the elements of a state, and the bytes of all that is stored."""
    return {
        "parameters": sum(t.numel() for t in tensors.values() if t.is_floating_point()) + _count_quantised(model),
        "indices": sum(t.numel() for name, t in tensors.items() if name.endswith(".pivots")),
        "bytes": sum(t.nbytes for t in stored.values()),
    }


def _write_record(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write the record, and the card, if there is one."""
    (folder / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf8")
    if metadata["card"] is not None:
        (folder / CARD).write_text(format_card(metadata), encoding="utf8")


def _count_quantised(model: nn.Module) -> int:
    """Count the elements of quantised weights, less those of their scales."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(layer.out_features * layer.in_features - layer.scale.numel() for layer in layers)


def _as_json(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return a base as the folder will have it."""
    try:
        return json.loads(json.dumps(dict(base), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`base` must be made of JSON values, got {dict(base)}: {error}.") from error


@torch.inference_mode(False)  # the parameters may be trained
@check_arguments
def load_compressed(
    folder: Path | str,
    device: torch.device | str = "cpu",
    architecture: nn.Module | None = None,
    *,
    verify: bool = True,
    revision: str | None = None,
    keep: float | int | None = None,
) -> nn.Module:
    """Load a compressed model, in evaluation mode and in the dtypes it was saved in.

    **Arguments**

    - `folder`: a folder that `save_compressed` wrote, or `save_pretrained` of a compressed transformers model; or the name on the
      Hub, "user/name", that it was pushed to.
    - `device`: where the tensors go; default: the CPU.
    - `architecture`: for a model whose folder does not say how to build it, the dense model. It is changed in place and
      returned; its weights do not matter.
    - `verify`: run the model once, and compare its outputs with those at saving. Default True.
    - `revision`: of a model on the Hub, a commit, tag or branch. Pin a commit: others may change. Default: the newest commit.
    - `keep`: for a folder of `compress(..., keep="any")`: the share of the targeted parameters to cut it to, in (0, 1]. Default
      None: as it was saved.

    **Returns** the model.

    **Raises**

    - `FileNotFoundError`: no such folder, or a missing file; the Hub has no such model or revision, or cannot be reached.
    - `ValueError`: a damaged file; another format; a tensor that is missing, left over, or of another shape; other outputs; a
      `keep` for factors that are not at full rank, or too small.
    """
    folder = fetch_folder(folder, revision)
    if not (folder / METADATA).exists() and is_saved_by_transformers(folder) and architecture is None:
        return load_saved(folder, device)
    if missing := [name for name in (METADATA, TENSORS) if not (folder / name).exists()]:
        raise FileNotFoundError(
            f"`folder` must contain a model written by save_compressed, got {str(folder)!r} without {missing}."
        )
    metadata = read_record(folder / METADATA, FORMAT, CompressedRecord, "save_compressed", "folder")
    nested = any(layer.get("kind") == NestedLinear.storage for layer in metadata["layers"].values())
    rule = (
        f"be None for {str(folder)!r}, which does not hold factors at full rank, as `compress(..., keep={ANY!r})` does"
    )
    require(keep is None or nested, "keep", rule, keep)
    model = _build(metadata, folder, architecture)
    _fill(model, metadata, _read_tensors(folder, metadata, device))
    layers = {name: row for name, row in metadata["layers"].items() if "method" in row}
    set_record(model, {"model": metadata["model"], "layers": layers, "card": metadata.get("card")})
    model.to(device).eval()
    difference = check_probe(model, metadata["probe"]) if verify and metadata.get("probe") else None
    rule = f"give the outputs that it gave when {str(folder)!r} was written; `verify=False` loads it all the same"
    require(difference is None, "model", rule, difference)
    if keep is not None:
        cut_layers(model, keep)
    return model


def _read_tensors(folder: Path, metadata: Mapping[str, Any], device: torch.device | str) -> dict[str, Tensor]:
    """Read the tensors that the record was written for."""
    with open_safetensors(folder / TENSORS, "folder") as file:  # copies: a tensor as read stays mapped to the file
        tensors = {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}  # noqa: SIM118 (no mapping)
    tensors = drop_placeholders(tensors, metadata["layers"])
    if hash_tensors(tensors, len(metadata["tensors"])) != metadata["tensors"]:
        raise ValueError(
            f"`folder` must contain the tensors that {METADATA} was written for, got others in {str(folder)!r}."
        )
    return tensors


def _fill(model: nn.Module, metadata: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put the tensors into the model; weights that were tied are tied again."""
    for name in _with_former_bias(metadata, tensors):
        move_pivot_bias(tensors, name)
    absent = sorted(set(metadata.get("buffers", [])) - tensors.keys())
    require(not absent, "folder", f"have the buffers of {METADATA} in {TENSORS}", absent)
    buffers = {name: tensors.pop(name) for name in metadata.get("buffers", [])}
    model.load_state_dict(_untie(tensors, metadata["tied"]) | metadata.get("extra", {}), strict=True, assign=True)
    put_buffers(model, buffers)
    for name, stored in metadata["tied"].items():
        _tie_parameter(model, name, stored)


def _build(metadata: Mapping[str, Any], folder: Path, architecture: nn.Module | None) -> nn.Module:
    """Build the model, or change the given architecture, once the shapes of the file are known to fit."""
    with open_safetensors(folder / TENSORS, "folder") as file:
        stored = {name: Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    stored = drop_placeholders(stored, metadata["layers"])
    for name, kept in metadata["tied"].items():
        require(kept in stored, "folder", f"hold the tensor that {name!r} is tied to", kept)
    for name in _with_former_bias(metadata, stored):
        stored[f"{name}.pivot_bias"] = stored.pop(f"{name}.right.bias")
    shapes = {name: shape for name, shape in stored.items() if name not in metadata.get("buffers", [])}
    shapes = _untie(shapes, metadata["tied"]) | dict.fromkeys(metadata.get("extra", {}), Size())
    shapes = {name: Size() if name.split(".")[-1] == EXTRA else shape for name, shape in shapes.items()}
    if architecture is None and metadata["base"] is None:
        why = metadata.get("why") or UNKNOWN
        raise ValueError(
            f"`architecture` must be the dense model, because {str(folder)!r} does not build it ({why}), got None. A model of "
            "timm needs none if it is saved with `base={'timm': name, 'options': {...}}`."
        )
    if architecture is None:
        return build_model(metadata["base"], metadata["layers"], folder, shapes, "folder")
    insert_layers(architecture, metadata["layers"])
    compare_shapes(shapes_of(architecture.state_dict()), shapes, "folder")
    return architecture


def _with_former_bias(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[str]:
    """Return the pivoted layers whose pivots have their bias inside `right`, as folders had it once."""
    pivoted = (name for name, row in metadata["layers"].items() if row.get("kind") == PIVOTED.name)
    return [name for name in pivoted if f"{name}.right.bias" in tensors]


def _tie_parameter(model: nn.Module, name: str, stored: str) -> None:
    """Put the parameter called `stored` under a second name too."""
    (owner, key), (other_owner, other_key) = (path.rpartition(".")[::2] for path in (name, stored))
    setattr(model.get_submodule(owner), key, getattr(model.get_submodule(other_owner), other_key))


def _untie(tensors: Mapping[str, Any], tied: Mapping[str, str]) -> dict[str, Any]:
    """Return the whole state: what is stored, and the same under the tied names."""
    return {**tensors, **{name: tensors[stored] for name, stored in tied.items()}}
