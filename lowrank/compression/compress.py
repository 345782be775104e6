"""Compress a model in one call: statistics, ranks within a budget, factored layers."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import fields
from itertools import chain, islice
from typing import Any, Literal

from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.predictive_loss import predictive_loss
from lowrank.compression.allocation import RULES, choose_ranks, hold_out
from lowrank.compression.allocator import AllocationConfig, Allocator
from lowrank.compression.checks import Statistics, check_layers, check_statistics
from lowrank.compression.configuration import Configuration
from lowrank.compression.nested import ANY, check_nestable, nest_layers
from lowrank.compression.replace import replace_layers
from lowrank.compression.result import CompressionResult, measure_model
from lowrank.compression.retarget import read_batches, retarget_layers
from lowrank.factorization.methods import READS, needs_gradients
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.weights import warn_of_stacks
from lowrank.nn.batches import Batch
from lowrank.nn.dry_run import find_irreplaceable
from lowrank.nn.targets import BLOCKS, find_left_out, find_linears, find_stacks


@check_arguments
def compress(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    keep: float | int | Literal["any"] | None = None,
    *,
    ranks: Mapping[str, int] | None = None,
    statistics: Statistics | None = None,
    layers: Iterable[str] = BLOCKS,
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    progress: bool = True,
    **choices: Any,
) -> CompressionResult:
    """Compress the linear layers of a model in place, without training.

    The default is the best training-free combination. Inputs count by their second moments and outputs by the moments of their
    gradients (`two_sided`). Storage is pivoted, inputs are centred and the bias restores the mean output. Ranks follow the
    spectra of all layers. The gradients need no labels: the model draws its targets itself. Cost: one forward and one backward
    pass per batch, two forward passes of a few samples to find layers that cannot be replaced, and two decompositions per
    layer.

    Rules for ranks that measure ('measured', 'depth', 'linear') hold out the first batches, of 32 samples or more, and compare
    compressed copies of the model with the dense one on them: about ten copies, one after the other, and for 'measured' one per
    layer. No layer is decomposed again for a copy, so the factors of all layers are in memory until ranks are chosen.

    Patterns leave out layers that only look linear, and, seen in two passes over the first batch, those that the model reads
    instead of calling or does not run without (`lowrank.nn.dry_run`). The result tells them; to name one is an error.

    **Arguments**

    - `model`: any PyTorch module with `nn.Linear` layers.
    - `batches`: calibration data: mappings as transformers models take them, (inputs, labels), or inputs; see
      `lowrank.nn.batches`. At least 5 tokens per input of the widest layer are advised. Not needed for `svd`, nor with
      `statistics`, unless the rule for ranks measures.
    - `keep`: share of the targeted weights' parameters to keep, in (0, 1]; or pass `ranks`. "any" stores the factors at full
      rank, more than the dense weights, and `load_compressed(folder, keep=0.4)` cuts them later, to the model that `keep=0.4`
      gives here. Ranks are then by 'uniform', 'first_dense', or for `two_sided` 'spectrum', and layers are not retargeted.
    - `ranks`: layer name -> int, instead of `keep`.
    - `statistics`: layer name -> `LayerStatistics` from `collect_statistics`, instead of `batches`.
    - `layers`: names or patterns of the targeted layers, by default all linear layers inside numbered blocks.
    - `loss`: `(model, batch) -> scalar`, summed over the batch, whose gradients weigh the outputs; by default the model's own
      prediction.
    - `progress`: show a bar over batches and layers.
    - `choices`: fields of `Configuration` that differ from the combination above: `method`, `storage`, `centre`, `allocation`,
      `multiple`; and `retarget`: True or a `Retargeting` to aim each layer at the outputs of the dense model, given what the
      layers in front leave of its inputs. That needs `batches`, as a list or a loader, also if `statistics` are given.

    **Returns** `CompressionResult`; `print` shows it as a table.

    **Raises**

    - `ValueError`, before anything is changed: neither or both of `keep` and `ranks`; no data for a method that needs it; an
      unknown choice; a budget too small; a layer that cannot be replaced, by its name; and as for `replace_layers`.

    **Warns**

    - `LeftOutWarning`: stacks of matrices, such as the experts of a mixture, that stay as they are; the result lists them.
    """
    require((keep is None) != (ranks is None), "keep", "be given, or `ranks`, and not both", keep)
    names = list(ranks) if ranks is not None else layers if isinstance(layers, str) else list(layers)
    targeted, left_out, stacks = _find_targets(model, names, ranks is None)
    configuration = _choose(targeted, choices, batches, statistics)
    if keep == ANY:
        check_nestable(configuration)
    check_layers(model, targeted, dict.fromkeys(targeted, 1) if ranks is None else ranks)
    chosen_by_pattern = ranks is None
    batches = batches if configuration.retarget is None else read_batches(batches)
    rule, probes, trials = RULES[configuration.allocation], [], []
    if ranks is None and rule.measures:
        probes, batches = _hold_out(batches, configuration)
    first, batches = _peek(batches, probes)
    left_out |= _leave_out(model, targeted, first, names, ranks is not None)
    if statistics is None and batches is not None:
        bar = iter(tqdm(batches, "statistics", unit="batch", leave=False, disable=not progress))
        statistics = _collect(model, bar, targeted, {configuration.method, *rule.methods}, loss or predictive_loss())
    check_statistics(targeted, configuration.method, configuration.storage, statistics, configuration.centre)
    if ranks is None and keep != ANY:
        ranks, trials = _choose_ranks(model, targeted, statistics, probes, configuration, keep or 0, progress)
    before = measure_model(model, sum(layer.weight.numel() for layer in targeted.values()))
    if chosen_by_pattern:
        warn_of_stacks(stacks, before.targeted / before.model)
    names = list(targeted)
    targeted.clear()  # each dense weight is freed as soon as its factors exist
    rows = _replace(model, names, ranks, configuration, statistics, batches, progress)
    after = measure_model(model, sum(row["parameters"] for row in rows))
    return CompressionResult(rows, configuration, before, after, trials, left_out)


def _replace(
    model: nn.Module,
    names: list[str],
    ranks: Mapping[str, int] | None,
    configuration: Configuration,
    statistics: Statistics | None,
    batches: Iterable[Batch] | None,
    progress: bool,
) -> list[dict[str, Any]]:
    """Replace the layers, at full rank if no ranks are given, and return their rows."""
    if ranks is None:
        return nest_layers(model, names, configuration, statistics, progress=progress)
    if configuration.retarget is None:
        return replace_layers(model, ranks, configuration, statistics, progress=progress)
    return retarget_layers(model, ranks, configuration, statistics, batches or (), progress=progress)


def _find_targets(
    model: nn.Module, names: Iterable[str], by_pattern: bool
) -> tuple[dict[str, nn.Linear], dict[str, str], dict[str, tuple[int, ...]]]:
    """Return the layers that names match, why others that they match are left out, and the stacks among those."""
    targeted, left_out = find_linears(model, names), find_left_out(model, names)
    stacks = find_stacks(model, names if by_pattern else BLOCKS)
    return targeted, left_out | {name: f"a stack of matrices {shape}" for name, shape in stacks.items()}, stacks


def _hold_out(batches: Iterable[Batch] | None, configuration: Configuration) -> tuple[list[Batch], Iterable[Batch]]:
    """Return the batches that a rule for ranks measures on, and the rest."""
    text = f"be given for allocation {configuration.allocation!r}, which measures on samples held out"
    require(batches is not None, "batches", text, batches)
    probes, rest = hold_out(batches or ())
    return probes, rest if configuration.retarget is None else list(rest)


def _peek(batches: Iterable[Batch] | None, probes: Sequence[Batch]) -> tuple[Batch | None, Iterable[Batch] | None]:
    """Return a batch, if there is one, and batches that still start with it: they may be an iterator, or shuffle."""
    if probes or batches is None or isinstance(batches, Sequence):
        return next(iter(probes or batches or ()), None), batches
    rest = iter(batches)
    first = list(islice(rest, 1))
    return (first[0] if first else None), chain(first, rest)


def _leave_out(
    model: nn.Module, targeted: dict[str, nn.Linear], batch: Batch | None, names: Iterable[str], by_rank: bool
) -> dict[str, str]:
    """Take the layers that nothing can replace out of the targeted ones, and return why; refuse those that are named."""
    reasons = {} if batch is None else find_irreplaceable(model, batch, targeted)
    if named := next((name for name in reasons if name in names or len(reasons) == len(targeted)), None):
        argument = "ranks" if by_rank else "layers"
        raise ValueError(f"`{argument}` must leave out {named!r}: {reasons[named]}.")
    for name in reasons:
        del targeted[name]
    return reasons


def _choose_ranks(
    model: nn.Module,
    layers: Iterable[str],
    statistics: Statistics | None,
    probes: Sequence[Batch],
    configuration: Configuration,
    keep: float | int,
    progress: bool,
) -> tuple[Mapping[str, int], list[dict[str, Any]]]:
    """Return the ranks within a budget, and the trials that led there; factors that were held for them are freed."""
    config = AllocationConfig(in_memory=RULES[configuration.allocation].measures, progress=progress)
    known = Allocator(model, tuple(layers), statistics, probes, config=config)
    return choose_ranks(known, configuration, keep), known.trials


def _collect(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Iterable[str],
    methods: Set[str],
    loss: Callable[[nn.Module, Batch], Tensor],
) -> Statistics:
    """Collect what some methods read, from the smaller side unless a method of the user's may read any field."""
    weighed = loss if any(map(needs_gradients, methods)) else None
    side = "smaller" if methods <= READS.keys() else "inputs"
    return collect_statistics(model, batches, layers, loss=weighed, side=side, methods=methods)


def _choose(
    layers: Mapping[str, nn.Linear],
    choices: Mapping[str, Any],
    batches: Iterable[Batch] | None,
    statistics: Statistics | None,
) -> Configuration:
    """Complete the choices by the best combination that the data allow."""
    names = [field.name for field in fields(Configuration)]
    unknown = sorted(choices.keys() - set(names))
    require(not unknown, "choices", f"be among {names}", unknown)
    method = choices.get("method") or _best_method(layers, batches, statistics)
    with_data = batches is not None or statistics is not None
    biased = any(layer.bias is not None for layer in layers.values())
    best = {
        "method": method,
        "storage": "pivoted",
        "centre": with_data and method in ("whitened", "two_sided") and biased,
        "allocation": "spectrum" if method == "two_sided" else "uniform",
    }
    return Configuration(**best | dict(choices))


def _best_method(
    layers: Mapping[str, nn.Linear], batches: Iterable[Batch] | None, statistics: Statistics | None
) -> str:
    if statistics is None:
        rule = "be given, or `statistics`, unless `method` is 'svd'"
        require(batches is not None, "batches", rule, batches)
        return "two_sided"
    first = statistics.get(next(iter(layers)))
    return "two_sided" if first is not None and first.has_gradients else "whitened"
