"""Masks of every form say the same; masks are found with the inputs that they belong to."""

import pytest
import torch
from torch import Tensor

from lowrank.nn.batches import drop_padding, get_token_mask
from lowrank.nn.token_masks import as_token_mask, find_sequences

LENGTHS = torch.tensor([7, 3, 1, 5, 7])
RIGHT = torch.arange(7) < LENGTHS[:, None]
MASKS = {
    "right": RIGHT,
    "left": RIGHT.flip(1),
    "none": torch.ones(5, 7, dtype=torch.bool),
    "gaps": RIGHT & RIGHT.flip(1),
}
MASKS["gaps"][:, 3] = True


def added(allowed: Tensor, low: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, low)


def of_queries(mask: Tensor, causal: bool) -> Tensor:
    """(batch, 1, queries, keys); a query that would see nothing is given everything, so that its softmax is finite."""
    allowed = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    if causal:
        allowed = allowed & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    return allowed | ~allowed.any(-1, keepdim=True)


LOW = {"-inf": float("-inf"), "least": torch.finfo(torch.float32).min, "-1e4": -1e4}
FORMS = {
    "bool": lambda m: m,
    "long": lambda m: m.long(),
    "uint8": lambda m: m.to(torch.uint8),
    "segments": lambda m: m.long() * 3,
    "added integers": lambda m: m.long() if bool(m.all()) else (~m).long() * -10000,  # zeros alone are padding
    "ones": lambda m: m.float(),
    "half ones": lambda m: m.half(),
    "half added": lambda m: added(m, torch.finfo(torch.float16).min, torch.float16),
    "keys": lambda m: m[:, None, None],
    "three": lambda m: of_queries(m, False)[:, 0],
    "heads": lambda m: of_queries(m, True).expand(-1, 2, -1, -1),
    **{f"added {name}": lambda m, low=low: added(m, low) for name, low in LOW.items()},
    **{f"added keys {name}": lambda m, low=low: added(m[:, None, None], low) for name, low in LOW.items()},
    **{f"both ways {name}": lambda m, low=low: added(of_queries(m, False), low) for name, low in LOW.items()},
    **{f"causal {name}": lambda m, low=low: added(of_queries(m, True), low) for name, low in LOW.items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_every_form_say_the_same(mask, form) -> None:
    found = as_token_mask(FORMS[form](MASKS[mask]))
    assert found.dtype == torch.bool
    assert torch.equal(found, MASKS[mask])


def test_a_window_hides_no_token() -> None:
    near = (torch.arange(7)[:, None] - torch.arange(7)).abs() < 2
    assert as_token_mask(added(near & RIGHT[:, None, :], -1e9)).tolist() == RIGHT.tolist()


BAD = {
    "fractions": (torch.tensor([[0.5, 1.0]]), r"floats of 0 and 1.*, got \[0.5, 1.0\]"),
    "both signs": (torch.tensor([[-1e4, 1.0]]), "floats of 0 and 1"),
    "nan": (torch.tensor([[float("nan"), 0.0]]), "floats of 0 and 1"),
    "vector": (torch.ones(4), r"shape \(batch, tokens\), .* got \(4,\)"),
    "five": (torch.ones(1, 1, 1, 1, 4), "got"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_masks_are_refused(case) -> None:
    mask, words = BAD[case]
    with pytest.raises(ValueError, match=rf"`attention_mask` must .*{words}"):
        get_token_mask({"attention_mask": mask})


def test_each_mask_is_found_with_its_inputs() -> None:
    ids, mask = torch.ones(5, 7, dtype=torch.long), RIGHT.long()
    batch = {
        "input_ids": ids,
        "token_type_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask.flip(1),
        "global_attention_mask": mask.flip(0),  # of no inputs of its own
        "labels": ids,
    }
    found, others = find_sequences(batch)
    assert {prefix: sorted(inputs) for prefix, (_, inputs) in found.items()} == {
        "": ["input_ids"],
        "decoder_": ["decoder_input_ids"],
    }
    assert torch.equal(found[""].mask, RIGHT)
    assert torch.equal(found["decoder_"].mask, RIGHT.flip(1))
    assert not others
    for key, value in (("pixel_values", torch.ones(5, 7, 4)), ("query_input_ids", torch.ones(5, 4).long())):
        assert find_sequences(batch | {key: value})[1]
    assert find_sequences({"input_ids": ids, "decoder_input_ids": ids, "attention_mask": mask})[1]
    own = {"query_input_ids": ids, "query_attention_mask": mask, "attention_mask": None}
    assert list(find_sequences(own)[0]) == ["query_"]


def test_one_mask_for_all_samples_is_one_for_each() -> None:
    ids = torch.ones(5, 7, dtype=torch.long)
    found, _ = find_sequences({"input_ids": ids, "attention_mask": RIGHT[1:2, None, None]})
    assert torch.equal(found[""].mask, RIGHT[1:2].expand(5, 7))


def test_outputs_are_those_of_the_target() -> None:
    values = torch.arange(35.0).view(5, 7)
    source = {"input_ids": values.long(), "attention_mask": RIGHT}
    target = {"decoder_input_ids": values.long(), "decoder_attention_mask": RIGHT.flip(1)}
    assert torch.equal(drop_padding(values, source), values[RIGHT])
    assert torch.equal(drop_padding(values, source | target), values[RIGHT.flip(1)])
    assert torch.equal(drop_padding(values, source | {"decoder_input_ids": values.long()}), values)
    assert torch.equal(drop_padding(values.T, source), values.T[RIGHT.T])
    assert torch.equal(drop_padding(values[:, 0], source), values[:, 0])  # one per sample
