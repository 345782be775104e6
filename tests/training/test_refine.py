"""Training of factors: what may move and what may not, exact merging, exact resume; on three architectures."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import replace_layers
from lowrank.factorization.rank_allocation import rank_for_keep
from lowrank.nn.batches import Batch, compute_logits, get_labels
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.nn.targets import find_linears
from lowrank.tasks.task import Task
from lowrank.training import refine
from lowrank.training.loop import Recipe, fit
from lowrank.training.refine import (
    ORDERS,
    LoraOptions,
    factor_names,
    model_loss,
    refine_factors,
    repeat_batches,
    tune_factors,
)

STORAGES = tuple(FACTORED_LAYERS)
RECIPE = Recipe(steps=6, learning_rate=1e-2, warmup=0.0, seed=3)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification  # noqa: PLC0415

    sizes = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, initializer_range=0.5
    )
    return BertForSequenceClassification(BertConfig(vocab_size=31, max_position_embeddings=16, num_labels=3, **sizes))


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=16, depth=2, num_heads=2, proj_drop_rate=0.1
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, num_key_value_heads=1, **sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "vit": vit, "llama": llama}


def made(name: str, storage: str, keep: float = 0.6) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ranks = {layer: rank_for_keep(linear.weight.shape, keep, storage) for layer, linear in find_linears(model).items()}
    replace_layers(model, ranks, Configuration("svd", storage))
    return model


def batches_of(name: str) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found: list[Batch] = []
    for _ in range(4):
        if name == "vit":
            target = torch.randint(0, 3, (8,), generator=generator)
            found.append((torch.randn(8, 1, 8, 8, generator=generator) + target.view(-1, 1, 1, 1), target))
            continue
        ids = torch.randint(1, 31, (8, 7), generator=generator)
        if name == "llama":
            found.append({"input_ids": ids, "labels": ids})
        else:
            mask = (torch.arange(7) < torch.randint(3, 8, (8, 1), generator=generator)).long()
            found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids[:, 0] % 3})
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def unwrapped(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model that carries adapters, under the names that it has without; the adapters left out."""
    found = {}
    for name, value in weights(model).items():
        if ".lora_" not in name:
            found[name.removeprefix("base_model.model.").replace(".base_layer", "")] = value
    return found


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def mean_loss(model: nn.Module, name: str) -> float:
    with torch.no_grad():
        return sum(model_loss(model, batch).item() for batch in batches_of(name)) / 4


def weights_of(model: nn.Module, factor: str) -> set[str]:
    return {f"{name}.weight" for name in factor_names(model, factor)}


