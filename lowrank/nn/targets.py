"""Which layers a method works on: dotted module names, or patterns of them."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

# Every linear layer inside a numbered block: `encoder.layer.0.…`, `model.layers.0.…`, `blocks.0.…`. Embeddings, poolers,
# classifiers and `lm_head` stand outside the blocks, so one pattern serves BERT, Llama, OPT, ViT and their relatives.
BLOCKS = (r".*\.\d+\..*|\d+\..*",)

# Output layers and embeddings, as transformers, timm and torchvision call them.
ENDS = (
    r"(.*\.)?(head|heads|lm_head|cls|classifier|pre_classifier|score|qa_outputs)(\..*)?|fc",
    r"(.*\.)?\w*embed\w*(\..*)?",
)


def find_linears(model: nn.Module, layers: Iterable[str] = BLOCKS) -> dict[str, nn.Linear]:
    """The linear layers of a model that are named, in the order in which the model declares them.

    **Arguments:** `layers`: each entry a dotted module name, or a regular expression that must match a whole name.

    **Returns:** name -> layer, without repeats.

    **Raises:** `ValueError`: an entry that names no `nn.Linear` of the model.
    """
    if isinstance(layers, str):
        raise ValueError(f"`layers` must be a list of names or patterns, got the single string {layers!r}.")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    transposed = [name for name, module in model.named_modules() if is_conv1d(module)]
    wanted: set[str] = set()
    for entry in layers:
        matched = {entry} & linears.keys() or {name for name in linears if re.fullmatch(entry, name)}
        if not matched and (other := next((n for n in transposed if n == entry or re.fullmatch(entry, n)), None)):
            raise ValueError(
                f"`layers` must match nn.Linear modules, got {entry!r}, which matches {other!r}, a Conv1D: call "
                "lowrank.nn.surgery.unify_linears(model) first."
            )
        if not matched:
            some = ", ".join(list(linears)[:6]) or "none at all"
            raise ValueError(f"`layers` must match nn.Linear modules of the model, got {entry!r}; it has: {some} ...")
        wanted |= matched
    return {name: module for name, module in linears.items() if name in wanted}


def chosen(names: Iterable[str], include: Iterable[str], exclude: Iterable[str] = ()) -> list[str]:
    """The names that some entry of `include` matches and none of `exclude`, in their order.

    **Arguments:** entries are names, or regular expressions that must match a whole name.

    **Raises:** `ValueError`: a single string instead of entries; an entry of `include` that matches no name.
    """
    names = list(names)
    for what, entries in (("include", include), ("exclude", exclude)):
        if isinstance(entries, str):
            raise ValueError(f"`{what}` must be a list of names or patterns, got the single string {entries!r}.")
    matches = {entry: {name for name in names if name == entry or re.fullmatch(entry, name)} for entry in include}
    if idle := next((entry for entry, found in matches.items() if not found), None):
        some = ", ".join(names[:6]) or "none at all"
        raise ValueError(f"`include` must match layers of the model, got {idle!r}; it has: {some} ...")
    wanted = set().union(*matches.values())
    without = {name for name in wanted for entry in exclude if name == entry or re.fullmatch(entry, name)}
    return [name for name in names if name in wanted - without]


def find_weights(model: nn.Module, include: Iterable[str] = (".*",), exclude: Iterable[str] = ()) -> dict[str, Tensor]:
    """The weights of linear layers, convolutions and the projections that `nn.MultiheadAttention` keeps as bare parameters.

    **Returns:** layer -> weight; a packed projection of attention is `<module>.in_proj`, separate ones `<module>.q_proj` and
    so on.

    **Raises:** `ValueError`: as `chosen`.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found[name] = module.weight
        elif isinstance(module, nn.MultiheadAttention):
            for part in ("in_proj", "q_proj", "k_proj", "v_proj"):
                if (weight := getattr(module, f"{part}_weight")) is not None:
                    found[f"{name}.{part}"] = weight
    return {name: found[name] for name in chosen(found, include, exclude)}


def shared_weights(model: nn.Module, linears: Mapping[str, nn.Linear | nn.Conv2d]) -> dict[str, list[str]]:
    """layer -> the names of its weight, for those whose weight another module holds too."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = {name: names[id(layer.weight)] for name, layer in linears.items()}
    return {name: held for name, held in found.items() if len(held) > 1}


def is_conv1d(module: nn.Module | None) -> bool:
    """Whether it is the `Conv1D` of transformers: a linear layer with its weight transposed, `(in, out)`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def split_block(name: str) -> tuple[str, str]:
    """The block of a layer and what it is there: `model.layers.3.mlp.up_proj` -> ('model.layers.3', 'mlp.up_proj').

    The blocks of a stage are blocks of their own (`stages.1.blocks.2`); what is numbered inside a block, as experts are, is
    not. ('', name) outside blocks.
    """
    block = re.match(r"(?:.*?\.)?\d+(?:\.(?:blocks|layers)\.\d+)?(?=\.)", name)
    return (block[0], name[block.end() + 1 :]) if block else ("", name)


def depth_and_kind(name: str) -> tuple[int, str]:
    """Where a layer stands and what it is: `model.layers.3.mlp.up_proj` -> (3, 'mlp.up_proj'); depth -1 outside blocks. Of a
    model in stages the depth is the stage."""
    block, kind = split_block(name)
    number = re.search(r"\d+", block)
    return (int(number[0]) if number else -1), kind
