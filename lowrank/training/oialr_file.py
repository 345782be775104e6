"""The one file that holds an OIALR training: the model's tensors, and where the training stood, in safetensors."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank.io.weights import distinct_tensors

FORMAT = "lowrank.oialr/1"


def write_training(path: Path, model: nn.Module, state: dict[str, Any]) -> None:
    """Writes a model and the `state_dict` of its `OIALR`, whole or not at all."""
    tensors, tied = distinct_tensors(model)
    monitor = dict(state["monitor"])
    previous = monitor.pop("previous")
    seen = {f"{layer}:{place}": part for layer, parts in previous.items() for place, part in enumerate(parts)}
    about = {"format": FORMAT, "state": json.dumps(state | {"monitor": monitor}), "tied": json.dumps(tied)}
    partial = path.with_name(f".{path.name}.partial")
    everything = {f"model:{n}": t for n, t in tensors.items()} | {f"previous:{n}": t for n, t in seen.items()}
    save_file(everything, partial, metadata=about)
    os.replace(partial, path)


def read_training(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model's tensors and the state that `write_training` wrote.

    **Raises:** `FileNotFoundError`. `ValueError`: not such a file.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"`path` must be a file written by OIALR.save, got {str(path)!r}, which does not exist."
        )
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"`path` must be a whole safetensors file, got {str(path)!r}: {error}.") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"`path` must have format {FORMAT!r}, got {about.get('format')!r} in {str(path)!r}.")
    state, tied = json.loads(about["state"]), json.loads(about["tied"])
    own = {name.removeprefix("model:"): tensor for name, tensor in tensors.items() if name.startswith("model:")}
    previous: dict[str, list[Tensor]] = {}
    for name in sorted(tensors.keys() - {f"model:{n}" for n in own}):
        previous.setdefault(name.removeprefix("previous:").rpartition(":")[0], []).append(tensors[name])
    return own | {name: own[kept] for name, kept in tied.items()}, state | {
        "monitor": state["monitor"] | {"previous": previous}
    }