# --- what is kept, what is trained ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_only_the_factors_move_one_after_the_other_and_all_else_stays(name, storage, order, monkeypatch) -> None:
    model = made(name, storage)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)  # flags to be restored
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    kinds = {key: type(module) for key, module in model.named_modules()}
    ranks = {
        key: module.rank for key, module in model.named_modules() if isinstance(module, tuple(FACTORED_LAYERS.values()))
    }
    before, entered = weights(model), []

    def spying(adapted: nn.Module, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        entered.append((unwrapped(adapted), {key for key, p in adapted.named_parameters() if p.requires_grad}))
        return fit(adapted, *args, **kwargs)

    monkeypatch.setattr(refine, "fit", spying)
    history = refine_factors(model, batches_of(name), order, recipe=RECIPE, progress=False)
    after = weights(model)

    first, second = ORDERS[order]
    assert len(entered) == 2
    assert moved(before, entered[0][0]) == set()
    assert moved(before, entered[1][0]) == weights_of(model, first)  # after the first stage
    assert moved(entered[1][0], after) == weights_of(model, second)
    for (_, trained), stage in zip(entered, ORDERS[order], strict=True):
        assert trained
        assert all(f".{stage}.lora_" in key for key in trained)
    assert [row["stage"] for row in history] == [first] * 3 + [second] * 3
    assert [row["step"] for row in history] == [0, 1, 2] * 2

    assert list(after) == list(before)
    assert all(after[key].shape == before[key].shape and after[key].dtype == before[key].dtype for key in before)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert {key: type(module) for key, module in model.named_modules()} == kinds
    assert all(model.get_submodule(key).rank == rank for key, rank in ranks.items())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_the_rank_of_the_weight_stays(name, storage) -> None:
    model = made(name, storage)
    refine_factors(model, batches_of(name), recipe=RECIPE, progress=False)
    for module in model.modules():
        if isinstance(module, tuple(FACTORED_LAYERS.values())):
            values = torch.linalg.svdvals(module.dense())
            assert values[module.rank :].max() <= 1e-12 * values[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_falls(name, storage, order) -> None:
    model = made(name, storage)
    before = mean_loss(model, name)
    recipe = Recipe(steps=30, learning_rate=1e-2, seed=1)
    history = refine_factors(model, batches_of(name), order, recipe=recipe, progress=False)
    assert mean_loss(model, name) < before - 0.01
    assert len(history) == 30
    assert not model.training


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_tuning_moves_both_factors_together_and_nothing_else(name, storage) -> None:
    model = made(name, storage)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    before, loss = weights(model), mean_loss(model, name)
    recipe = Recipe(steps=15, learning_rate=1e-2, weight_decay=0.1)
    history = tune_factors(model, batches_of(name), recipe=recipe, progress=False)
    assert moved(before, weights(model)) == weights_of(model, "left") | weights_of(model, "right")
    assert list(weights(model)) == list(before)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert mean_loss(model, name) < loss - 0.01
    assert [row["step"] for row in history] == list(range(15))


def test_factors_are_named_in_both_storages_and_layers_left_dense_are_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7), nn.Linear(7, 6))
    replace_layers(model, {"0": 2}, Configuration("svd", "factors"))
    replace_layers(model, {"1": 2}, Configuration("svd", "pivoted"))
    assert factor_names(model, "left") == ["0.left", "1.left"]
    assert factor_names(model, "right") == ["0.right", "1.right"]


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["left", "right"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_merging_is_exact(name, storage, stage, monkeypatch) -> None:
    """The outputs of the model with adapters, as trained, are those of the model that comes back."""
    model, batch = made(name, storage).double(), batches_of(name)[0]
    batch = (batch[0].double(), batch[1]) if isinstance(batch, tuple) else batch
    untrained = compute_logits(model, batch).detach()
    adapted: Any = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=factor_names(model, stage))
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if ".lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        wanted = compute_logits(adapted, batch)
        adapted.merge_and_unload(safe_merge=True)
        found = compute_logits(model, batch)
    assert (wanted - untrained).abs().max() > 1e-3
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("storage", STORAGES)
def test_each_stage_ends_where_its_adapters_were(storage, monkeypatch) -> None:
    batch, outputs = batches_of("bert")[0], []
    model = made("bert", storage)

    def spying(adapted: nn.Module, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        outputs.append(compute_logits(adapted, batch).detach())
        rows = fit(adapted, *args, **kwargs)
        outputs.append(compute_logits(adapted, batch).detach())
        return rows

    monkeypatch.setattr(refine, "fit", spying)
    untrained = compute_logits(model, batch).detach()
    refine_factors(model, batches_of("bert"), recipe=RECIPE, progress=False)
    start, end, next_start, last = outputs
    assert torch.allclose(start, untrained, atol=1e-6)  # new adapters change nothing
    assert torch.allclose(end, next_start, atol=1e-5)
    assert torch.allclose(last, compute_logits(model, batch), atol=1e-5)
    assert (end - start).abs().max() > 1e-3 < (last - next_start).abs().max()


@pytest.mark.parametrize(("storage", "keep"), [("factors", 0.35), ("pivoted", 0.3)])
def test_adapters_are_no_larger_than_the_layers_they_are_of(storage, keep, monkeypatch) -> None:
    model, sizes = made("bert", storage, keep), []  # ranks 2 and 3

    def spying(adapted: nn.Module, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        for module in adapted.modules():
            if hasattr(module, "lora_A"):
                down: Any = module.lora_A
                sizes.append(
                    (down["default"].out_features, min(module.base_layer.weight.shape), module.scaling["default"])
                )
        return fit(adapted, *args, **kwargs)

    monkeypatch.setattr(refine, "fit", spying)
    refine_factors(model, batches_of("bert"), recipe=RECIPE, lora=LoraOptions(3, 6), progress=False)
    assert len(sizes) == 2 * len(factor_names(model, "left"))
    assert {rank < 3 for _, rank, _ in sizes} == {True, False}
    assert all(r == min(3, rank) and scaling == 6 / r for r, rank, scaling in sizes)


# --- resume -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_after(calls: int) -> tuple[Callable[[nn.Module, Batch], Tensor], list[int]]:
    """A loss that ends the run, as a kill would, instead of being computed once more."""
    seen: list[int] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if len(seen) == calls:
            raise Killed
        seen.append(1)
        return model_loss(model, batch)

    return loss, seen


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("killed", [1, 3, 5, 6, 9, 11])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_killed_run_ends_with_the_same_weights(name, killed, order, tmp_path) -> None:
    recipe = Recipe(steps=12, learning_rate=1e-2, seed=5, checkpoint_every=2)
    options: dict[str, Any] = dict(order=order, recipe=recipe, lora=LoraOptions(2, dropout=0.2), progress=False)
    undisturbed = made(name, "factors")
    history = refine_factors(undisturbed, batches_of(name), **options)

    loss, _ = killed_after(killed)
    with pytest.raises(Killed):
        refine_factors(made(name, "factors"), batches_of(name), loss=loss, checkpoint=tmp_path, **options)
    loss, seen = killed_after(10**9)
    resumed = made(name, "factors")
    again = refine_factors(resumed, batches_of(name), loss=loss, checkpoint=tmp_path, **options)
    assert again == history
    assert len(seen) == 12 - killed // 2 * 2  # it went on from the last state that was saved, in either stage
    assert moved(weights(undisturbed), weights(resumed)) == set()
    assert {p.requires_grad for p in resumed.parameters()} == {True}


def test_a_run_that_was_complete_is_not_trained_again(tmp_path) -> None:
    first, second = made("bert", "pivoted"), made("bert", "pivoted")
    options: dict[str, Any] = dict(recipe=RECIPE, checkpoint=tmp_path, progress=False)
    history = refine_factors(first, batches_of("bert"), **options)
    loss, seen = killed_after(0)
    assert refine_factors(second, batches_of("bert"), loss=loss, **options) == history
    assert seen == []
    assert moved(weights(first), weights(second)) == set()


def test_a_killed_tuning_ends_with_the_same_weights(tmp_path) -> None:
    undisturbed, resumed, recipe = made("vit", "pivoted"), made("vit", "pivoted"), replace(RECIPE, checkpoint_every=2)
    history = tune_factors(undisturbed, batches_of("vit"), recipe=RECIPE, progress=False)
    loss, _ = killed_after(5)
    with pytest.raises(Killed):
        tune_factors(
            made("vit", "pivoted"),
            batches_of("vit"),
            recipe=recipe,
            loss=loss,
            checkpoint=tmp_path,
            progress=False,
        )
    again = tune_factors(resumed, batches_of("vit"), recipe=recipe, checkpoint=tmp_path, progress=False)
    assert again == history
    assert moved(weights(undisturbed), weights(resumed)) == set()


@pytest.mark.parametrize("train", [refine_factors, tune_factors])
def test_runs_repeat_exactly_and_seeds_differ(train) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        model = made("vit", "factors")
        recipe = Recipe(steps=4, learning_rate=1e-2, seed=seed)
        train(model, batches_of("vit"), recipe=recipe, progress=False)
        return weights(model)

    one, two, three = run(1), run(1), run(2)
    assert moved(one, two) == set()
    assert moved(one, three) != set()  # dropout, and where the adapters start


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [refine_factors, tune_factors])
def test_distilling_brings_the_outputs_closer_to_those_of_the_dense_model(train) -> None:
    torch.manual_seed(0)
    teacher = bert().eval()
    task = Task("any", {}, bert, "classification", ("accuracy",), {})
    loss, student = task.divergence(teacher), made("bert", "factors", keep=0.3)
    before, kept = sum(loss(student, batch).item() for batch in batches_of("bert")), weights(teacher)
    recipe = Recipe(steps=30, learning_rate=1e-2)
    train(student, batches_of("bert"), recipe=recipe, loss=loss, progress=False)
    after = sum(loss(student.eval(), batch).item() for batch in batches_of("bert"))
    assert after < 0.5 * before
    assert moved(kept, weights(teacher)) == set()


def test_the_default_loss_is_that_of_the_model_or_cross_entropy() -> None:
    model, batch = made("llama", "factors"), batches_of("llama")[0]
    assert torch.equal(model_loss(model, batch), model(**batch).loss)
    following = get_labels(batch)[:, 1:].flatten()
    by_hand = nn.functional.cross_entropy(model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1), following)
    assert model_loss(model, batch).item() == pytest.approx(by_hand.item(), rel=1e-5)
    model, batch = made("vit", "factors"), batches_of("vit")[0]
    assert torch.equal(model_loss(model, batch), nn.functional.cross_entropy(model(batch[0]), batch[1]))


