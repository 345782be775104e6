"""Compare a model with the one that its folder builds: the outputs for a fixed input, and the modules one by one.

An input is described as JSON: for each argument of the model a shape, and for whole numbers what they are below. Its values
follow from a formula, so that every machine and version gets the same.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.io.checks import require
from lowrank.nn.batches import device_of, eval_mode

Inputs = dict[str, dict[str, Any]]  # argument -> shape, and what whole numbers are below; "" is the first by position
TOKENS, IMAGES, SAMPLES, FRAMES = 12, (32, 64, 224), 4000, 64
VALUES = 64  # outputs that a folder keeps, evenly spaced
LARGEST = 2**24  # elements of an input: a stranger's folder must not fill the memory
PACKAGES = ("torch", "transformers", "timm")
NO_MATTER = {"training", "gradient_checkpointing", "name_or_path"}  # attributes that change no output
# The largest relative distance of the outputs: here, where the same kernels run, and on another machine.
SAME = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ELSEWHERE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}


def propose_inputs(model: Any) -> Iterator[Inputs]:
    """Yield inputs for a model, the likeliest first, from its configuration, its arguments and its first layer."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        known = dict(_propose_named(config))
        taken = [name for name in inspect.signature(model.forward).parameters if name in known]
        main = getattr(model, "main_input_name", "input_ids")
        yield {name: known[name] for name in taken}
        if main in known:
            yield {name: known[name] for name in taken if name in (main, "decoder_input_ids")}
            yield {"": known[main]}
    first = next((module for module in model.modules() if isinstance(module, tuple(FIRST))), None)
    propose = next((FIRST[kind] for kind in FIRST if isinstance(first, kind)), None)
    for shape in [] if propose is None else propose(model, first):
        yield {"": shape}


