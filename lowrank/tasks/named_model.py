"""Load any model by name: from the Hub, a folder, a compressed folder or timm, with what turns data into its inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.compression.checkpoint import load_compressed
from lowrank.compression.model_folder import METADATA
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.hub import NO_CODE, find_model_class, load_or_explain, load_pretrained, load_tokenizer, split_gguf
from lowrank.tasks.wheels import find_model

TIMM = "timm:"
TEXT, IMAGES = "input_ids", "pixel_values"  # names of the inputs of transformers models
# Objective of `lowrank.tasks.evaluation` -> the table of transformers with the classes whose logits it judges.
HEADS = {
    "language_modelling": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "classification": (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    ),
}


@dataclass(frozen=True)
class NamedModel:
    """Hold a model, and what turns data into its inputs.

    **Arguments**

    - `name`: as it was asked for.
    - `model`: in evaluation mode.
    - `reads`: 'input_ids' or 'pixel_values'.
    - `processor`: a tokenizer, an image processor of transformers, or a transform of timm.
    - `objective`: how its outputs are judged, a key of `OBJECTIVES`; None for a model without a head.
    """

    name: str
    model: Any
    reads: str
    processor: Any
    objective: str | None

    @property
    def device(self) -> torch.device:
        """Return the device of the first parameter."""
        return next(self.model.parameters()).device

    def read_images(self, images: Sequence[Any]) -> Tensor:
        """Turn RGB images of PIL into `(images, 3, height, width)`, in the dtype of the model."""
        if hasattr(self.processor, "save_pretrained"):
            pixels = self.processor(images=list(images), return_tensors="pt")[IMAGES]
        else:
            pixels = torch.stack([self.processor(image) for image in images])
        return pixels.to(next(self.model.parameters()).dtype)


@check_arguments
def load_named(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    processor: str | None = None,
) -> NamedModel:
    """Load a model by name, in evaluation mode. A transformers model is of the class that its configuration names.

    **Arguments**

    - `name`: Hub name, folder of a transformers model, folder that `save_compressed` wrote, a GGUF file (a path, or
      `owner/repository/file.gguf` on the Hub), `timm:NAME`, or `packaged:NAME`, see `lowrank.tasks.packaged`.
    - `revision`: branch, tag or commit on the Hub, of transformers models. Default None, the newest.
    - `dtype`: of the weights, the name of a floating torch dtype; default 'auto', as they are stored.
    - `device`: as torch names it. Default None: the GPU if there is one.
    - `processor`: Hub name or folder of the tokenizer or image processor. Default None: as `name`.

    **Raises**

    - `FileNotFoundError`: no such model, or it cannot be reached; no tokenizer.
    - `ValueError`: an unknown dtype or device; a damaged file; files that lack weights; a model that reads neither text nor
      images.
    """
    weights = None if dtype == "auto" else getattr(torch, dtype, None)
    floating = dtype == "auto" or (isinstance(weights, torch.dtype) and weights.is_floating_point)
    require(floating, "dtype", "be 'auto' or the name of a floating torch dtype", dtype)
    place = find_device(device)
    asked, name = name, find_model(name)
    if name.startswith(TIMM):
        model = _load_timm(name.removeprefix(TIMM))
    elif (Path(name) / METADATA).exists():
        model = load_compressed(name)
    else:
        model = load_pretrained(_find_class(name, revision), name, whole=True, dtype=dtype, revision=revision or "main")
    model = (model if weights is None else model.to(weights)).to(place).eval()
    reads = getattr(model, "main_input_name", IMAGES)  # models of timm have none
    return NamedModel(
        asked, model, reads, _load_processor(model, reads, processor or name, revision), _objective(model)
    )


def find_device(name: str | None) -> torch.device:
    """Return a device by name; None stands for the GPU if there is one, and the CPU otherwise.

    **Raises**

    - `ValueError`: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"`device` must be a device of this machine, got {name!r} ({reason}).") from error


def _load_timm(name: str) -> nn.Module:
    import timm  # noqa: PLC0415

    return load_or_explain("timm model", name, lambda: timm.create_model(name, pretrained=True))


def _find_class(name: str, revision: str | None) -> str:
    """Return the name of the class that the configuration of a model names, AutoModel if it names none."""
    import transformers  # noqa: PLC0415

    place, file = split_gguf(name)
    load: Callable[[], Any] = lambda: transformers.AutoConfig.from_pretrained(  # noqa: E731
        place, revision=revision or "main", **file, **NO_CODE
    )
    named = load_or_explain("model", name, load).architectures or []
    return next((found for found in named if find_model_class(found) is not None), "AutoModel")


def _load_processor(model: Any, reads: str, name: str, revision: str | None) -> Any:
    if hasattr(model, "pretrained_cfg"):
        from timm.data.config import resolve_data_config  # noqa: PLC0415
        from timm.data.transforms_factory import create_transform  # noqa: PLC0415

        return create_transform(**resolve_data_config(model=model))
    require(reads in (TEXT, IMAGES), "model", f"read {TEXT!r} (text) or {IMAGES!r} (images)", reads)
    if reads == TEXT:
        return load_tokenizer(name, revision)
    import transformers  # noqa: PLC0415

    options = {"revision": revision or "main", "use_fast": True, **NO_CODE}
    load = lambda: transformers.AutoImageProcessor.from_pretrained(name, **options)  # noqa: E731
    return load_or_explain("image processor", name, load)


def _objective(model: Any) -> str | None:
    if hasattr(model, "pretrained_cfg"):
        return "classification" if getattr(model, "num_classes", 0) > 1 else None
    from transformers.models.auto import modeling_auto  # noqa: PLC0415

    classes = {
        objective: {name for table in tables for name in getattr(modeling_auto, table).values()}
        for objective, tables in HEADS.items()
    }
    found = next((objective for objective, names in classes.items() if type(model).__name__ in names), None)
    return "regression" if found == "classification" and model.config.num_labels == 1 else found