def test_positions_without_a_label_have_no_loss(generator) -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 7, 4, generator=generator)
    labels = torch.randint(0, 3, (5, 7), generator=generator)
    labels[:, 3:] = -100
    expected = nn.functional.cross_entropy(model(x[:, :3]).flatten(0, 1), labels[:, :3].flatten())
    assert torch.allclose(model_loss(model, (x, labels)), expected)
    assert torch.allclose(model_loss(model, (x[:, 0], labels[:, 0])), model_loss(model, (x[:, :1], labels[:, :1])))
    assert model_loss(model, (x, torch.full_like(labels, -100))) == 0


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_are_gone_through_again_and_again_from_where_the_steps_stand() -> None:
    batches: list[Batch] = [torch.tensor(i) for i in range(3)]
    for done in (0, 1, 3, 7):
        taken = [int(batch) for batch in islice(repeat_batches(batches)(done), 5)]
        assert taken == [(done + i) % 3 for i in range(5)]


class Once:
    """Gives its batches once, and loses patience with a caller who asks on and on."""

    def __init__(self, batches: list[Batch]) -> None:
        self.left, self.asked = list(batches), 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.left:
            return self.left.pop(0)
        self.asked += 1
        if self.asked > 1000:
            raise TimeoutError("asked a thousand times for batches that are not there")
        raise StopIteration


