"""LoRA adapters with exact ranks on a frozen model, which may be quantised, and the four starts that they can have."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor, nn

from lowrank.calibration.padding import BatchPadding, Padding, token_rows
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.hub import load_pretrained
from lowrank.io.weights import Source, read_tensors
from lowrank.lora.deltas import delta_factors
from lowrank.lora.rank_config import RankConfig
from lowrank.lora.warm_start import check_warm_start, set_factors
from lowrank.nn.batches import Batch, batches_on, compute_logits, device_of, eval_mode, move_batch
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.training.loop import seed_everything

QUANTISATIONS: dict[str, dict[str, Any]] = {  # -> options of transformers.BitsAndBytesConfig
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "8bit": {"load_in_8bit": True},
}
ADAPTER_STARTS = {"zero": True, "warm": True, "pissa": "pissa", "eva": "eva"}  # -> peft's `init_lora_weights`


def load_model(
    folder: Path | str,
    model_class: Any,
    *,
    quantised: str = "",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Load a transformers model from a folder in evaluation mode, on the accelerator if there is one.

    **Arguments**

    - `folder`: a folder that `save_pretrained` wrote, or a Hub name.
    - `model_class`: a model class of transformers, or an Auto class.
    - `quantised`: '', '4bit' (NF4) or '8bit'. The latter need bitsandbytes and freeze the model, for adapters only.
    - `gradient_checkpointing`: recompute the activations of blocks in the backward pass, to save memory.

    **Raises**

    - `ValueError`: an unknown kind of quantisation.
    - `FileNotFoundError`: no such checkpoint.
    - `ImportError`: bitsandbytes is missing, or does not support the device.
    """
    require(quantised in ("", *QUANTISATIONS), "quantised", f"be '' or one of {sorted(QUANTISATIONS)}", quantised)
    options: dict[str, Any] = {"torch_dtype": "auto"}
    if quantised:
        import transformers  # noqa: PLC0415

        options["quantization_config"] = transformers.BitsAndBytesConfig(**QUANTISATIONS[quantised])
        options["device_map"] = {"": PartialState().device}
    model = load_pretrained(model_class.__name__, str(folder), **options)
    checkpointing = {"use_reentrant": False}
    if quantised:
        import peft  # noqa: PLC0415

        return peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs=checkpointing,
        ).eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()  # else no gradient reaches the blocks below the first adapter
    return model.to(PartialState().device).eval()


@torch.inference_mode(False)  # the factors are trained
@check_arguments
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
    """Wrap a model with a LoRA adapter of the ranks of a config; peft changes the model in place.

    **Arguments**

    - `model`: any model that peft can wrap.
    - `config`: the rank of every module.
    - `start`: the initial factors. 'zero': A random and B = 0, peft's default. 'warm': the leading factors of the change from
      `base` to `tuned`, so that the wrapped model is the best approximation of the tuned one at these ranks. 'pissa': the
      leading factors of the weight. 'eva': B = 0 and A the leading directions of the inputs; needs one rank for all modules,
      and spreads it anew.
    - `seed`: of random factors.
    - `base`, `tuned`: the two checkpoints, for 'warm' only.
    - `batches`: inputs that reach every module, for 'eva' only.
    - `options`: of `RankConfig.lora_config`: `scaling`, `use_rslora`, `modules_to_save` and so on. With 'warm', the modules to
      save start from `tuned`.

    **Returns** a `peft.PeftModel` in evaluation mode.

    **Raises**

    - `ValueError`, before the model is changed: an unknown start; a start without its checkpoints or batches; a warm start of a
      module that has no place for the factors, or with `use_dora`; a compressed layer, which has adapters on its `left` and
      `right`; as `RankConfig.lora_config`.

    **Reference** Meng et al., PiSSA, arXiv:2404.02948; Paischer et al., EVA, arXiv:2410.07170; both as in peft.
    """
    import peft  # noqa: PLC0415

    batches = list(batches)
    _check_start(start, config, batches, base, tuned)
    names = config.find_modules(model)
    _check_targets(model, names.values())
    if start == "eva":
        options |= {"eva_config": peft.EvaConfig()}  # the defaults; peft warns if it has to fill them in
    factors: Mapping[str, tuple[Tensor, Tensor]] = {}
    if start == "warm" and base is not None and tuned is not None:  # before anything is changed: they may not fit
        check_warm_start(model, names.values(), bool(options.get("use_dora")))
        factors = delta_factors(base, tuned, config.module_ranks, progress=False)
    lora = config.lora_config(model, init_lora_weights=ADAPTER_STARTS[start], **options)
    seed_everything(seed)
    untyped: Any = model  # peft's annotation asks for a transformers model, but any module works
    with _ignore_renamed_attribute():
        adapted: Any = peft.get_peft_model(untyped, lora, low_cpu_mem_usage=start == "eva")
    if start == "eva":
        _start_from_inputs(adapted, batches)
    if start == "warm" and tuned is not None:
        set_factors(adapted, names, factors)
        _set_saved_modules(adapted, read_tensors(tuned, options.get("modules_to_save") or ()))
    return adapted.eval()


