"""Find layers of a model by name or by pattern.

An entry of a list of layers is a dotted module name, or a regular expression that must match a whole name.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lowrank.io.arguments import check_arguments

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

    **Arguments**

    - `model`: any PyTorch module; it is not changed.
    - `layers`: names or patterns; by default all linear layers inside numbered blocks.

    **Returns** name -> layer, without repeats, in the order in which the model declares them.

    **Raises**

    - `ValueError`: an entry that matches no `nn.Linear`; a single string instead of a list.
    """
    _refuse_string("layers", layers)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    transposed = [name for name, module in model.named_modules() if is_conv1d(module)]
    selected: set[str] = set()
    for entry in layers:
        matched = {entry} & linears.keys() or {name for name in linears if re.fullmatch(entry, name)}
        if not matched and (other := next((name for name in transposed if _matches(name, entry)), None)):
            raise ValueError(
                f"`layers` must match nn.Linear modules, got {entry!r}, which matches {other!r}, a Conv1D: call "
                "lowrank.nn.surgery.unify_linears(model) first."
            )
        if not matched:
            raise ValueError(
                f"`layers` must match nn.Linear modules of the model, got {entry!r}; it has: {_first(linears)} ..."
            )
        selected |= matched
    return {name: module for name, module in linears.items() if name in selected}


def select_names(names: Iterable[str], include: Iterable[str], exclude: Iterable[str] = ()) -> list[str]:
    """Select the names that an entry of `include` matches and no entry of `exclude` matches.

    **Arguments**

    - `names`: dotted module names.
    - `include`: names or patterns; each must match a name.
    - `exclude`: names or patterns; by default none.

    **Returns** the selected names, in the order of `names`.

    **Raises**

    - `ValueError`: a single string instead of a list; an entry of `include` that matches no name.
    """
    names = list(names)
    _refuse_string("include", include)
    _refuse_string("exclude", exclude)
    matches = {entry: {name for name in names if _matches(name, entry)} for entry in include}
    if idle := next((entry for entry, matched in matches.items() if not matched), None):
        raise ValueError(f"`include` must match layers of the model, got {idle!r}; it has: {_first(names)} ...")
    included = set().union(*matches.values())
    excluded = {name for name in included for entry in exclude if _matches(name, entry)}
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
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            weights[name] = module.weight
        elif isinstance(module, nn.MultiheadAttention):
            for part in ("in_proj", "q_proj", "k_proj", "v_proj"):
                if (weight := getattr(module, f"{part}_weight")) is not None:
                    weights[f"{name}.{part}"] = weight
    return {name: weights[name] for name in select_names(weights, include, exclude)}


def find_shared_weights(model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d]) -> dict[str, list[str]]:
    """Find the layers whose weight is a parameter of another module too, as in tied embeddings.

    **Arguments**

    - `model`: the whole model.
    - `layers`: name -> layer, the layers to look at.

    **Returns** layer -> all names of its weight in the model, for shared weights only.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    aliases = {name: names[id(layer.weight)] for name, layer in layers.items()}
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


def _matches(name: str, entry: str) -> bool:
    return name == entry or bool(re.fullmatch(entry, name))


def _first(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:6]) or "none at all"


def _refuse_string(argument: str, entries: Iterable[str]) -> None:
    if isinstance(entries, str):
        raise ValueError(f"`{argument}` must be a list of names or patterns, got the single string {entries!r}.")