@pytest.mark.parametrize("train", [refine_factors, tune_factors])
@pytest.mark.parametrize("count", [0, 4])
def test_batches_that_cannot_be_repeated_are_named(train, count) -> None:
    with pytest.raises(ValueError, match="`batches` must"):
        train(made("vit", "factors"), Once(batches_of("vit")[:count]), recipe=RECIPE, progress=False)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda m, b: refine_factors(m, b, "both"),
            r"`order` must be one of \['left-right', 'right-left'\], got 'both'",
        ),
        (lambda m, b: refine_factors(m, b, recipe=Recipe(steps=1)), "`recipe` must have at least 2 steps.* got 1"),
        (lambda m, b: refine_factors(m, b, recipe=Recipe(steps=0)), "`recipe` must have at least 2 steps.* got 0"),
        (lambda m, b: refine_factors(vit(), b), "`model` must have factored layers.* got none"),
        (lambda m, b: refine_factors(m, b, lora=LoraOptions(r=0)), "`r` must be >= 1, got 0"),
        (lambda m, b: refine_factors(m, b, lora=LoraOptions(alpha=0)), "`alpha` must be > 0, got 0"),
        (lambda m, b: refine_factors(m, b, lora=LoraOptions(dropout=1.5)), r"`dropout` must be in \[0, 1\], got 1.5"),
        (lambda m, b: tune_factors(vit(), b), "`model` must have factored layers.* got none"),
    ],
)
def test_bad_input_is_named_before_anything_is_changed(call, words: str) -> None:
    model = made("vit", "factors")
    model.head.requires_grad_(False)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=words):
        call(model, batches_of("vit"))
    assert moved(weights(before), weights(model)) == set()
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]


@pytest.mark.parametrize("train", [refine_factors, tune_factors])
def test_a_loss_that_is_not_finite_stops_at_once_and_leaves_the_model_as_one(train) -> None:
    model = made("vit", "factors")
    model.head.requires_grad_(False)
    keys, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        train(
            model, batches_of("vit"), recipe=RECIPE, loss=lambda m, b: model_loss(m, b) * float("nan"), progress=False
        )
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
