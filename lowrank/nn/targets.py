"""Find layers of a model by name or by pattern.

An entry of a list of layers is a dotted module name, or a regular expression that must match a whole name.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.patterns import matches
from lowrank.io.tensor_places import byte_range
from lowrank.io.weights import check_weight, match_stacks
from lowrank.nn.plain import find_obstacle
from lowrank.nn.quantized import QuantizedLinear

# Every linear layer inside a numbered block: `encoder.layer.0.…`, `model.layers.0.…`, `blocks.0.…`. Embeddings, poolers,
# classifiers and `lm_head` stand outside the blocks, so one pattern serves BERT, Llama, OPT, ViT and their relatives.
BLOCKS = (r".*\.\d+\..*|\d+\..*",)

# Names of output layers and embeddings in transformers, timm and torchvision.
HEADS_AND_EMBEDDINGS = (
    r"(.*\.)?(head|heads|lm_head|cls|classifier|pre_classifier|score|qa_outputs)(\..*)?|fc",
    r"(.*\.)?\w*embed\w*(\..*)?",
)


@check_arguments
def find_linears(model: nn.Module, layers: Iterable[str] = BLOCKS) -> dict[str, nn.Linear]:
    """Find the linear layers that an entry names or matches.

    A pattern leaves out layers that only look linear, see `lowrank.nn.plain.find_obstacle`; `find_left_out` tells them.

    **Arguments**

    - `model`: any PyTorch module; it is not changed.
    - `layers`: names or patterns; by default all linear layers inside numbered blocks.

    **Returns** name -> layer, without repeats, in the order in which the model declares them.

    **Raises**

    - `ValueError`: no entry, or a single string instead of a list; an entry that matches no `nn.Linear` (but perhaps a stack of
      matrices), none that is plain, or is no regular expression; a model that is a linear layer itself, and holds none; a weight
      of packed bytes or without elements.
    """
    return _sort_out(model, layers)[0]


def find_left_out(model: nn.Module, layers: Iterable[str] = BLOCKS) -> dict[str, str]:
    """Find the layers that patterns match but `find_linears` leaves out, because they only look linear.

    **Arguments**

    - `model`, `layers`: as for `find_linears`.

    **Returns** name -> the reason, in the order of the model.

    **Raises**

    - `ValueError`: as for `find_linears`.
    """
    return _sort_out(model, layers)[1]


def _sort_out(model: nn.Module, layers: Iterable[str]) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Return the plain linear layers that entries match, and why others that they match are not plain."""
    layers = list_entries("layers", layers)
    refuse_root(model, nn.Linear)
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | QuantizedLinear)}
    transposed = [name for name, module in modules.items() if is_conv1d(module)]
    reasons = {name: find_obstacle(module, modules[name.rpartition(".")[0]]) for name, module in linears.items()}
    odd = {name: reason for name, reason in reasons.items() if reason}
    selected: set[str] = set()
    for entry in layers:
        matched = {entry} & linears.keys() or {name for name in linears if matches(name, entry)}
        if not matched and (other := next((name for name in transposed if matches(name, entry)), None)):
            raise ValueError(
                f"`layers` must match nn.Linear modules, got {entry!r}, which matches {other!r}, a Conv1D: call "
                "lowrank.nn.surgery.unify_linears(model) first."
            )
        if not matched and (stacks := find_stacks(model, [entry])):
            name, shape = next(iter(stacks.items()))
            raise ValueError(
                f"`layers` must match nn.Linear modules, got {entry!r}, which matches {name!r}, a stack of matrices of shape "
                f"{shape}: leave it out."
            )
        if not matched:
            raise ValueError(
                f"`layers` must match nn.Linear modules of the model, got {entry!r}; it has: {_first(linears)} ..."
            )
        if matched <= odd.keys():
            name = next(name for name in odd if name in matched)
            raise ValueError(f"`layers` must match plain linear layers, got {entry!r}: of {name!r}, {odd[name]}.")
        selected |= matched
    plain = {
        name: module
        for name, module in linears.items()
        if isinstance(module, nn.Linear) and name in selected - odd.keys()
    }
    for name, layer in plain.items():
        check_weight(layer.weight, name, "model")
    return plain, {name: reason for name, reason in odd.items() if name in selected}


def refuse_root(model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> None:
    """Raise an error for a model that is a layer itself: nothing holds it, so it cannot be replaced in place.

    **Arguments**

    - `model`: any PyTorch module.
    - `kinds`: classes of the layers to replace.

    **Raises**

    - `ValueError`: the model is of one of these classes.
    """
    if isinstance(model, kinds):
        name = type(model).__name__
        raise ValueError(f"`model` must hold the layers, got one that is a {name} itself: pass nn.Sequential(model).")


def find_stacks(model: nn.Module, layers: Iterable[str] = BLOCKS) -> dict[str, tuple[int, ...]]:
    """Find the parameters that are stacks of matrices, as experts are stored: no function here handles them.

    **Arguments**

    - `model`: any PyTorch module; it is not changed.
    - `layers`: names of parameters or modules, or patterns; by default all inside numbered blocks.

    **Returns** name -> (matrices, rows, columns), in the order of the model.
    """
    convolutions = nn.Conv1d | nn.ConvTranspose1d
    kernels = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, convolutions)}
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if name not in kernels}
    return match_stacks(shapes, layers)


