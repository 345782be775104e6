"""What transformers calls to load and save compressed models: a quantiser with the name `lowrank`.

`import lowrank` is enough: this module is imported when transformers loads its own quantisers. `from_pretrained` then builds the
dense architecture without weights, puts the layers in that `config.json` records, and reads the tensors by name. No code of the
folder runs. Its sizes are compared with those of its files before memory is taken, and a tensor that is missing is an error.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank.compression.architecture import has_module, insert_layers
from lowrank.compression.bases import check_wrappers
from lowrank.compression.pretrained import (
    CONFIG,
    METHOD,
    PRETRAINED_FORMAT,
    add_placeholders,
    describe_config,
    describe_replaced,
    find_placeholders,
)
from lowrank.compression.rebuild import SPARE
from lowrank.compression.record_schema import PretrainedRecord
from lowrank.io.checks import require
from lowrank.io.files import open_safetensors
from lowrank.io.schemas import check_schema
from lowrank.nn.skeletons import check_counts

MOST_LAYERS = 10_000  # that a configuration may count before the files with the tensors are known


class LowRankConfig(QuantizationConfigMixin):
    """Hold `quantization_config` of a `config.json`: the layers that are not as in the base architecture.

    **Arguments**

    - `layers`: layer -> `kind`, `in`, `out`, `rank`, `bias`, or `kind` and `parts` for a packed projection.
    - `format`: "lowrank.pretrained/1".
    - `quant_method`: "lowrank".
    - `why`: why the folder does not say how to build the model, None if it does.
    - `other`: keys of later versions; they are not kept.

    **Raises**

    - `ValueError`: another format, a field that breaks the schema, or a folder that does not say how to build its model.
    """

    def __init__(
        self,
        layers: dict[str, Any] | None = None,
        format: str = PRETRAINED_FORMAT,  # noqa: A002 (the key of the file)
        quant_method: str = METHOD,
        why: str | None = None,
        **other: Any,
    ) -> None:
        require(format == PRETRAINED_FORMAT, "quantization_config", f"have format {PRETRAINED_FORMAT!r}", format)
        if layers is None:
            raise ValueError(
                f"the folder does not say how to build its model ({why or 'it has no layers'}): "
                "pass the dense model to lowrank.load_compressed(folder, architecture=...)."
            )
        check_schema({"layers": layers}, PretrainedRecord, "quantization_config", CONFIG)
        vars(self).update(describe_config(layers))


class LowRankQuantizer(HfQuantizer):
    """Put recorded layers into a model of transformers before its weights are loaded, and record them when it is saved."""

    requires_calibration = True  # a dense model is compressed by `compress`, not at loading
    quantization_config: Any

    def update_attn_implementation(self, config: Any) -> Any:
        """Check that a configuration does not count layers without end; transformers calls this before it builds the model."""
        check_counts(config.to_dict(), MOST_LAYERS)
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        layers = locate_layers(model, self.quantization_config.layers)
        insert_layers(model, layers)
        _check_sizes(model, checkpoint_files or ())
        names = "|".join(map(re.escape, find_placeholders(layers)))
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *([rf"(^|\.)({names})$"] if names else ()),
        }
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name in locate_layers(model, self.quantization_config.layers):
            layer = model.get_submodule(name)
            tensors = layer.state_dict(keep_vars=True)
            missing = [f"{name}.{key}" for key, tensor in tensors.items() if not (tensor.is_meta or _is_loaded(tensor))]
            require(not missing, "folder", "have the tensors of all recorded layers", missing)
            layer.load_state_dict({}, strict=False)  # nothing but what layers do after loading: they recompute indices
        model.is_quantized = False  # the parameters are plain: they may be cast, trained and offloaded
        return model

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Return the state with placeholders, and record the layers in the configuration; `save_pretrained` calls this first.

        With adapters in the model, transformers saves those alone, and nothing changes.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        check_wrappers(model)
        layers = describe_replaced(model)
        if not layers:
            self.remove_quantization_config(model)
            return None, {}
        self.quantization_config = model.config.quantization_config = LowRankConfig(layers)
        return add_placeholders(model.state_dict(), layers), {}

    def is_serializable(self) -> Any:
        """Return True: `save_pretrained` writes what `from_pretrained` reads."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Return True: factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Return True: factors are trained as they are, without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Return True: factored layers are two products."""
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from lowrank.compression.replace import fold  # noqa: PLC0415 (which imports this module)

        return fold(model)


def locate_layers(model: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return layers under the names that a model has for them.

    A folder may be of a model with a head and be loaded without it, or the other way round. Layers of a head that the model does
    not have are left out, as transformers leaves out their weights.

    **Arguments**

    - `model`: a model of transformers, before or after the layers are put in.
    - `layers`: layer -> description, parents before their parts.
    """
    prefix = f"{model.base_model_prefix}."
    shorter = any(name.startswith(prefix) and not has_module(model, name) for name in layers)
    located: dict[str, str] = {}
    for name in layers:
        parent, _, part = name.rpartition(".")
        candidates = [name, name.removeprefix(prefix), prefix + name]
        if parent in located:
            located[name] = f"{located[parent]}.{part}"
        elif found := next((each for each in candidates if has_module(model, each)), None):
            located[name] = found
        elif not shorter or name.startswith(prefix):
            raise ValueError(f"`folder` must record layers that {type(model).__name__} has, got {name!r}.")
    return {located[name]: row for name, row in layers.items() if name in located}


def _check_sizes(model: nn.Module, files: Iterable[str]) -> None:
    """Check that a model, still on the meta device, does not need far more memory than its files have tensors for."""
    stored = 0
    for path in files:
        rule = "hold its weights in safetensors files"
        require(str(path).endswith(".safetensors"), "folder", rule, Path(path).name)
        with open_safetensors(path, "folder") as file:
            stored += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if files:
        require(needed <= 2 * stored + SPARE, "folder", f"describe a model of its {stored} elements", needed)


def _is_loaded(tensor: Any) -> bool:
    """Return True if transformers has read a tensor; it marks those, and draws random numbers for all others."""
    return getattr(tensor, "_is_hf_initialized", False)


# Not as decorators, which would hide the types of both classes.
register_quantization_config(METHOD)(LowRankConfig)
register_quantizer(METHOD)(LowRankQuantizer)
