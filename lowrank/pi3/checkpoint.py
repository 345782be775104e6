"""Weights of π³ from a file, a folder or the Hub, strictly: every tensor by name and shape."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lowrank.pi3.model import Pi3, Pi3Config
from lowrank.pi3.small import small_pi3
from lowrank.tasks.hub import found

OFFICIAL, FILE = "yyfz233/Pi3", "model.safetensors"
SMALL_NAME = "small"


def load_pi3(source: Path | str = OFFICIAL, config: Pi3Config | None = None) -> Pi3:
    """A π³ with its weights, float32, in evaluation mode, on the CPU.

    **Arguments:** `source`: a safetensors file, a folder with `model.safetensors`, the name of a repository on the Hub, or
    'small' for the small one of the report. `config`: its sizes, by default the published ones.

    **Raises:** `FileNotFoundError`: nothing there. `ValueError`: a file that is cut short or no safetensors file, or tensors
    that are missing, left over or of another shape; the message names the first.
    """
    if source == SMALL_NAME:
        return small_pi3()
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    if not path.exists():
        if path.suffix == ".safetensors" or path.name == FILE:
            raise FileNotFoundError(f"`source` must be a checkpoint, got {path}, which does not exist.")
        path = found("model", str(source), lambda: _from_hub(str(source)))
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`source` must be a whole safetensors file, got {path}: {error}") from error
    with torch.device("meta"):
        model = Pi3(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"`source` must hold the tensors of this configuration: {name} must be {wanted.get(name, 'absent')}, got "
                f"{given.get(name, 'none')} in {path}."
            )
    model.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return model.eval()


def _from_hub(name: str) -> Path:
    import huggingface_hub  # noqa: PLC0415

    return Path(huggingface_hub.hf_hub_download(name, FILE))
