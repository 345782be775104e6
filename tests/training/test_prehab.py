"""PREHAB: nothing happens in no steps, folding, what is trained and what is not, resuming, failures that leave a model."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from lowrank.calibration.collect import collect_statistics
from lowrank.factorization.moments import second_moment_eigh
from lowrank.io.hashing import hash_model
from lowrank.nn.batches import Batch, compute_logits
from lowrank.nn.surgery import split_packed
from lowrank.nn.targets import find_linears
from lowrank.training.loop import Recipe
from lowrank.training.penalties import PENALTIES
from lowrank.training.prehab import SCHEDULES, PrehabConfig, PrehabResult, prehab
from lowrank.training.refine import model_loss
from lowrank.training.whitened_linear import WhitenedLinear

RECIPE = Recipe(steps=1, learning_rate=1e-2, weight_decay=0.0, warmup=0.0, seed=3)
every_penalty = pytest.mark.parametrize("penalty", PENALTIES)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification  # noqa: PLC0415

    sizes = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, initializer_range=0.5
    )
    return BertForSequenceClassification(BertConfig(vocab_size=31, max_position_embeddings=16, num_labels=3, **sizes))


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    return VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=16, depth=2, num_heads=2)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, num_key_value_heads=1, **sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "vit": vit, "llama": llama}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def data(name: str, generator: torch.Generator, count: int = 4) -> list[Batch]:
    found: list[Batch] = []
    for _ in range(count):
        if name == "vit":
            images = torch.randn(6, 1, 8, 8, generator=generator)
            found.append((images, torch.randint(3, (6,), generator=generator)))
        else:
            tokens = torch.randint(31, (6, 8), generator=generator)
            found.append({"input_ids": tokens, "labels": tokens if name == "llama" else tokens[:, 0] % 3})
    return found


def run(model: nn.Module, batches: list[Batch], **options: Any) -> PrehabResult:
    """Prepares a model; `options` are of `prehab`, of its config or of its recipe."""
    statistics = options.pop("statistics", None)
    statistics = collect_statistics(model, batches) if statistics is None else statistics
    recipe = replace(options.pop("recipe", RECIPE), checkpoint_every=options.pop("checkpoint_every", 2))
    fields = PrehabConfig.__dataclass_fields__.keys() & options.keys()
    config = PrehabConfig(**(dict(steps=6, refresh=2) | {name: options.pop(name) for name in fields}))
    return prehab(model, statistics, batches, config, recipe=recipe, progress=False, **options)


@every_model
def test_no_steps_give_the_model_back_bit_for_bit(name, generator) -> None:
    model = made(name)
    before = hash_model(model)
    result = run(model, data(name, generator), steps=0)
    assert result.model is model
    assert result.history == []
    assert hash_model(model) == before


@every_model
@every_penalty
def test_the_folded_model_is_the_one_that_was_trained(name, penalty, generator) -> None:
    """Same keys in the same order, same module objects, and the outputs of the wrapped model."""
    model, batches = made(name), data(name, generator)
    keys, layers, frozen = list(model.state_dict()), dict(model.named_modules()), copy.deepcopy(model)
    outputs: list[Tensor] = []

    def loss(wrapped: nn.Module, batch: Batch) -> Tensor:
        assert any(isinstance(module, WhitenedLinear) for module in wrapped.modules())
        wrapped.eval()
        outputs.append(compute_logits(wrapped, batches[0]).detach())
        return model_loss(wrapped, batch)

    run(model, batches, penalty=penalty, loss=loss, strength=2.0, recipe=replace(RECIPE, learning_rate=1e-30), steps=1)
    torch.testing.assert_close(compute_logits(model, batches[0]), outputs[0], atol=1e-5, rtol=1e-5)
    run(model, batches, penalty=penalty, loss=loss, strength=2.0)
    assert list(model.state_dict()) == keys
    assert all(module is layers[key] for key, module in model.named_modules())
    own, old = model.state_dict(), frozen.state_dict()
    moved = {key for key in keys if not torch.equal(own[key], old[key])}
    assert moved == {f"{layer}.weight" for layer in find_linears(model)}  # biases, norms and embeddings stay


@pytest.mark.parametrize("shape", [(7, 12), (12, 12), (12, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_wrapped_and_folded_agree_after_any_change(shape, bias, generator) -> None:
    out, inputs = shape
    linear = nn.Linear(inputs, out, bias=bias)
    mixed = torch.randn(200, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    found = collect_statistics(nn.Sequential(linear), [mixed], ["0"])["0"]
    values, vectors = second_moment_eigh(found, 0.01)
    factor = vectors * values.sqrt()
    layer = WhitenedLinear(linear, factor, (vectors / values.sqrt()).T)
    x = torch.randn(20, inputs, generator=generator)
    before, weight = linear(x), linear.weight.detach().clone()
    assert torch.equal(layer(x), before)
    layer.delta.data = torch.randn(shape, generator=generator)
    expected = weight.double() + layer.delta.detach().double() @ torch.linalg.inv(factor)
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.whitened_weight().detach().double(), expected @ factor, rtol=1e-4, atol=1e-4)
    wrapped = layer(x)
    folded = layer.fold()
    assert folded is linear
    assert (folded.bias is not None) == bias
    torch.testing.assert_close(folded(x), wrapped, rtol=1e-5, atol=1e-5)


@every_penalty
def test_the_penalty_falls_and_without_strength_it_need_not(penalty, generator) -> None:
    batches = data("bert", generator)
    options: dict[str, Any] = dict(penalty=penalty, schedule="constant", steps=40, refresh=5, checkpoint_every=5)
    pressed = pd.DataFrame(run(made("bert"), batches, strength=30.0, **options).history)
    free = pd.DataFrame(run(made("bert"), batches, strength=0.0, **options).history)
    assert pressed.penalty.dropna().iloc[-1] < 0.9 * pressed.penalty[0]
    assert pressed.penalty.dropna().iloc[-1] < free.penalty.dropna().iloc[-1]
    assert free.loss.iloc[-4:].mean() < free.loss.iloc[:4].mean()  # lambda = 0 trains
    assert (free.strength == 0).all()
    assert (pressed.loss - pressed.task_loss - 30.0 * pressed.penalty).abs().max() < 1e-4
    assert pressed.penalty[0] == pytest.approx(1.0, abs=1e-5)  # in units of the start


def test_the_history_says_what_was_done(generator) -> None:
    rows = pd.DataFrame(run(made("llama"), data("llama", generator), steps=10, strength=1.0, penalty="nuclear").history)
    columns = ["step", "loss", "learning_rate", "task_loss", "penalty", "strength"]
    assert list(rows.step) == list(range(10))
    assert not rows[columns].isna().any().any()
    every_second = rows.iloc[2::2]  # the first step has no strength yet
    assert (every_second.gradient_ratio > 0).all()
    assert rows[["stable_rank", "effective_rank", "tail_energy"]].iloc[::2].notna().all().all()
    assert rows[["stable_rank", "effective_rank", "tail_energy"]].iloc[1::2].isna().all().all()
    assert (rows.strength.diff().dropna() >= 0).all()
    assert rows.strength.iloc[-1] == 1.0


def test_the_gradient_ratio_is_that_of_the_two_gradients(generator) -> None:
    """Twice the strength, twice the ratio; and the ratio of a task that counts double is half."""
    batches = data("bert", generator)
    options: dict[str, Any] = dict(schedule="constant", steps=1, penalty="entropy_rank")
    plain = run(made("bert"), batches, strength=1.0, **options).history[0]["gradient_ratio"]
    strong = run(made("bert"), batches, strength=2.0, **options).history[0]["gradient_ratio"]
    double = run(made("bert"), batches, strength=1.0, loss=lambda m, b: 2 * model_loss(m, b), **options)
    assert strong == pytest.approx(2 * plain, rel=1e-4)
    assert double.history[0]["gradient_ratio"] == pytest.approx(plain / 2, rel=1e-4)


def test_schedules_start_and_end_where_they_say() -> None:
    for name, share in SCHEDULES.items():
        assert share(1.0) == pytest.approx(1.0)
        assert share(0.0) == pytest.approx({"constant": 1.0, "geometric": 1e-5}.get(name, 0.0))
        assert all(0 <= share(p / 10) <= 1 for p in range(11))


@every_penalty
def test_the_same_seed_gives_the_same_losses(penalty, generator) -> None:
    batches = data("bert", generator)
    one, other = (run(made("bert"), batches, penalty=penalty) for _ in range(2))
    assert [row["loss"] for row in one.history] == [row["loss"] for row in other.history]
    assert hash_model(one.model) == hash_model(other.model)


@every_penalty
def test_a_killed_run_goes_on_to_the_same_end(penalty, generator, tmp_path: Path) -> None:
    batches = data("bert", generator)
    whole = run(made("bert"), batches, penalty=penalty, steps=8)
    calls = itertools.count()

    def killed(model: nn.Module, batch: Batch) -> Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return model_loss(model, batch)

    model = made("bert")
    statistics = collect_statistics(model, batches)
    before = list(model.state_dict())
    options: dict[str, Any] = dict(penalty=penalty, steps=8, statistics=statistics, checkpoint=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(model, batches, loss=killed, **options)
    assert list(model.state_dict()) == before  # plain weights, whatever happened
    resumed = run(made("bert"), batches, **options)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]
    assert hash_model(resumed.model) == hash_model(whole.model)


def test_frozen_parameters_stay_frozen(generator) -> None:
    """Frozen weights are not trained, with or without the others, and every flag is as it was."""
    model, batches = made("bert"), data("bert", generator)
    frozen = model.get_submodule("bert.encoder.layer.0.output.dense")
    frozen.weight.requires_grad_(False)  # pyright: ignore
    model.get_submodule("classifier").requires_grad_(False)
    before, flags = copy.deepcopy(model.state_dict()), {n: p.requires_grad for n, p in model.named_parameters()}
    run(model, batches, others=True)
    after = model.state_dict()
    still = {key for key in before if torch.equal(before[key], after[key])}
    assert {"bert.encoder.layer.0.output.dense.weight", "classifier.weight", "classifier.bias"} <= still
    assert {"bert.encoder.layer.0.output.dense.bias", "bert.embeddings.word_embeddings.weight"}.isdisjoint(still)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_packed_projections_split_three_ways_are_three_matrices(generator) -> None:
    """The penalties of q, k and v are those of the three parts of the packed weight."""
    model, batches = made("vit"), data("vit", generator)
    packed = model.get_submodule("blocks.0.attn.qkv").weight.detach().clone()  # pyright: ignore
    split_packed(model, [r".*\.attn\.qkv"])
    names = [f"blocks.0.attn.qkv.{part}" for part in "qkv"]
    statistics = collect_statistics(model, batches, names)
    assert len({id(moments.gram) for moments in statistics.values()}) == 1
    seen: dict[str, Tensor] = {}

    def loss(wrapped: nn.Module, batch: Batch) -> Tensor:
        seen.update({name: wrapped.get_submodule(name).whitened_weight().detach() for name in names})  # pyright: ignore
        return model_loss(wrapped, batch)

    run(model, batches, statistics=statistics, loss=loss, steps=1, penalty="nuclear")
    found = statistics[names[0]]
    values, vectors = second_moment_eigh(found, 0.01)
    whole = packed.double() @ (vectors * (values / values.mean()).sqrt())
    torch.testing.assert_close(torch.cat([seen[name] for name in names]).double(), whole, atol=1e-5, rtol=1e-5)


def test_bfloat16_weights_are_trained_in_float32(generator) -> None:
    """Steps too small for bfloat16 add up."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).to(torch.bfloat16)
    batches = [(torch.randn(16, 8, generator=generator).bfloat16(), torch.randint(3, (16,), generator=generator))]
    before = model[0].weight.detach().clone()
    recipe = replace(RECIPE, learning_rate=1e-4)
    run(model, batches, statistics=collect_statistics(model, batches, ["0"]), steps=60, recipe=recipe)
    assert model[0].weight.dtype == torch.bfloat16
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"penalty": "rank"},
            r"`penalty` must be one of \['entropy_rank', 'nuclear', 'stable_rank', 'tail'\], got 'rank'",
        ),
        ({"schedule": "step"}, r"`schedule` must be one of \[.*'linear'\], got 'step'"),
        ({"strength": -1.0}, r"`strength` must be finite and >= 0, got -1.0"),
        ({"strength": math.nan}, r"`strength` must be finite and >= 0, got nan"),
        ({"steps": -1}, r"`steps` must be >= 0, got -1"),
        ({"shrinkage": 0.0}, r"`shrinkage` must be > 0 and finite, got 0.0"),
        ({"refresh": 0}, r"`refresh` must be >= 1, got 0"),
        ({"checkpoint_every": 3}, r"`recipe` must have a `checkpoint_every` that is a multiple of `refresh`, 2, got 3"),
        ({"target_keep": 0.0}, r"`target_keep` must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_options_name_themselves_and_change_nothing(options, message, generator) -> None:
    model = made("bert")
    before = hash_model(model)
    with pytest.raises(ValueError, match=message):
        run(model, data("bert", generator), **options)
    assert hash_model(model) == before


def test_no_batches_are_named_and_leave_the_model(generator) -> None:
    model, batches = made("bert"), data("bert", generator)
    statistics = collect_statistics(model, batches)
    before = hash_model(model)
    with pytest.raises(ValueError, match="`batches` must hold at least one batch, got none"):
        prehab(model, statistics, [], progress=False)
    with pytest.raises(ValueError, match="`batches` must be iterable more than once"):
        prehab(model, statistics, iter(batches), progress=False)
    assert hash_model(model) == before
    assert not any(isinstance(module, WhitenedLinear) for module in model.modules())


def test_statistics_of_another_model_are_refused(generator) -> None:
    batches = data("bert", generator)
    statistics = collect_statistics(made("bert"), batches)
    with pytest.raises(ValueError, match=r"`statistics` must be of this model, got layer 'bert\.encoder\.layer\.0\."):
        run(made("llama"), data("llama", generator), statistics=statistics)
    name = next(iter(statistics))
    wrong = statistics | {name: next(s for s in statistics.values() if len(s.gram) != len(statistics[name].gram))}
    with pytest.raises(ValueError, match=rf"of size 16 for a weight of shape .*, got 24\. \(layer '{name}'\)"):
        run(made("bert"), batches, statistics=wrong)
    spoilt = replace(statistics[name], gram=statistics[name].gram * math.nan)
    with pytest.raises(ValueError, match=rf"NaN or infinity in the second moments of the inputs\. \(layer '{name}'\)"):
        run(made("bert"), batches, statistics=statistics | {name: spoilt})


def test_shared_and_frozen_weights_are_refused_by_name(generator) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    batches: list[Batch] = [(torch.randn(16, 8, generator=generator), torch.randint(3, (16,), generator=generator))]
    statistics = collect_statistics(model, batches, ["0", "1"])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="at least one layer whose weight is not frozen, got none"):
        run(model, batches, statistics=statistics)
    model.requires_grad_(True)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"leave out layer '0': its weight is shared \(0\.weight, 1\.weight\)"):
        run(model, batches, statistics=statistics)


