"""Divergence from the dense model: closed forms, padding, means over all targets, and refusals."""

import copy
import math

import pytest
import torch
from families import made
from torch import nn

from lowrank.calibration.divergence import class_divergence, mean_divergence, predictive_divergence
from lowrank.nn.batches import compute_logits, count_samples, drop_padding


def moved(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return other


def test_the_divergence_of_classes_is_that_of_kullback_and_leibler(generator) -> None:
    ours, theirs = (torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = theirs.softmax(-1), ours.softmax(-1)
    assert torch.allclose(class_divergence(ours, theirs), (p * (p / q).log()).sum(-1), rtol=1e-12)
    assert class_divergence(ours.half(), theirs.half()).dtype == torch.float32
    assert class_divergence(theirs, theirs).abs().max() < 1e-15


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit", "plain"])
def test_predictions_are_read_as_the_model_means_them(family: str) -> None:
    model, batches, _ = made(family, torch.float64)
    other = moved(model)
    with torch.no_grad():
        for batch in batches:
            ours, theirs = compute_logits(other, batch), compute_logits(model, batch)
            squared = (ours - theirs).square().sum(-1)
            expected = squared if family == "plain" else class_divergence(ours, theirs)
            found = predictive_divergence(model)(other, batch)
            assert torch.allclose(found, drop_padding(expected, batch).flatten(), rtol=1e-12)
            assert found.dim() == 1


def test_padding_counts_for_nothing_and_every_position_counts_alike() -> None:
    model, batches, _ = made("llama", torch.float64)
    other, ids = moved(model), batches[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    found = predictive_divergence(model)(other, padded)
    assert found.shape == (len(ids) * 7,)
    assert torch.allclose(found, predictive_divergence(model)(other, {"input_ids": ids[:, :7]}), rtol=1e-9)
    pieces = [{"input_ids": ids[:5]}, {"input_ids": ids[5:]}]
    whole = mean_divergence(other, model, [{"input_ids": ids}])
    assert whole == pytest.approx(mean_divergence(other, model, pieces), rel=1e-12)
    assert whole > mean_divergence(model, model, pieces) >= 0.0


def test_the_mode_of_both_models_is_restored_and_does_not_matter() -> None:
    model, batches, _ = made("bert")
    other = moved(model)
    expected = mean_divergence(other, model, batches)
    assert mean_divergence(other.train(), model.train(), batches) == expected  # dropout would change it
    assert model.training
    assert other.training


def test_bad_input_is_named() -> None:
    model, batches, _ = made("bert")
    with pytest.raises(ValueError, match="`batches` must hold at least one target, got none"):
        mean_divergence(model, model, [])
    broken = moved(model)
    with torch.no_grad():
        next(iter(broken.classifier.parameters())).fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"the divergence over 12 targets is nan"):
        mean_divergence(broken, model, batches[:1])


def test_samples_of_every_form_of_batch_are_counted() -> None:
    ids = torch.zeros(5, 3)
    assert [count_samples(batch) for batch in (ids, {"input_ids": ids}, (ids, torch.zeros(5)))] == [5, 5, 5]
