"""Tell which rows of a layer's input are tokens and which are padding, whatever sequence of the batch the layer sees."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lowrank.nn.batches import Batch, keywords_of, run_model
from lowrank.nn.block_calls import first_tensor
from lowrank.nn.token_masks import MASK, MaskedInputs, find_sequences

# How the rows of a layer lie: function from a mask `(batch, tokens)` to one of the same shape as the rows. Flattened or not.
LAYOUTS = {"batch first": lambda mask: mask, "tokens first": lambda mask: mask.T}
ABSENT, UNKNOWN = "absent", "unknown"

Lead = tuple[int, ...]  # all dimensions of a layer's input but the last
Verdict = dict[str, str]  # prefix of a sequence -> a layout, or ABSENT if the layer does not see it, or UNKNOWN


class _Rows(NamedTuple):
    """Hold what tells whether the rows of a layer's input are those of another pass."""

    lead: Lead
    projection: Tensor  # on one random direction
    norm: Tensor
    precision: float


@dataclass(frozen=True)
class BatchPadding:
    """Hold the padding of one batch, and what is known of the layers.

    **Arguments**

    - `masks`: prefix of a sequence -> mask, `(batch, tokens)`, bool, see `lowrank.nn.token_masks.find_sequences`.
    - `others`: whether the batch holds inputs besides.
    - `verdicts`: layer -> for each call in a pass, how it sees each sequence.
    """

    masks: dict[str, Tensor]
    others: bool
    verdicts: Mapping[str, list[Verdict]]

    @property
    def padded(self) -> dict[str, Tensor]:
        """Return prefix -> mask of the sequences that have padding."""
        return {prefix: mask for prefix, mask in self.masks.items() if not bool(mask.all())}

    def readings(self, lead: Lead) -> tuple[list[tuple[str, str]], bool]:
        """Return the padded sequences and layouts that fit rows by their shape, and whether all rows may be tokens.

        **Arguments**

        - `lead`: shape of the rows, all dimensions of an input but the last.
        """
        padded = self.padded
        fitting = [
            (prefix, layout)
            for prefix, mask in padded.items()
            for layout in LAYOUTS
            if _keep(mask, layout, lead) is not None
        ]
        whole = self.others or any(
            lead == (len(mask),) != (mask.numel(),)  # one row per sample
            or (prefix not in padded and any(_keep(mask, layout, lead) is not None for layout in LAYOUTS))
            for prefix, mask in self.masks.items()
        )
        return fitting, whole

    def keep(self, lead: Lead, layer: str, call: int) -> Tensor | None:
        """Return which rows are tokens, `(rows,)`, bool; None for all of them.

        **Arguments**

        - `lead`: shape of the rows.
        - `layer`: its name.
        - `call`: how many times it was called before in this pass.

        **Raises**

        - `ValueError`: it cannot be known.
        """
        calls = self.verdicts.get(layer) or [_decide(self, lead, {}, set())]
        verdict = calls[call % len(calls)]
        seen = {prefix: verdict.get(prefix, UNKNOWN) for prefix in self.padded}
        found = {prefix: layout for prefix, layout in seen.items() if layout != ABSENT}
        if not found:
            return None
        prefix, layout = next(iter(found.items()))
        keep = _keep(self.masks[prefix], layout, lead) if layout in LAYOUTS and len(found) == 1 else None
        if keep is None:
            shapes = ", ".join(f"{prefix}{MASK} {tuple(mask.shape)}" for prefix, mask in self.padded.items())
            raise ValueError(
                f"`batches` have padding ({shapes}) that does not fit layer {layer!r}, whose rows have shape {lead}, or not in "
                "one way alone: leave the layer out, name each mask as its inputs (`decoder_attention_mask` for "
                "`decoder_input_ids`), or pass batches without padding."
            )
        return keep