def select_names(names: Iterable[str], include: Iterable[str], exclude: Iterable[str] = ()) -> list[str]:
    """Select the names that an entry of `include` matches and no entry of `exclude` matches.

    **Arguments**

    - `names`: dotted module names.
    - `include`: names or patterns; each must match a name.
    - `exclude`: names or patterns; by default none.

    **Returns** the selected names, in the order of `names`.

    **Raises**

    - `ValueError`: a single string instead of a list; no entry in `include`; an entry that is no regular expression; one of
      `include` that matches no name.
    """
    names = list(names)
    include, exclude = list_entries("include", include), list_entries("exclude", exclude, least=0)
    found = {entry: {name for name in names if matches(name, entry, "include")} for entry in include}
    if (idle := next((entry for entry, matched in found.items() if not matched), None)) is not None:
        raise ValueError(f"`include` must match layers of the model, got {idle!r}; it has: {_first(names)} ...")
    included = set().union(*found.values())
    excluded = {name for name in included for entry in exclude if matches(name, entry, "exclude")}
    return [name for name in names if name in included - excluded]


def find_weights(model: nn.Module, include: Iterable[str] = (".*",), exclude: Iterable[str] = ()) -> dict[str, Tensor]:
    """Find the weights of linear layers, convolutions and attention projections.

    `nn.MultiheadAttention` keeps its projections as bare parameters. A packed one is called `<module>.in_proj`, separate ones
    `<module>.q_proj`, `<module>.k_proj` and `<module>.v_proj`.

    **Arguments**

    - `model`: any PyTorch module; it is not changed.
    - `include`, `exclude`: names or patterns of layers, see `select_names`; by default all layers.

    **Returns** layer -> weight, in the order of the model.

    **Raises**

    - `ValueError`: as in `select_names`.
    """
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | QuantizedLinear):
            weights[name] = module.weight
        elif isinstance(module, nn.MultiheadAttention):
            for part in ("in_proj", "q_proj", "k_proj", "v_proj"):
                if (weight := getattr(module, f"{part}_weight")) is not None:
                    weights[f"{name}.{part}"] = weight
    return {name: weights[name] for name in select_names(weights, include, exclude)}


def find_shared_weights(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, list[str]]:
    """Find the layers whose weight is a parameter or buffer of another module too, as in tied embeddings, or a part of one.

    **Arguments**

    - `model`: the whole model.
    - `layers`: name -> layer, the layers to look at.

    **Returns** layer -> all names of its weight in the model, and of tensors that overlap it, for shared weights only.
    """
    ranges: dict[int, list[tuple[str, int, int]]] = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        storage, start, end = byte_range(tensor)
        ranges.setdefault(storage, []).append((name, start, end))
    aliases: dict[str, list[str]] = {}
    for name, layer in layers.items():
        storage, start, end = byte_range(layer.weight)
        aliases[name] = [other for other, first, last in ranges.get(storage, ()) if first < end and start < last]
    return {name: alias for name, alias in aliases.items() if len(alias) > 1}


def is_conv1d(module: nn.Module | None) -> bool:
    """Return True if the module is a `Conv1D` of transformers: a linear layer that stores W transposed, `(in, out)`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def split_block(name: str) -> tuple[str, str]:
    """Split the name of a layer into its block and its place there.

    `model.layers.3.mlp.up_proj` gives ('model.layers.3', 'mlp.up_proj'). In a model of stages, each block of a stage is a block
    (`stages.1.blocks.2`). Numbered modules inside a block, such as experts, are no blocks.

    **Returns** (block, place); ('', name) outside blocks.
    """
    block = re.match(r"(?:.*?\.)?\d+(?:\.(?:blocks|layers)\.\d+)?(?=\.)", name)
    return (block[0], name[block.end() + 1 :]) if block else ("", name)


def depth_and_kind(name: str) -> tuple[int, str]:
    """Split the name of a layer into the number of its block and its place there.

    `model.layers.3.mlp.up_proj` gives (3, 'mlp.up_proj'). In a model of stages, the number is the number of the stage.

    **Returns** (depth, kind); the depth is -1 outside blocks.
    """
    block, kind = split_block(name)
    number = re.search(r"\d+", block)
    return (int(number[0]) if number else -1), kind


def _first(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:6]) or "none at all"


def list_entries(argument: str, entries: Iterable[str], least: int = 1) -> list[str]:
    """Return names or patterns as a list.

    **Arguments**

    - `argument`: its name, for the message.
    - `entries`: names or patterns.
    - `least`: int, how many there must be. Default 1.

    **Raises**

    - `ValueError`: a single string, or too few.
    """
    if isinstance(entries, str):
        raise ValueError(f"`{argument}` must be a list of names or patterns, got the single string {entries!r}.")
    entries = list(entries)
    require(len(entries) >= least, argument, "hold at least one name or pattern", entries)
    return entries