def test_a_loss_that_is_not_finite_names_step_and_layer_and_keeps_the_last_good_state(generator) -> None:
    batches = data("bert", generator)
    model, calls = made("bert"), itertools.count()
    layers = list(find_linears(model))
    before_step_4: dict[str, Tensor] = {}

    def breaks(wrapped: nn.Module, batch: Batch) -> Tensor:
        call = next(calls)
        if call == 4:
            before_step_4.update({name: wrapped.get_submodule(name).weight.detach().clone() for name in layers})  # pyright: ignore
        if call == 5:
            wrapped.get_submodule("bert.encoder.layer.1.intermediate.dense").delta.data.fill_(math.nan)  # pyright: ignore
        return model_loss(wrapped, batch)

    message = r"the loss is nan at step 5.*'bert\.encoder\.layer\.1\.intermediate\.dense'.*weights before step 4"
    with pytest.raises(FloatingPointError, match=message):
        run(model, batches, loss=breaks, steps=8)
    start = made("bert").state_dict()
    for name in layers:
        weight = model.state_dict()[f"{name}.weight"]
        torch.testing.assert_close(weight, before_step_4[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(weight, start[f"{name}.weight"])


def test_inputs_that_are_not_finite_name_the_first_layer_that_sees_them(generator) -> None:
    model, batches = made("vit"), data("vit", generator)
    statistics = collect_statistics(model, batches)
    before = hash_model(model)
    images, classes = batches[0]
    with pytest.raises(FloatingPointError, match=r"step 0.*'blocks\.0\.attn\.qkv'.*as it was before"):
        run(model, [(images * math.nan, classes)], statistics=statistics)
    assert hash_model(model) == before


@pytest.mark.parametrize(
    "odd", ["no weight", "no input", "neither", "one direction of weight", "one direction of input"]
)
@pytest.mark.parametrize("shape", [(6, 12), (8, 8), (12, 6)])
@every_penalty
def test_layers_without_weight_or_input_leave_the_task_in_charge(penalty, shape, odd, generator) -> None:
    """The penalty of such a layer is of the size of the others', not in units of next to nothing."""
    torch.manual_seed(0)
    out, inputs = shape
    model = nn.Sequential(nn.Linear(inputs, out), nn.Tanh(), nn.Linear(out, 3))
    x, labels = torch.randn(60, inputs, generator=generator), torch.randint(3, (60,), generator=generator)
    with torch.no_grad():
        if odd in ("no weight", "neither"):
            model[0].weight.zero_()
        if odd == "one direction of weight":
            model[0].weight[1:] = 0
    seen = x * 0 if odd in ("no input", "neither") else x
    if odd == "one direction of input":
        seen = x[:, :1] * torch.ones(inputs)
    statistics = collect_statistics(model, [seen.repeat(3, 1)], ["0"]) | collect_statistics(
        model, [x.repeat(3, 1)], ["2"]
    )
    config = PrehabConfig(penalty, steps=8, target_keep=0.5, schedule="constant", refresh=2)
    recipe = replace(RECIPE, checkpoint_every=2)
    found = prehab(model, statistics, [(x, labels)], config, recipe=recipe, progress=False).history
    assert all(math.isfinite(row["loss"]) and 0 <= row["penalty"] <= 3 for row in found)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert found[-1]["loss"] < found[0]["loss"] + 0.5
