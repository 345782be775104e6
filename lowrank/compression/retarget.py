"""Retarget layers while they are compressed: each repairs what the layers in front of it have changed.

Blocks are compressed front to back, and the stages of a block in the order in which its layers are called. Each layer is aimed at
the outputs that the dense layer has in the dense model, from the inputs that it has in the model as compressed so far
(`lowrank.factorization.transfer`); two streams of hidden states give both (`Streams`). A layer that adds its output to hidden
states is asked for what is missing there too.

The model itself stays dense until the end. New layers are in place only while something is measured, so that an error, or a run
that is stopped, leaves the model as it was. That costs the memory of the factors beside the dense weights.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lowrank.calibration.hooks import exact_products
from lowrank.calibration.padding import Padding
from lowrank.compression.block_folder import BlockFolder, identify
from lowrank.compression.checks import Statistics, check_layers, check_statistics, find_layers
from lowrank.compression.configuration import Configuration, Retargeting
from lowrank.compression.pretrained import set_record
from lowrank.compression.replace import Target, build_replacement
from lowrank.compression.stored_state import RECORD
from lowrank.compression.streams import Streams
from lowrank.factorization.precision import float64_device, with_float64
from lowrank.factorization.transfer import (
    PairedMoments,
    RunningPairs,
    Transfer,
    choose_transfer,
    extend_weight,
    retargeted_statistics,
    solve_transfer,
)
from lowrank.io.checks import require
from lowrank.io.distributed import process_count
from lowrank.io.hashing import hash_model
from lowrank.nn.batches import Batch, batches_on, device_of, eval_mode, is_empty
from lowrank.nn.block_calls import trace_blocks, without_cache
from lowrank.nn.surgery import replace_module

Parts = tuple[PairedMoments, PairedMoments]  # of the tokens to fit, and of those held out


@torch.inference_mode(False)  # the new parameters may be trained
def retarget_layers(
    model: nn.Module,
    ranks: Mapping[str, int],
    configuration: Configuration,
    statistics: Statistics | None,
    batches: Iterable[Batch],
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Replace linear layers by factored ones at given ranks, in place, each aimed at the outputs of the dense model.

    This is the strict step inside `compress(..., retarget=True)`, as `replace_layers` is without. A layer whose factors would
    hold as many parameters as its weight stays as it is. Cost: a pass of the dense model; then, in each of the two models, a pass
    of every block and a part of one for each stage. A block that is not called as the one in front was costs a pass of the model
    up to it. Memory: both streams on the CPU, and for a stage of n inputs about 14 matrices (n, n) in float64; (n + m, n) for a
    layer with m outputs that repairs hidden states.

    **Arguments**

    - `model`: any PyTorch module; it is changed only when all layers are done.
    - `ranks`: layer name -> int in [1, min(out, in)].
    - `configuration`: method, storage and centring, with a `Retargeting`.
    - `statistics`: layer name -> `LayerStatistics` of the dense model; `svd` needs none. Output gradients are used throughout,
      inputs as long as nothing in front is compressed.
    - `batches`: calibration data, see `lowrank.nn.batches`; read once and kept.
    - `progress`: show a bar over the blocks.

    **Returns** one row per layer, as `replace_layers` does, with the chosen `ridge` and `blend`, None where nothing in front is
    compressed, and `residual`, whether the layer repairs hidden states too. Errors are those of truncating the retargeted weight,
    in the inputs of the compressed model.

    **Raises**

    - `ValueError`, and the model stays as it was: as for `replace_layers`; batches that are an iterator or are not run in one
      order; layers outside numbered blocks or called more than once; NaN or infinity in a stream; a folder of another run.

    **Reference** AA-SVD, arXiv:2604.02119, for the outputs of the dense model from the inputs of the compressed one. That layers
    repair hidden states too is not from there: it is ours.
    """
    require(configuration.retarget is not None, "configuration.retarget", "be a Retargeting", None)
    batches = read_batches(batches)
    layers = find_layers(model, ranks)
    check_layers(model, layers, ranks)
    check_statistics(layers, configuration.method, configuration.storage, statistics, configuration.centre)
    record: dict[str, Any] = getattr(model, RECORD, None) or {"model": hash_model(model), "layers": {}}
    with eval_mode(model), without_cache(model), torch.no_grad():
        work = _Retargeter(model, ranks, configuration, statistics, batches)
        work.run(layers, progress)
    for name, module in work.modules.items():
        replace_module(model, name, module.train(layers[name].training))
    rows = {name: work.rows[name] for name in layers}
    set_record(model, record | {"layers": record["layers"] | rows})
    return list(rows.values())


def read_batches(batches: Iterable[Batch] | None) -> list[Batch]:
    """Return all batches that are not empty, in a list: both models must see the same data in the same order.

    **Raises**

    - `ValueError`: no batches, or an iterator, of which a part may have been read; more than one process.
    """
    rule = "be a list or a loader to retarget layers, which reads them more than once"
    require(batches is not None and not isinstance(batches, Iterator), "batches", rule, batches)
    require(process_count() == 1, "retarget", "be asked for in a single process", process_count())
    return [batch for batch in batches or () if not is_empty(batch)]


