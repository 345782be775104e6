"""Metrics against closed forms and independent libraries; measured output errors."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.output_error import output_errors
from lowrank.tasks import evaluation
from lowrank.tasks.evaluation import IGNORED, OBJECTIVES, evaluate, evaluate_samples, perplexity
from lowrank.tasks.metrics import METRICS
from lowrank.tasks.task import Task


class Fixed(nn.Module):
    """Returns its input as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_classification(generator) -> None:
    outputs = torch.randn(30, 4, generator=generator)
    targets = torch.randint(0, 4, (30,), generator=generator)
    found = evaluate(Fixed(), zip(outputs.split(7), targets.split(7), strict=True), "classification", ["accuracy"])
    assert found["accuracy"] == pytest.approx((outputs.argmax(1) == targets).double().mean().item())
    expected = -outputs.double().log_softmax(1)[torch.arange(30), targets].mean().item()
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("widened", [1, 11, 40, 77, 10**6])
def test_parts_of_large_outputs_give_the_losses_of_the_whole(widened: int, generator, monkeypatch) -> None:
    outputs = torch.randn(3, 9, 11, generator=generator).bfloat16()
    targets = torch.randint(0, 11, (3, 9), generator=generator)
    targets[1, 4:], targets[2, 0] = -100, -100
    results, whole = evaluate_samples(Fixed(), [(outputs, targets)], "language_modelling")
    most = []
    cross_entropy = torch.nn.functional.cross_entropy

    def count(values: Tensor, *args, **kwargs) -> Tensor:
        most.append(values.numel())
        return cross_entropy(values, *args, **kwargs)

    monkeypatch.setattr(evaluation, "WIDENED", widened)
    monkeypatch.setattr(evaluation.functional, "cross_entropy", count)
    again, by_sample = evaluate_samples(Fixed(), [(outputs, targets)], "language_modelling")
    np.testing.assert_allclose(by_sample, whole, rtol=1e-14)
    assert again["loss"] == pytest.approx(results["loss"], rel=1e-14)
    assert max(most) <= max(widened, 11)


@pytest.mark.parametrize("vocabulary", [2, 100, 5000])
def test_uniform_logits_have_the_vocabulary_as_perplexity(vocabulary: int) -> None:
    batch = (torch.zeros(2, 5, vocabulary), torch.zeros(2, 5, dtype=torch.long))
    assert evaluate(Fixed(), [batch], "language_modelling", ["perplexity"])["perplexity"] == pytest.approx(vocabulary)


def test_positions_predict_the_next_token_and_ignored_ones_do_not_count() -> None:
    targets = torch.tensor([[0, 1, 2, -100]])
    outputs = torch.full((1, 4, 3), -20.0)
    outputs[0, 0, 1] = outputs[0, 1, 2] = 20.0  # position 0 says token 1, position 1 says token 2
    assert evaluate(Fixed(), [(outputs, targets)], "language_modelling")["loss"] == pytest.approx(0, abs=1e-6)