def _propose_named(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name the inputs whose sizes a configuration of transformers tells."""
    text, vision = config.get_text_config(), getattr(config, "vision_config", config)
    words = getattr(text, "vocab_size", None)
    if words:
        tokens = min(TOKENS, getattr(text, "max_position_embeddings", None) or TOKENS)
        yield "input_ids", {"shape": [1, tokens], "below": words}
        yield "decoder_input_ids", {"shape": [1, (tokens + 1) // 2], "below": words}
    if size := getattr(vision, "image_size", None):
        sides = list(size) if isinstance(size, Sequence) else [size, size]
        yield "pixel_values", {"shape": [1, getattr(vision, "num_channels", 3), *sides]}
    if bins := getattr(config, "num_mel_bins", None):
        yield "input_features", {"shape": [1, bins, 2 * getattr(config, "max_source_positions", FRAMES)]}
    yield "input_values", {"shape": [1, SAMPLES]}


def _propose_image(model: Any, layer: nn.Conv2d) -> Iterator[dict[str, Any]]:
    known = [
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (None,))[1:],
    ]
    for size in (*(list(size) for size in known if size), *([side, side] for side in IMAGES)):
        yield {"shape": [1, layer.in_channels, *size]}


def _propose_rows(model: Any, layer: nn.Linear) -> Iterator[dict[str, Any]]:
    yield {"shape": [1, TOKENS, layer.in_features]}
    yield {"shape": [TOKENS, layer.in_features]}


FIRST: dict[type[nn.Module], Any] = {
    nn.Embedding: lambda _, layer: [{"shape": [1, TOKENS], "below": layer.num_embeddings}],
    nn.Conv1d: lambda _, layer: [{"shape": [1, layer.in_channels, FRAMES]}],
    nn.Conv2d: _propose_image,
    nn.Linear: _propose_rows,
}


def _make_input(about: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    count = prod(about["shape"])
    require(0 < count <= LARGEST, "folder", f"describe an input of at most {LARGEST} elements", about["shape"])
    places = torch.arange(count, dtype=torch.float64)
    if below := about.get("below"):
        least = min(3, below - 1)  # the first are special tokens
        return (least + (places * 7919 + 17) % (below - least)).long().view(about["shape"]).to(device)
    return torch.sin(0.37 * places.square() + 0.1).view(about["shape"]).to(device, dtype)


@torch.no_grad()
def run_probe(model: nn.Module, inputs: Inputs) -> Tensor:
    """Run a model in evaluation mode on described inputs, with copies of its buffers; it stays as it was.

    **Arguments**

    - `model`: any PyTorch module.
    - `inputs`: see `propose_inputs`.

    **Returns** all floating-point outputs, `(n,)`, float64, on the CPU.
    """
    device, dtype = device_of(model), find_dtype(model)
    made = {name: _make_input(about, dtype, device) for name, about in inputs.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    positional = (made.pop(""),) if "" in made else ()
    with eval_mode(model), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        output = torch.func.functional_call(model, buffers, positional, made)
    parts = [part.double().flatten().cpu() for part in _find_tensors(output) if part.is_floating_point()]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def find_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter of 16 bits or more, float32 without one."""
    return next((p.dtype for p in model.parameters() if p.dtype in SAME), torch.float32)


def _find_tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _find_tensors(part)


def find_probe(model: nn.Module) -> tuple[Inputs, Tensor] | None:
    """Find an input that a model accepts, and its outputs; None if none of the proposed ones gives finite outputs."""
    for inputs in propose_inputs(model):
        try:
            outputs = run_probe(model, inputs)
        except Exception:  # a model refuses inputs that it is not made for with any error
            continue
        if len(outputs) and bool(outputs.isfinite().all()):
            return inputs, outputs
    return None


def compare_outputs(found: Tensor, wanted: Tensor, tolerance: float) -> str | None:
    """Describe how two vectors of outputs differ, None if they agree.

    **Arguments**

    - `found`, `wanted`: the vectors.
    - `tolerance`: the largest relative distance.
    """
    if found.shape != wanted.shape:
        return f"{len(found)} outputs instead of {len(wanted)}"
    distance = float((found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))
    if isfinite(distance) and distance <= tolerance:
        return None
    return f"outputs that differ by {distance:.2g} of their norm, more than {tolerance:g}"


def describe_probe(inputs: Inputs, outputs: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Describe inputs and outputs as JSON, for `check_probe`.

    **Arguments**

    - `inputs`, `outputs`: from `find_probe`.
    - `dtype`: of the model, see `find_dtype`.
    """
    return {
        "inputs": inputs,
        "dtype": str(dtype).removeprefix("torch."),
        "count": len(outputs),
        "outputs": _pick(outputs).tolist(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def check_probe(model: nn.Module, about: Mapping[str, Any]) -> str | None:
    """Describe how the outputs of a loaded model differ from those of the saved one.

    **Arguments**

    - `model`: the loaded model.
    - `about`: from `describe_probe`.

    **Returns** None if they agree, or if this device cannot run the model.
    """
    try:
        outputs = run_probe(model, about["inputs"])
    except (NotImplementedError, torch.OutOfMemoryError):  # of this device: nothing can be said here
        return None
    except Exception as error:  # a model that is built otherwise refuses the input with any error
        return f"a model that refuses what the saved one took ({error})"
    wanted = torch.tensor(about["outputs"], dtype=torch.float64)
    if len(outputs) != about["count"]:
        return f"{len(outputs)} outputs instead of {about['count']}"
    difference = compare_outputs(_pick(outputs), wanted, ELSEWHERE[getattr(torch, about["dtype"])])
    others = [f"{name} {then}" for name, then in about["versions"].items() if then != _version(name)]
    saved = f" (it was saved with {', '.join(others)})" if others else ""
    return difference and difference + saved


def _pick(outputs: Tensor) -> Tensor:
    return outputs[torch.linspace(0, len(outputs) - 1, min(VALUES, len(outputs))).long()]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_difference(model: nn.Module, rebuilt: nn.Module) -> str | None:
    """Find the first module whose class or public plain attribute differs, and describe it.

    **Arguments**

    - `model`: the model to save.
    - `rebuilt`: what its folder builds.

    **Returns** None if there is none.
    """
    others = dict(rebuilt.named_modules())
    for name, module in model.named_modules():
        other = others.get(name)
        if type(other) is not type(module):
            return f"{name or 'the model'} is {type(module).__name__}, not {type(other).__name__}"
        for key, value in vars(module).items():
            found = vars(other).get(key, value)
            if key not in NO_MATTER and not key.startswith("_") and _is_plain(value) and repr(found) != repr(value):
                return f"{name or 'the model'} has {key} {value!r}, not {found!r}"
    return None


def _is_plain(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, int | float | str) for part in parts)