def token_rows(
    values: Float[Tensor, "*batch n"], padding: BatchPadding | None, layer: str, call: int = 0
) -> Float[Tensor, "tokens n"]:
    """Return the vectors of a layer's input or output that belong to tokens, without padding.

    **Arguments**

    - `values`: `(*batch, n)`, the input or output.
    - `padding`: of the batch, from `Padding.read`; None without padding.
    - `layer`: its name.
    - `call`: how many times the layer was called before in this pass. Default 0.

    **Raises**

    - `ValueError`: it cannot be known which vectors are padding.
    """
    rows = values.reshape(-1, values.shape[-1])
    keep = None if padding is None else padding.keep(tuple(values.shape[:-1]), layer, call)
    return rows if keep is None else rows[keep]


class Padding:
    """Find out from passes of a model which sequence of a batch each layer sees, and how its rows lie.

    Shapes alone do not tell source from target where both have one length, nor samples from tokens where there are as many of
    one as of the other. So the model is asked where more than one reading is possible. The inputs on the padding of a sequence
    are replaced by others: the rows that change are its padding, since no token sees it. This takes one more pass with the first
    batch that has padding, and one for each sequence if shapes leave a doubt.

    **Arguments**

    - `model`: any PyTorch module in evaluation mode; it is not changed.
    - `layers`: layer name -> layer.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        matrices = (
            (name, module)
            for name, module in model.named_modules()
            if not isinstance(module, nn.Embedding) and getattr(getattr(module, "weight", None), "ndim", 0) == 2
        )
        self.model, self.watched = model, dict(matrices) | dict(layers)  # all, to see whether anything changes at all
        self.verdicts: dict[str, list[Verdict]] = {}
        self.known: set[str] = set()

    def read(self, batch: Batch) -> BatchPadding | None:
        """Return the padding of a batch; None if it has none. Passes of the model may be run: watch none meanwhile.

        **Arguments**

        - `batch`: on the model's device.

        **Raises**

        - `ValueError`: a mask of no known form.
        """
        keywords = keywords_of(batch)
        if keywords is None:
            return None
        sequences, others = find_sequences(keywords)
        padding = BatchPadding({prefix: found.mask for prefix, found in sequences.items()}, others, self.verdicts)
        if not padding.padded:
            return None
        if padding.padded.keys() - self.known:
            self._learn(keywords, sequences, padding)
        return padding

    def _learn(self, batch: Mapping[str, Any], sequences: Mapping[str, MaskedInputs], padding: BatchPadding) -> None:
        before = self._trace(batch)
        changes: dict[str, dict[str, list[Tensor | None]]] = {}
        if any(_is_doubtful(padding, rows.lead) for calls in before.values() for rows in calls):
            for prefix in padding.padded:
                try:
                    after = self._trace({**batch, **_without_padding(sequences[prefix])})
                except (IndexError, RuntimeError, ValueError):  # the model refuses the other inputs: nothing is learned
                    after = before
                changes[prefix] = {name: _compare(calls, after.get(name, [])) for name, calls in before.items()}
        informative = {
            prefix
            for prefix, layers in changes.items()
            if any(change is None or bool(change.any()) for calls in layers.values() for change in calls)
        }
        self.known |= {prefix for prefix, mask in padding.padded.items() if not _is_symmetric(mask)}
        for name, calls in before.items():
            verdicts = self.verdicts.setdefault(name, [])
            verdicts += [{} for _ in range(len(calls) - len(verdicts))]
            for call, rows in enumerate(calls):
                changed = {prefix: layers[name][call] for prefix, layers in changes.items()}
                verdicts[call].update(_decide(padding, rows.lead, changed, informative))

    @torch.no_grad()
    def _trace(self, batch: Mapping[str, Any]) -> dict[str, list[_Rows]]:
        """Run the model and note the rows of each call of each layer."""
        found: dict[str, list[_Rows]] = {}

        def note(name: str) -> Any:
            return lambda module, args, kwargs: found.setdefault(name, []).append(
                _measure(first_tensor((args, kwargs)))
            )

        with ExitStack() as hooks:
            for name, layer in self.watched.items():
                hooks.callback(layer.register_forward_pre_hook(note(name), with_kwargs=True).remove)
            run_model(self.model, batch)
        return found


def _keep(mask: Tensor, layout: str, lead: Lead) -> Tensor | None:
    """Return a mask for rows, `(rows,)`; None if they do not lie in this layout."""
    placed = LAYOUTS[layout](mask)
    return placed.reshape(-1) if lead in (tuple(placed.shape), (placed.numel(),)) else None


def _is_symmetric(mask: Tensor) -> bool:
    """Tell whether a mask is the same in both layouts, so that one batch cannot show which it is."""
    return torch.equal(mask.reshape(-1), mask.T.reshape(-1))


def _is_doubtful(padding: BatchPadding, lead: Lead) -> bool:
    fitting, whole = padding.readings(lead)
    return whole or len(fitting) > 1


def _decide(padding: BatchPadding, lead: Lead, changed: Mapping[str, Tensor | None], informative: set[str]) -> Verdict:
    """Return how the rows of a call see each padded sequence.

    **Arguments**

    - `padding`: of the batch.
    - `lead`: shape of the rows.
    - `changed`: prefix -> the rows that changed with the padding of the sequence; None if there were other rows.
    - `informative`: the sequences whose padding changed any layer.
    """
    (fitting, whole), padded = padding.readings(lead), padding.padded
    nowhere = dict.fromkeys(padded, ABSENT)
    hits = [prefix for prefix, rows in changed.items() if rows is None or bool(rows.any())]
    if len(fitting) == 1 and not whole:
        return nowhere | dict(fitting)
    if not hits:
        silent = [prefix for prefix, _ in fitting if prefix not in informative]
        if whole and not silent and (not padding.others or informative >= padded.keys()):
            return nowhere
        if not whole and len({prefix for prefix, _ in fitting}) == 1:
            return nowhere | dict(fitting[:1])
    elif len(hits) == 1 and (rows := changed[hits[0]]) is not None:
        keeps = {layout: _keep(padded[prefix], layout, lead) for prefix, layout in fitting if prefix == hits[0]}
        layouts = {layout: keep for layout, keep in keeps.items() if keep is not None and not bool((rows & keep).any())}
        exact = {layout: keep for layout, keep in layouts.items() if torch.equal(~rows, keep)}
        first, *rest = (exact or layouts).items() or [(UNKNOWN, rows)]
        if all(torch.equal(keep, first[1]) for _, keep in rest):
            return nowhere | {hits[0]: first[0]}
    return dict.fromkeys(padded, UNKNOWN)


def _measure(value: Tensor) -> _Rows:
    rows = value.detach().reshape(-1, value.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    precision = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    return _Rows(tuple(value.shape[:-1]), rows @ direction, rows.norm(dim=1), precision**0.5)


def _compare(before: list[_Rows], after: list[_Rows]) -> list[Tensor | None]:
    """Return, for each call, which rows changed by more than rounding; None if there are others."""
    if [rows.lead for rows in before] != [rows.lead for rows in after]:
        return [None] * len(before)
    return [
        (one.projection - two.projection).abs() > one.precision * torch.maximum(one.norm, two.norm)
        for one, two in zip(before, after, strict=True)
    ]


def _without_padding(sequence: MaskedInputs) -> dict[str, Tensor]:
    """Return the inputs of a sequence with others on its padding: those of one of its tokens."""
    mask = sequence.mask
    return {key: _fill(value, mask) for key, value in sequence.inputs.items()}


def _fill(value: Tensor, mask: Bool[Tensor, "batch tokens"]) -> Tensor:
    rank = torch.where(mask, 0, value.numel())
    if value.dim() == 2 and not value.is_floating_point():
        # An id that is frequent may mean something, such as an end or a place for an image; the padding's own changes nothing.
        _, inverse, counts = value.unique(return_inverse=True, return_counts=True)
        of_padding = torch.isin(value, value[~mask])
        rank = rank + counts[inverse] + of_padding * (value.numel() // 2)
    place = rank.argmin(1)
    other = value[torch.arange(len(value), device=value.device), place]
    shape = (*mask.shape, *[1] * (value.dim() - 2))
    return torch.where(mask.view(shape), value, other[:, None].expand_as(value))
