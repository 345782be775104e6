"""LoRA adapters with given ranks: the frozen model below them, perhaps quantised, and the four ways in which they can start."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from lowrank.io.hub import load_pretrained
from lowrank.io.weights import Source, read_tensors
from lowrank.lora.deltas import delta_factors
from lowrank.lora.rank_config import RankConfig
from lowrank.nn.batches import Batch, logits, token_mask
from lowrank.training.loop import seed_everything

QUANTISED: dict[str, dict[str, Any]] = {  # as transformers' BitsAndBytesConfig takes them
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "8bit": {"load_in_8bit": True},
}
STARTS = {"zero": True, "warm": True, "pissa": "pissa", "eva": "eva"}  # -> `init_lora_weights` of peft


def load_model(
    folder: Path | str,
    model_class: Any,
    *,
    quantised: str = "",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """A transformers model from a folder, on the accelerator where there is one, in evaluation mode.

    **Arguments:** `model_class`: its class in transformers, or an Auto class. `quantised`: '', '4bit' (NF4) or '8bit', which
    need bitsandbytes; such a model is frozen, for adapters only. `gradient_checkpointing`: activations of blocks are computed
    again in the backward pass.

    **Raises:** `ValueError`: an unknown kind of quantisation. `FileNotFoundError`: no such checkpoint. `ImportError`: no
    bitsandbytes, or no device that it works on.
    """
    if quantised and quantised not in QUANTISED:
        raise ValueError(f"`quantised` must be '' or one of {sorted(QUANTISED)}, got {quantised!r}.")
    options: dict[str, Any] = {"torch_dtype": "auto"}
    if quantised:
        import transformers  # noqa: PLC0415

        options["quantization_config"] = transformers.BitsAndBytesConfig(**QUANTISED[quantised])
        options["device_map"] = {"": PartialState().device}
    model = load_pretrained(model_class.__name__, str(folder), **options)
    again = {"use_reentrant": False}
    if quantised:
        import peft  # noqa: PLC0415

        return peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=gradient_checkpointing, gradient_checkpointing_kwargs=again
        ).eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        model.enable_input_require_grads()  # else nothing below the first adapter asks for gradients
    return model.to(PartialState().device).eval()


def add_adapter(
    model: nn.Module,
    config: RankConfig,
    *,
    start: str = "zero",
    seed: int = 0,
    base: Source | None = None,
    tuned: Source | None = None,
    batches: Iterable[Batch] = (),
    **options: Any,
) -> Any:
    """Wraps a model with a LoRA adapter of the ranks of a config; the model is changed in place, as peft does.

    **Arguments:** `start`: 'zero', peft's own, where B = 0; 'warm', the leading factors of what fine-tuning changed, so that
    the wrapped model starts as the best approximation of the tuned one at these ranks; 'pissa', the leading factors of the
    weight; 'eva', those of its inputs: one rank for all modules, each of which the batches must reach; it spreads them anew.
    `seed`: of new factors. `base`, `tuned`: the two checkpoints of a warm start. `batches`: inputs for EVA. `options`: of
    `RankConfig.lora_config`: `scaling`, `use_rslora`, `modules_to_save` and so on; with a warm start modules that are saved
    whole start from `tuned`.

    **Returns:** `peft.PeftModel`, in evaluation mode.

    **Raises:** `ValueError`: an unknown start; a start without its checkpoints or batches; as `RankConfig.lora_config`.

    **Reference:** Meng et al., PiSSA, arXiv:2404.02948; Paischer et al., EVA, arXiv:2410.07170; both as peft has them.
    """
    import peft  # noqa: PLC0415
    from peft.tuners.lora.eva import initialize_lora_eva_weights  # noqa: PLC0415

    if start not in STARTS:
        raise ValueError(f"`start` must be one of {sorted(STARTS)}, got {start!r}.")
    batches = list(batches)
    if start == "eva" and len(given := set(config.module_ranks.values())) > 1:
        raise ValueError(f"`config` must have one rank for all modules for `start` 'eva', got {sorted(given)}.")
    if start == "eva" and not batches:
        raise ValueError("`batches` must hold inputs for `start` 'eva', got none.")
    if start == "warm" and (base is None or tuned is None):
        raise ValueError("`base` and `tuned` must name the two checkpoints for `start` 'warm'.")
    own_names = config.located(model)
    if start == "eva":
        options |= {"eva_config": peft.EvaConfig()}  # its defaults; peft warns where it has to take them itself
    lora = config.lora_config(model, init_lora_weights=STARTS[start], **options)
    seed_everything(seed)
    whole: Any = model  # peft asks for a class of transformers, and takes any module
    with _without_old_names():
        adapted: Any = peft.get_peft_model(whole, lora, low_cpu_mem_usage=start == "eva")
    if start == "eva":
        initialize_lora_eva_weights(
            adapted,
            batches,
            forward_fn=logits,
            prepare_model_inputs_fn=lambda batch, config: token_mask(batch),
            prepare_layer_inputs_fn=_rows,
            show_progress_bar=False,
        )
    if start == "warm" and base is not None and tuned is not None:
        _set_factors(adapted, own_names, delta_factors(base, tuned, config.module_ranks, progress=False))
        _set_saved(adapted, read_tensors(tuned, options.get("modules_to_save") or ()))
    return adapted.eval()


def load_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> Any:
    """An adapter that peft's `save_pretrained` wrote: around a plain model, or beside the adapters of a `PeftModel`, where
    `set_adapter(name)` switches between them.

    **Returns:** `peft.PeftModel`.

    **Raises:** `ValueError`, `OSError`: as peft, where the folder holds no adapter or one of another model.
    """
    import peft  # noqa: PLC0415

    whole: Any = model
    with _without_old_names():
        if isinstance(model, peft.PeftModel):
            whole.load_adapter(str(folder), adapter_name=name)
            return whole
        return peft.PeftModel.from_pretrained(whole, str(folder), adapter_name=name)


@contextmanager
def _without_old_names() -> Iterator[None]:
    """peft asks transformers for something by its old name, and transformers says so each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _rows(inputs: Any, mask: Tensor | None, name: str) -> Tensor:
    """The inputs of a layer, `(tokens, in)`, without padding."""
    rows = inputs[0] if isinstance(inputs, tuple) else inputs
    return rows.flatten(0, -2) if mask is None else rows[mask]


@torch.no_grad()
def _set_factors(adapted: Any, own_names: Mapping[str, str], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (left, right) in factors.items():
        layer = adapted.base_model.model.get_submodule(own_names[name])
        layer.lora_B["default"].weight.copy_(left / layer.scaling["default"])
        layer.lora_A["default"].weight.copy_(right)


@torch.no_grad()
def _set_saved(adapted: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        kept = adapted.base_model.model.get_submodule(module).modules_to_save["default"]
        getattr(kept, parameter).copy_(tensor)