def tagged(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and labels of tokens, some of them without a target; and which have one."""
    outputs, targets = torch.randn(6, 5, 4, generator=generator), torch.randint(0, 4, (6, 5), generator=generator)
    chosen = torch.rand(6, 5, generator=generator) < 0.6
    chosen[2] = False  # a sample without any
    return outputs, targets.masked_fill(~chosen, IGNORED), chosen


@pytest.mark.parametrize("objective", ["classification", "language_modelling"])
def test_labels_of_minus_100_count_nowhere(objective, generator) -> None:
    """Losses, metrics, draws and divergences are those of the positions that have a target, in any split of the batches."""
    outputs, targets, chosen = tagged(generator)
    shift = int(objective == "language_modelling")
    logits, classes = outputs[:, : 5 - shift][chosen[:, shift:]], targets[:, shift:][chosen[:, shift:]]
    expected = torch.nn.functional.cross_entropy(logits.double(), classes)
    batches = [*zip(outputs.split([2, 1, 3]), targets.split([2, 1, 3]), strict=True)]
    metrics = [] if shift else ["accuracy"]
    found = evaluate(Fixed(), batches, objective, metrics)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert found.get("accuracy") == (None if shift else pytest.approx((logits.argmax(-1) == classes).double().mean()))

    task = Task("tags", {}, Fixed, objective, ("accuracy",))
    model, teacher = Fixed(), nn.Sequential(Fixed(), nn.Tanh())
    batch, empty = (outputs, targets), (outputs[2:3], targets[2:3])
    assert torch.allclose(task.loss(model, batch).double(), expected, rtol=1e-6)
    assert torch.allclose(task.total_loss(model, batch).double(), expected * len(classes), rtol=1e-5)
    values = task.divergences(teacher)(model, batch)
    log_p, log_q = logits.tanh().log_softmax(-1), logits.log_softmax(-1)
    assert torch.allclose(
        values.flatten().sort().values, (log_p.exp() * (log_p - log_q)).sum(-1).sort().values, atol=1e-6
    )
    assert task.loss(model, empty) == task.total_loss(model, empty) == task.divergence(teacher)(model, empty) == 0
    before = task.sampled_loss(3)(model, batch)
    changed = outputs.clone()
    changed[:, : 5 - shift][~chosen[:, shift:]] += 1.0
    changed[:, 5 - shift :] += 1.0
    assert (
        torch.allclose(task.sampled_loss(3)(model, (changed, targets)), before) or shift
    )  # draws move with the logits
    assert task.sampled_loss(3)(model, empty) == 0


def test_a_number_to_predict_may_be_minus_100(generator) -> None:
    outputs, targets = torch.randn(8, 1, generator=generator), torch.full((8,), -100.0)
    found = evaluate(Fixed(), [(outputs, targets)], "regression")
    assert found["loss"] == pytest.approx((outputs + 100).square().mean().item())
    task = Task("numbers", {}, Fixed, "regression", ("pearson",))
    assert task.sampled_loss(0)(Fixed(), (outputs, targets)) < 50  # draws are near the outputs, not at -100


def test_probabilities_of_classes_are_targets_too(generator) -> None:
    outputs, targets = torch.randn(8, 3, generator=generator), torch.rand(8, 3, generator=generator).softmax(-1)
    expected = -(targets * outputs.log_softmax(-1)).sum(-1)
    assert torch.allclose(OBJECTIVES["classification"].losses(outputs, targets), expected, atol=1e-6)


def test_batches_of_unequal_size_weigh_by_targets(generator) -> None:
    outputs = torch.randn(10, 1, generator=generator)
    targets = torch.randn(10, generator=generator)
    whole = evaluate(Fixed(), [(outputs, targets)], "regression", ["pearson"])
    parts = evaluate(Fixed(), zip(outputs.split([9, 1]), targets.split([9, 1]), strict=True), "regression", ["pearson"])
    assert whole["loss"] == pytest.approx(parts["loss"])
    assert whole["pearson"] == pytest.approx(np.corrcoef(outputs[:, 0], targets)[0, 1])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_by_sample_average_to_the_loss(objective: str, generator) -> None:
    shape = {"classification": (5, 4), "regression": (5, 1), "language_modelling": (5, 6, 7)}[objective]
    targets = {
        "classification": lambda rows: torch.randint(0, 4, (rows,), generator=generator),
        "regression": lambda rows: torch.randn(rows, generator=generator),
        "language_modelling": lambda rows: torch.randint(0, 7, (rows, 6), generator=generator),
    }[objective]
    batches = [(torch.randn(rows, *shape[1:], generator=generator), targets(rows)) for rows in (5, 5, 2)]
    model = Fixed()
    results, found = evaluate_samples(model, batches, objective)
    assert found.shape == (12,)
    assert found.mean() == pytest.approx(results["loss"])
    assert results == evaluate(model, batches, objective)
    (one,) = evaluate_samples(model, [tuple(part[3:4] for part in batches[0])], objective)[1]
    assert found[3] == pytest.approx(one)


def test_metrics_in_closed_form() -> None:
    predicted, true = np.array([1, 1, 0, 0, 1.0]), np.array([1, 0, 0, 1, 1.0])
    assert METRICS["accuracy"].function(predicted, true) == pytest.approx(3 / 5)
    assert METRICS["f1"].function(predicted, true) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert METRICS["matthews"].function(predicted, true) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert METRICS["spearman"].function(np.array([1, 2, 9.0]), np.array([0.1, 0.2, 0.3])) == pytest.approx(1)
    constant = np.ones(5)
    assert METRICS["pearson"].function(constant, true) == METRICS["spearman"].function(constant, true) == -1
    assert METRICS["matthews"].function(constant, true) == 0


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_the_properties_of_a_metric_hold_for_good_and_bad_predictions(metric) -> None:
    true = np.array([1, 0, 0, 1, 1.0])
    if metric.from_loss:
        good, bad = metric.function(0.0), metric.function(2.0)
    else:
        good, bad = metric.function(true, true), metric.function(1 - true, true)
    assert metric.sign * good > metric.sign * bad
    assert (good > bad) == metric.higher_is_better
    if metric.bounds is not None:
        assert (bad, good) == pytest.approx(metric.bounds)
    assert set(metric.objectives) <= set(OBJECTIVES)


def test_a_loss_that_is_not_finite_fails_loudly() -> None:
    bad = torch.tensor([[float("nan"), 0.0]])
    with pytest.raises(FloatingPointError, match="the loss over 2 targets is nan"):
        evaluate(Fixed(), [(torch.zeros(1, 2), torch.zeros(1).long()), (bad, torch.zeros(1).long())], "classification")
    with pytest.raises(ValueError, match="at least one target, got none"):
        evaluate(Fixed(), [], "classification")


@pytest.mark.parametrize(
    ("objective", "metric"), [("classification", "perplexity"), ("language_modelling", "accuracy")]
)
def test_metrics_must_fit_the_objective(objective: str, metric: str) -> None:
    with pytest.raises(ValueError, match=f"must fit the objective '{objective}', got '{metric}'"):
        evaluate(Fixed(), [], objective, [metric])


def test_output_errors_are_those_of_the_outputs(shape, generator) -> None:
    out, inputs = shape
    model = nn.Sequential(nn.Linear(inputs, out), nn.ReLU(), nn.Linear(out, 3)).double()
    x = torch.randn(50, inputs, generator=generator, dtype=torch.float64)
    new = [torch.randn(out, inputs, generator=generator, dtype=torch.float64), torch.zeros(out, inputs)]
    weight = model[0].weight.detach()
    found = output_errors(model, x.split(7), {"0": new, "2": [torch.zeros(3, out)]})
    assert found["0"] == pytest.approx([((weight - w) @ x.T).norm().item() for w in new])
    hidden = model[1](model[0](x)).detach()
    assert found["2"] == pytest.approx([(model[2].weight.detach() @ hidden.T).norm().item()])


# --- perplexity -------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Logits that are all equal; remembers the windows that it was given."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.seen = vocabulary, []

    def forward(self, input_ids: Tensor) -> Tensor:
        self.seen.append(input_ids)
        return torch.full((*input_ids.shape, self.vocabulary), 3.5)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=31, num_key_value_heads=1, initializer_range=0.5, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("vocabulary", [2, 31, 5000])
def test_the_perplexity_of_uniform_logits_is_the_vocabulary(vocabulary: int) -> None:
    assert perplexity(Counting(vocabulary), torch.zeros(50).long(), 7) == pytest.approx(vocabulary, rel=1e-12)


@pytest.mark.parametrize(("tokens", "window"), [(50, 7), (49, 7), (55, 7), (56, 7), (8, 8), (9, 8), (5, 2)])
def test_windows_do_not_overlap_and_the_remainder_is_dropped(tokens: int, window: int, generator) -> None:
    ids = torch.randint(0, 31, (tokens,), generator=generator)
    model = Counting(31)
    perplexity(model, ids, window)
    assert [seen.shape for seen in model.seen] == [(1, window)] * (tokens // window)
    assert torch.equal(torch.cat(model.seen, 1)[0], ids[: tokens // window * window])


def test_perplexity_is_that_of_every_window_from_scratch(llama, generator) -> None:
    ids = torch.randint(0, 31, (47,), generator=generator)
    total, count = 0.0, 0
    for start in range(0, 40, 10):
        chunk = ids[start : start + 10]
        with torch.no_grad():
            scores = llama(input_ids=chunk[None]).logits[0].double().log_softmax(-1)
        for t in range(9):
            total -= scores[t, chunk[t + 1]].item()
            count += 1
    expected = math.exp(total / count)
    assert perplexity(llama, ids, 10) == pytest.approx(expected, rel=1e-6)
    assert perplexity(llama, ids[None], 10) == perplexity(llama, ids, 10)
    changed = torch.cat([ids[:40], (ids[40:] + 1) % 31])
    assert perplexity(llama, changed, 10) == perplexity(llama, ids, 10)  # the last 7 tokens do not count
    assert perplexity(llama, ids, 20) != perplexity(llama, ids, 10)
    with torch.no_grad():
        own = llama(input_ids=ids[None, :10], labels=ids[None, :10]).loss.double().exp().item()
    assert perplexity(llama, ids[:10], 10) == pytest.approx(own, rel=1e-6)  # as the model itself computes it


@pytest.mark.parametrize("window", [-1, 0, 1, 13])
def test_a_window_that_does_not_fit_is_named(window: int) -> None:
    with pytest.raises(ValueError, match=rf"`window` must be in \[2, 12\], the number of tokens, got {window}"):
        perplexity(Counting(5), torch.zeros(12).long(), window)


def test_the_perplexity_of_logits_that_are_not_finite_fails_loudly() -> None:
    model = Counting(5)
    model.forward = lambda input_ids: torch.full((*input_ids.shape, 5), float("nan"))
    with pytest.raises(FloatingPointError, match="the loss over 10 targets is nan"):
        perplexity(model, torch.zeros(12).long(), 6)


# --- targets drawn from the model -------------------------------------------------------------------------------------


def frequencies(drawn: Tensor, classes: int) -> Tensor:
    return torch.bincount(drawn.flatten(), minlength=classes).double() / drawn.numel()


def fits(drawn: Tensor, probabilities: Tensor) -> bool:
    """Pearson's statistic below a bound that chance exceeds once in a million."""
    from scipy.stats import chi2  # noqa: PLC0415

    expected = probabilities.double() * drawn.numel()
    counts = frequencies(drawn, len(probabilities)) * drawn.numel()
    return bool(((counts - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-6, len(probabilities) - 1))


def test_classes_are_drawn_as_often_as_they_are_probable(generator) -> None:
    outputs = torch.tensor([[2.0, 0.0, -1.0, 0.5, -3.0], [0.0, 0.0, 0.0, 0.0, 4.0]])
    drawn = OBJECTIVES["classification"].sample(outputs.repeat(20_000, 1), generator).view(-1, 2)
    for column, probabilities in zip(drawn.T, outputs.softmax(-1), strict=True):
        assert fits(column, probabilities)
        assert not fits(column, probabilities.roll(1))  # it tells distributions apart
    joint = frequencies(5 * drawn[:, 0] + drawn[:, 1], 25).view(5, 5)
    independent = torch.outer(*(frequencies(column, 5) for column in drawn.T))
    assert (joint - independent).abs().max() < 0.01


def test_a_drawn_token_follows_the_distribution_of_the_position_before(generator) -> None:
    outputs = torch.randn(1, 4, 6, generator=generator)
    drawn = OBJECTIVES["language_modelling"].sample(outputs.repeat(20_000, 1, 1), generator)
    assert drawn.shape == (20_000, 4)
    probabilities = outputs[0].softmax(-1)
    for position in range(3):
        assert fits(drawn[:, position + 1], probabilities[position])
        assert not fits(drawn[:, position + 1], probabilities[position + 1])


def test_values_are_drawn_around_the_prediction(generator) -> None:
    outputs = torch.tensor([[-3.0], [10.0]]).repeat(20_000, 1)
    drawn = OBJECTIVES["regression"].sample(outputs, generator).view(-1, 2)
    assert drawn.mean(0).tolist() == pytest.approx([-3.0, 10.0], abs=0.05)
    assert torch.corrcoef(drawn.T)[0, 1].abs() < 0.05


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_drawing_is_repeatable_and_leaves_the_global_generator_alone(objective: str) -> None:
    outputs = torch.randn(5, 8, 6, generator=torch.Generator().manual_seed(1))
    outputs = {"language_modelling": outputs, "classification": outputs[0], "regression": outputs[0, :, :1]}[objective]
    state = torch.get_rng_state()
    one, two, three = (OBJECTIVES[objective].sample(outputs, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(state, torch.get_rng_state())


def task_of(objective: str) -> Task:
    return Task(objective, {}, lambda: Fixed(), objective, ("loss",), {})


def test_the_gradients_of_sampled_losses_give_the_exact_fisher_of_a_softmax_model(generator) -> None:
    torch.manual_seed(0)
    model, draws = nn.Sequential(nn.Linear(3, 4)).double(), 5000
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    batches = [(x.repeat(draws, 1), torch.zeros(2 * draws).long())]
    found = collect_statistics(model, batches, ["0"], loss=task_of("classification").sampled_loss(0))["0"]
    p = model(x).softmax(-1).detach()
    exact = sum(torch.diag(row) - torch.outer(row, row) for row in p)
    assert torch.allclose(found.gradient_gram / draws, exact, atol=0.03)
    row_fisher = (p * (1 - p) * x.square().sum(1, keepdim=True)).sum(0)
    assert (found.row_fisher / draws).tolist() == pytest.approx(row_fisher.tolist(), rel=0.06)
    given = collect_statistics(model, batches, ["0"], loss=task_of("classification").total_loss)["0"]
    assert (given.row_fisher / draws - row_fisher).abs().max() > 0.1  # labels, all alike, give another


def test_squared_gradients_of_whole_sampled_losses_add_up_over_samples(generator) -> None:
    """Gradients of different samples are independent with mean zero, so the square of their sum is the sum of squares."""
    torch.manual_seed(0)
    model, loss = nn.Linear(3, 4).double(), task_of("classification").sampled_loss(5)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    total, draws = torch.zeros(4, 3, dtype=torch.float64), 1500
    for _ in range(draws):
        total += torch.autograd.grad(loss(model, (x, torch.zeros(6).long())), model.weight)[0].square()
    p = model(x).softmax(-1).detach()
    exact = (p * (1 - p)).T @ x.square()  # sum over samples of p (1 - p) x^2
    assert torch.allclose(total / draws, exact, rtol=0.2)
    assert (total / draws).sum().item() == pytest.approx(exact.sum().item(), rel=0.06)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_mean_square_of_sampled_gradients_is_the_curvature_of_the_loss(objective: str, generator) -> None:
    """What makes it Fisher information: the loss is a negative log-likelihood of the distribution that is drawn from."""
    sizes = {"classification": (1, 4), "regression": (1, 1), "language_modelling": (1, 2, 4)}
    one = torch.randn(sizes[objective], generator=generator, dtype=torch.float64)
    target = OBJECTIVES[objective].sample(one, generator)
    curvature: Tensor = torch.autograd.functional.hessian(
        lambda outputs: OBJECTIVES[objective].losses(outputs, target).sum(), one
    )
    draws = 40_000
    outputs = one.repeat(draws, *[1] * (one.dim() - 1)).requires_grad_()
    given = torch.zeros(outputs.shape[:-1]).long()
    value = task_of(objective).sampled_loss(0)(Fixed(), (outputs, given))
    gradient = torch.autograd.grad(value, outputs)[0].view(draws, -1)
    squares = gradient.T @ gradient / draws
    assert torch.allclose(squares, curvature.view_as(squares), atol=0.03 * curvature.abs().max().item())


def test_ignored_positions_stay_ignored_in_sampled_losses(generator) -> None:
    outputs = torch.randn(2, 5, 3, generator=generator, requires_grad=True)
    given = torch.tensor([[1, 2, IGNORED, 0, 1], [1, IGNORED, IGNORED, IGNORED, 1]])
    value = task_of("language_modelling").sampled_loss(0)(Fixed(), (outputs, given))
    reached = torch.autograd.grad(value, outputs)[0].abs().sum(-1) > 0
    assert torch.equal(reached[:, :-1], given[:, 1:] != IGNORED)
    assert not reached[:, -1].any()


# --- distance from a teacher ------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


SHAPES = {"classification": (7, 4), "regression": (7, 1), "language_modelling": (3, 5, 4)}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_divergence_is_zero_for_equal_outputs_and_positive_otherwise(objective: str, generator) -> None:
    measure = partial(OBJECTIVES[objective].divergence, targets=None)
    ours, theirs = (torch.randn(SHAPES[objective], generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.equal(measure(ours, ours), torch.zeros_like(measure(ours, ours)))
    assert (measure(ours, theirs) > 0).all()
    assert (
        measure(ours, theirs).shape
        == {"classification": (7,), "regression": (7,), "language_modelling": (12,)}[objective]
    )  # one per target: the last position of a text predicts nothing


def test_the_divergence_of_classes_is_that_of_kullback_and_leibler(generator) -> None:
    ours, theirs = (torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = theirs.softmax(-1), ours.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    assert torch.allclose(OBJECTIVES["classification"].divergence(ours, theirs, None), expected, rtol=1e-12)
    moved = OBJECTIVES["classification"].divergence(ours + 5, theirs - 3, None)  # logits up to a constant
    assert torch.allclose(moved, expected, rtol=1e-9)
    entropy = -(p * p.log()).sum(-1)
    soft = nn.functional.cross_entropy(ours, p, reduction="none")
    assert torch.allclose(OBJECTIVES["classification"].divergence(ours, theirs, None), soft - entropy)


def test_the_divergence_of_tokens_is_that_of_their_classes_without_the_last(generator) -> None:
    ours, theirs = (torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    by_class = OBJECTIVES["classification"].divergence(ours[:, :-1].reshape(-1, 4), theirs[:, :-1].reshape(-1, 4), None)
    assert torch.equal(OBJECTIVES["language_modelling"].divergence(ours, theirs, None), by_class)


def test_the_divergence_of_values_is_their_squared_difference(generator) -> None:
    ours, theirs = (torch.randn(7, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(OBJECTIVES["regression"].divergence(ours, theirs, None), ((ours - theirs) ** 2)[:, 0])


def test_half_precision_outputs_are_compared_in_float32(generator) -> None:
    ours, theirs = (torch.randn(7, 4, generator=generator).half() for _ in range(2))
    found = OBJECTIVES["classification"].divergence(ours, theirs, None)
    assert found.dtype == torch.float32
    assert torch.equal(found, OBJECTIVES["classification"].divergence(ours.float(), theirs.float(), None))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_distilling_does_not_train_the_teacher_and_needs_no_labels(objective: str, generator) -> None:
    x = torch.randn(SHAPES[objective], generator=generator)
    ours, theirs = (Shifted(nn.Parameter(torch.randn(SHAPES[objective][-1], generator=generator))) for _ in range(2))
    value = task_of(objective).divergence(theirs)(ours, x)
    assert value.item() == pytest.approx(OBJECTIVES[objective].divergence(ours(x), theirs(x), None).mean().item())
    value.backward()
    assert theirs.shift.grad is None
    assert ours.shift.grad is not None
    assert ours.shift.grad.abs().sum() > 0


def test_positions_without_a_target_do_not_count_when_distilling(generator) -> None:
    outputs, other = (torch.randn(2, 5, 3, generator=generator) for _ in range(2))
    given = torch.tensor([[1, 2, 0, IGNORED, IGNORED], [1, 1, 1, 2, IGNORED]])
    predicts = nn.functional.pad(given[:, 1:] != IGNORED, (0, 1))[..., None]  # the position before each target
    teacher, student = (Shifted(torch.randn(3, generator=generator)) for _ in range(2))
    student.forward = lambda x: 2 * x
    loss = task_of("language_modelling").divergence(teacher)
    one, two = (loss(student, (x, given)).item() for x in (outputs, torch.where(predicts, outputs, other)))
    assert one == pytest.approx(two)
    counted = OBJECTIVES["language_modelling"].divergence(2 * outputs, teacher(outputs), None)[
        predicts[:, :-1].flatten()
    ]
    assert one == pytest.approx(counted.mean().item())
