"""Weights of π³ from a file, a folder or the Hub, strictly: every tensor by name and shape."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lowrank.io.hub import found
from lowrank.pi3.model import Pi3, Pi3Config

OFFICIAL = "yyfz233/Pi3"
SMALL, PRETRAINED = (
    "small",
    Path(__file__).with_name("pretrained"),
)  # the model that `python -m lowrank.pi3.pretrain` made
WEIGHTS, ABOUT = "model.safetensors", "run.json"


def load_pi3(source: Path | str = OFFICIAL, config: Pi3Config | None = None) -> Pi3:
    """A π³ with its weights, float32, in evaluation mode, on the CPU.

    **Arguments:** `source`: a safetensors file, a folder with `model.safetensors`, the name of a repository on the Hub, or
    'small' for the small one of the report. `config`: its sizes; by default those in the `run.json` of a folder where there is
    one, else the published ones.

    **Raises:** `FileNotFoundError`: nothing there. `ValueError`: a file that is cut short or no safetensors file, or tensors
    that are missing, left over or of another shape; the message names the first.
    """
    path = PRETRAINED if source == SMALL else Path(source)
    if path.is_dir():
        if config is None and (path / ABOUT).exists():
            config = Pi3Config(**json.loads((path / ABOUT).read_text(encoding="utf8"))["config"])
        path = path / WEIGHTS
    if not path.exists():
        if source == SMALL:
            raise FileNotFoundError(
                f"the small model must lie in {PRETRAINED}: make it with python -m lowrank.pi3.pretrain."
            )
        if path.suffix == ".safetensors":
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
    # copies, for what is read stands in the file until it is touched
    own = {name: value.to(torch.float32, copy=True) for name, value in tensors.items()}
    model.load_state_dict(own, assign=True)
    return model.eval()


def _from_hub(name: str) -> Path:
    import huggingface_hub  # noqa: PLC0415

    return Path(huggingface_hub.hf_hub_download(name, WEIGHTS))
