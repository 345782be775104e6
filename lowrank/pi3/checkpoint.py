"""Load the weights of π³ from a file, a folder or the Hub, strictly: every tensor by name and shape."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from lowrank.io.arguments import check_arguments
from lowrank.io.files import open_safetensors
from lowrank.io.hub import load_or_explain
from lowrank.io.schemas import Schema, one_of, read_json
from lowrank.pi3.model import Pi3, Pi3Config

OFFICIAL = "yyfz233/Pi3"
SMALL_NAME = "small"
PRETRAINED = Path(__file__).with_name("pretrained")  # `python -m lowrank.pi3.pretrain` writes the small model here
WEIGHTS_FILE, METADATA_FILE = "model.safetensors", "run.json"


class _RunRecord(Schema):
    """Hold the sizes of the model of a folder."""

    config: dict[Annotated[str, one_of(field.name for field in fields(Pi3Config))], int | float]


@check_arguments
def load_pi3(source: Path | str = OFFICIAL, config: Pi3Config | None = None) -> Pi3:
    """Load a π³ in float32, in evaluation mode, on the CPU.

    **Arguments**

    - `source`: a safetensors file, a folder with `model.safetensors`, the name of a repository on the Hub, or 'small' for the
      small model of the embedded report. Default: the published weights.
    - `config`: its sizes. Default: those in the `run.json` of a folder if there is one, otherwise the published sizes.

    **Raises**

    - `FileNotFoundError`: no such file, folder or repository.
    - `ValueError`: a damaged file; a tensor that is missing, superfluous or of another shape. The message names the first.
    """
    path, config = _find_weights(source, config)
    with torch.device("meta"):
        model = Pi3(config)
    model.load_state_dict(_read_tensors(path, model), assign=True)
    return model.eval()


def _find_weights(source: Path | str, config: Pi3Config | None) -> tuple[Path, Pi3Config | None]:
    """Return the file of the weights, and the sizes if they are known."""
    path = PRETRAINED if source == SMALL_NAME else Path(source)
    if path.is_dir():
        if config is None and (path / METADATA_FILE).exists():
            config = Pi3Config(**read_json(path / METADATA_FILE, "source", _RunRecord)["config"])
        path = path / WEIGHTS_FILE
    if path.exists():
        return path, config
    if source == SMALL_NAME:
        raise FileNotFoundError(
            f"the small model must lie in {PRETRAINED}: make it with python -m lowrank.pi3.pretrain."
        )
    if path.suffix == ".safetensors" or path.is_absolute() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        rule = "be a checkpoint or the name of a repository, OWNER/NAME"
        raise FileNotFoundError(f"`source` must {rule}, got {str(path)!r}, which does not exist.")
    return load_or_explain("model", str(source), lambda: _download(str(source))), config


def _read_tensors(path: Path, model: Pi3) -> dict[str, Tensor]:
    """Read the tensors of a model in float32, if the file has them all, in their shapes, and no others."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with open_safetensors(path, "source") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for name in sorted(wanted.keys() | stored.keys()):
            if wanted.get(name) != stored.get(name):
                raise ValueError(
                    f"`source` must hold the tensors of this configuration: {name} must be {wanted.get(name, 'absent')}, "
                    f"got {stored.get(name, 'none')} in {path}."
                )
        # copies, because a tensor that is not copied changes with its file
        return {name: file.get_tensor(name).to(torch.float32, copy=True) for name in stored}


def _download(name: str) -> Path:
    import huggingface_hub  # noqa: PLC0415

    return Path(huggingface_hub.hf_hub_download(name, WEIGHTS_FILE))