class _Retargeter:
    """Make the new layers, block by block and stage by stage."""

    def __init__(
        self,
        model: nn.Module,
        ranks: Mapping[str, int],
        configuration: Configuration,
        statistics: Statistics | None,
        batches: Sequence[Batch],
    ) -> None:
        assert isinstance(configuration.retarget, Retargeting)
        self.model, self.ranks, self.configuration, self.statistics = model, ranks, configuration, statistics
        self.options, self.batches, self.device = configuration.retarget, batches, device_of(model)
        self.modules: dict[str, nn.Module] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        padding = Padding(model, {name: model.get_submodule(name) for name in ranks})
        masks = [padding.read(batch) for batch in batches_on(batches, self.device)]
        self.streams = Streams(model, batches, self.modules, masks)

    def run(self, layers: Mapping[str, nn.Linear], progress: bool) -> None:
        """Make the layers of all blocks; those that the folder holds are read instead."""
        folder = None
        if self.options.folder is not None:
            identity = identify(self.model, self.ranks, self.batches, self.configuration, self.statistics)
            folder = BlockFolder(self.options.folder, identity)
        batches = tqdm(self.batches, "order of layers", unit="batch", leave=False, disable=not progress)
        blocks = trace_blocks(self.model, batches_on(batches, self.device), layers)
        for block in tqdm(blocks, "retarget", unit="block", leave=False, disable=not progress):
            names = [name for stage in block.stages for name in stage]
            done = folder.read(block.name, self.model) if folder else None
            if done is not None:
                rule = f"hold a row for each layer of the block {block.name!r}"
                require(done[1].keys() == set(names), "folder", rule, sorted(done[1]))
                self.modules |= done[0]  # in place: the streams see it
                self.rows |= done[1]
                self.streams.leave()
                continue
            self.streams.move_to(block)
            sources = self.streams.residuals(names) if self.options.residual else {}
            for stage in block.stages:
                self._make_stage(stage, sources.get(stage[0]) if self._may_repair(stage) else None)
            if folder:
                made = {name: self.modules[name] for name in names if name in self.modules}
                folder.write(block.name, made, {name: self.rows[name] for name in names})

    def _may_repair(self, stage: Sequence[str]) -> bool:
        """Return True for one layer alone, unless its output gradients are known for the weight W R only."""
        moments = None if self.statistics is None else self.statistics[stage[0]]
        return len(stage) == 1 and (moments is None or moments.input_gradient_gram is None)

    def _make_stage(self, stage: Sequence[str], residual: str | None) -> None:
        """Make the layers that receive one input; they share ridge and blend. One alone may repair the hidden states too."""
        linears: dict[str, Any] = {name: self.model.get_submodule(name) for name in stage}
        parts = self._measure(stage[0], linears[stage[0]], residual) if self.modules else None
        whole = parts and parts[0] + parts[1]
        made: dict[str, nn.Module] = {}
        for centre in (False, True):
            members = {n: x for n, x in linears.items() if centre == (self.configuration.centre and x.bias is not None)}
            found = self._choose(parts, whole, members.values(), centre) if parts and whole and members else None
            for name, layer in members.items():
                target = self._aim(name, layer, whole, found)
                module, row = build_replacement(name, layer, int(self.ranks[name]), self.configuration, target)
                chosen = found if module is not layer else None
                how = {"ridge": chosen and chosen.ridge, "blend": chosen and chosen.blend}
                self.rows[name] = row | how | {"residual": chosen is not None and residual is not None}
                made |= {name: module} if module is not layer else {}
        self.modules |= made  # only now: all layers of the stage are dense while they are measured

    def _measure(self, name: str, layer: nn.Linear, residual: str | None) -> Parts:
        """Return the moments of what a layer wants and gets."""
        wanted = layer.in_features + (layer.out_features if residual else 0)
        sums = [RunningPairs(layer.in_features, wanted, float64_device(self.device)) for _ in range(2)]
        for dense, rows in self.streams.inputs(name, residual):
            count = max(len(rows) - max(round(self.options.held_out * len(rows)), 1), 1)
            with exact_products(self.device):
                for part, piece in zip(sums, (slice(count), slice(count, None)), strict=True):
                    part.add(dense[piece], rows[piece])
        for part in sums:
            if not part.all_finite():
                raise ValueError(f"`batches` must give finite activations, got NaN or infinity in layer {name!r}.")
        require(
            sums[1].tokens > 0,
            "batches",
            f"hold at least two tokens in one batch, for layer {name!r}",
            len(self.batches),
        )
        return sums[0].finish(), sums[1].finish()

    def _choose(self, parts: Parts, whole: PairedMoments, layers: Iterable[nn.Linear], centre: bool) -> Transfer:
        """Return the transfer that serves the outputs of some layers best, together."""
        stacked = torch.cat([extend_weight(with_float64(layer.weight.detach()).double(), whole) for layer in layers])
        fit, held_out = (part.centred() if centre else part for part in parts)
        best = choose_transfer(fit, held_out, stacked, self.options.ridges, self.options.blends)
        return solve_transfer(whole.centred() if centre else whole, *best)

    def _aim(self, name: str, layer: nn.Linear, whole: PairedMoments | None, found: Transfer | None) -> Target:
        """Return what a layer is truncated from: with nothing in front of it compressed, its own weight."""
        moments = None if self.statistics is None else self.statistics[name]
        if whole is None or found is None:
            return Target(layer.weight.detach(), moments)
        wanted = extend_weight(with_float64(layer.weight.detach()).double(), whole)
        target = wanted @ found.matrix
        shift = wanted @ whole.mean - target @ whole.moments.mean
        return Target(target, retargeted_statistics(moments, whole, found), shift)
