"""Find out which tokens of a batch are padding: read masks of every form, and find the inputs that a mask belongs to.

A batch may hold several sequences, as a translation has a source and a target. Mask and inputs of one have the same prefix:
`attention_mask` and `input_ids`, `decoder_attention_mask` and `decoder_input_ids`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from lowrank.io.checks import require

MASK, TARGET, IDS = "attention_mask", "decoder_", ("input_ids", "inputs_embeds")
MASKED = -1e3  # an additive mask hides what it lowers by this much: -inf, the least number of a dtype, or -10,000


class MaskedInputs(NamedTuple):
    """Hold one sequence of a batch that has a mask.

    **Arguments**

    - `mask`: `(batch, tokens)`, bool, False on padding.
    - `inputs`: key -> tensor, `(batch, tokens, ...)`, what the model makes its tokens of.
    """

    mask: Tensor
    inputs: dict[str, Tensor]


def as_token_mask(mask: Tensor, name: str = MASK) -> Bool[Tensor, "batch tokens"]:
    """Convert a mask of any form to one that is True at tokens and False on padding.

    **Arguments**

    - `mask`: bool; integers, 0 for padding; floats of 1 and 0; or floats that are added to scores, 0 for tokens and -inf or a
      large negative number for padding. Floats that are all 0 hide nothing. Shape `(batch, tokens)`; or
      `(batch, heads, queries, tokens)` or `(batch, queries, tokens)`, where a token counts that any query sees.
    - `name`: the argument to name in errors.

    **Returns** `(batch, tokens)`.

    **Raises**

    - `ValueError`: another shape; floats of neither form.
    """
    shapes = "have shape (batch, tokens), (batch, queries, tokens) or (batch, heads, queries, tokens)"
    require(mask.dim() in (2, 3, 4), name, shapes, tuple(mask.shape))
    seen = _read_values(mask, name)
    if seen.dim() == 4:
        seen = seen.any(1)
    if seen.dim() == 3:
        # A query that is padding itself is often given all tokens, so that its softmax is finite: it tells nothing. The last
        # query of a causal mask sees all tokens by right.
        everything = seen.all(-1)
        filled = everything & ~everything.all(-1, keepdim=True)
        filled[:, -1:] = False
        seen = (seen & ~filled[..., None]).any(1)
    return seen


def _read_values(mask: Tensor, name: str) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point():
        added = bool((mask <= 0).all())
        rule = "be bool, integers, floats of 0 and 1, or floats <= 0 that are added to scores"
        require(added or bool(((mask == 0) | (mask == 1)).all()), name, rule, mask[mask != 0].flatten()[:3].tolist())
        return mask > MASKED if added else mask == 1
    return mask > MASKED if bool((mask < 0).any()) else mask != 0


def find_sequences(batch: Mapping[str, Any]) -> tuple[dict[str, MaskedInputs], bool]:
    """Find the sequences of a batch that have a mask.

    **Arguments**

    - `batch`: keyword arguments of a model. A mask with a prefix of its own counts if inputs of its shape have that prefix.

    **Returns** prefix -> `MaskedInputs`; and whether the batch holds inputs besides, such as images or a second text.

    **Raises**

    - `ValueError`: a mask of no known form.
    """
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and key != "labels"}
    prefixes = {key.removesuffix(MASK) for key in tensors if key.endswith(MASK)} | {TARGET, ""}
    longest_first = sorted(prefixes, key=len, reverse=True)
    inputs: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for key, value in tensors.items():
        if not key.endswith("mask") and value.dim() >= 2:
            inputs[next(prefix for prefix in longest_first if key.startswith(prefix))][key] = value
    found: dict[str, MaskedInputs] = {}
    others = False
    for prefix, own in inputs.items():
        mask = _own_mask(tensors.get(prefix + MASK), prefix, own)
        fitting = {key: value for key, value in own.items() if mask is not None and value.shape[:2] == mask.shape}
        named = {key: value for key, value in fitting.items() if key.removeprefix(prefix) in IDS}
        beside = (key for key, value in fitting.items() if value.dim() > 2 or value.is_floating_point())
        others |= len(fitting) < len(own) or (bool(named) and any(key not in named for key in beside))
        if mask is not None:
            found[prefix] = MaskedInputs(mask, named or fitting)
    return found, others


def _own_mask(mask: Tensor | None, prefix: str, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the mask of the inputs with a prefix, one row for each sample; None if there is none."""
    if mask is None or (prefix not in ("", TARGET) and all(x.shape[:2] != mask.shape for x in inputs.values())):
        return None
    seen = as_token_mask(mask, prefix + MASK)
    samples = (len(x) for x in inputs.values() if len(seen) == 1 and x.shape[1] == seen.shape[1])
    return seen.expand(next(samples, len(seen)), -1)