def load_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> Any:
    """Load an adapter that peft's `save_pretrained` wrote.

    **Arguments**

    - `model`: a plain model to wrap, or a `peft.PeftModel` to add another adapter to; `set_adapter` switches between them.
    - `folder`: the folder of the adapter.
    - `name`: name of the adapter in the model.

    **Returns** a `peft.PeftModel`.

    **Raises**

    - `ValueError`, `OSError`: from peft, if the folder has no adapter or one of another model.
    """
    import peft  # noqa: PLC0415

    untyped: Any = model
    with _ignore_renamed_attribute():
        if isinstance(model, peft.PeftModel):
            untyped.load_adapter(str(folder), adapter_name=name)
            return untyped
        return peft.PeftModel.from_pretrained(untyped, str(folder), adapter_name=name)


def _check_targets(model: nn.Module, names: Iterable[str]) -> None:
    """Check that no adapter is meant for a compressed layer as a whole, which peft does not know."""
    for name in names:
        rule = f"name plain layers: {name!r} is compressed, its layers are '{name}.left' and '{name}.right'"
        require(not isinstance(model.get_submodule(name), tuple(FACTORED_LAYERS.values())), "config", rule, name)


def _check_start(
    start: str, config: RankConfig, batches: list[Batch], base: Source | None, tuned: Source | None
) -> None:
    require(start in ADAPTER_STARTS, "start", f"be one of {sorted(ADAPTER_STARTS)}", start)
    if start == "eva" and len(ranks := set(config.module_ranks.values())) > 1:
        raise ValueError(f"`config` must have one rank for all modules for `start` 'eva', got {sorted(ranks)}.")
    if start == "eva" and not batches:
        raise ValueError("`batches` must have inputs for `start` 'eva', got none.")
    if start == "warm" and (base is None or tuned is None):
        raise ValueError("`base` and `tuned` must name the two checkpoints for `start` 'warm'.")


@contextmanager
def _ignore_renamed_attribute() -> Iterator[None]:
    """Silence the warning that transformers gives because peft uses the old name of an attribute."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _start_from_inputs(adapted: Any, batches: list[Batch]) -> None:
    from peft.tuners.lora.eva import initialize_lora_eva_weights  # noqa: PLC0415

    padding = Padding(adapted, {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")})
    with eval_mode(adapted), adapted.disable_adapter():  # before peft watches: this may run the model
        batches = list(batches_on(batches, device_of(adapted)))
        masks = [padding.read(batch) for batch in batches]
    initialize_lora_eva_weights(
        adapted,
        [_PaddedInputs(batch, mask) for batch, mask in zip(batches, masks, strict=True)],
        forward_fn=lambda model, inputs: compute_logits(model, inputs.batch),
        prepare_model_inputs_fn=lambda inputs, config: inputs.padding,
        prepare_layer_inputs_fn=_select_rows,
        show_progress_bar=False,
    )


class _PaddedInputs(NamedTuple):
    """Hold a batch and its padding, so that peft moves them as one."""

    batch: Batch
    padding: BatchPadding | None

    def to(self, device: torch.device) -> "_PaddedInputs":
        return self._replace(batch=move_batch(self.batch, device))


def _select_rows(inputs: Any, padding: BatchPadding | None, name: str) -> Tensor:
    """Return the inputs of a layer without padding, `(tokens, in)`."""
    return token_rows(inputs[0] if isinstance(inputs, tuple) else inputs, padding, name)


@torch.no_grad()
def _set_saved_modules(adapted: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        copy = adapted.base_model.model.get_submodule(module).modules_to_save["default"]
        getattr(copy, parameter).copy_(tensor)
