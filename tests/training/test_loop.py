"""Training: the schedule, exact resume, clear failure; the cache of baselines and statistics."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowrank.tasks.baseline import load_baseline, load_calibration
from lowrank.tasks.registry import load_task
from lowrank.tasks.task import Task
from lowrank.tasks.training import sample_order, train
from lowrank.training.loop import Hooks, Recipe, fit, recipe_options
from lowrank.training.saved_states import FOLDERS, count_saved_steps

RECIPE = Recipe(steps=24, batch_size=16, learning_rate=1e-2, seed=1)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("digits", width=16, depth=1, dropout=0.2)


def fresh(task: Task) -> nn.Module:
    torch.manual_seed(7)
    return task.make_model()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_training_learns_and_repeats_exactly(task: Task) -> None:
    runs, recipe = [], Recipe(steps=400, batch_size=32, learning_rate=5e-3)
    for _ in range(2):
        model = fresh(task)
        runs.append((train(model, task, recipe, progress=False), model))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    losses = [row["loss"] for row in runs[0][0]]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert not runs[0][1].training


@pytest.mark.parametrize("killed_at", [1, 7, 8, 23])
def test_a_killed_training_ends_with_the_same_weights(task, killed_at, tmp_path, monkeypatch) -> None:
    undisturbed, recipe = fresh(task), replace(RECIPE, checkpoint_every=4)
    history = train(undisturbed, task, RECIPE, progress=False)

    class Killed(BaseException):
        pass

    calls = 0

    def loss(model, batch):
        nonlocal calls
        if calls == killed_at:
            raise Killed
        calls += 1
        return task.loss(model, batch)

    with pytest.raises(Killed):
        train(fresh(task), task, recipe, loss=loss, checkpoint=tmp_path, progress=False)
    assert count_saved_steps(tmp_path) == killed_at // 4 * 4
    killed_at = 10**9
    resumed = fresh(task)
    before = calls
    assert train(resumed, task, recipe, loss=loss, checkpoint=tmp_path, progress=False) == history
    assert calls - before == RECIPE.steps - before // 4 * 4  # it went on from the last checkpoint
    assert same(resumed, undisturbed)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_schedule_warms_up_and_ends_near_zero(task: Task) -> None:
    recipe = Recipe(steps=20, learning_rate=1.0, warmup=0.25)
    rates = [row["learning_rate"] for row in train(fresh(task), task, recipe, progress=False)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.02


def test_the_cosine_has_a_floor_and_a_power_and_can_be_left_out() -> None:
    recipe = Recipe(steps=50, warmup=0.2, floor=0.1, decay_power=0.34)
    assert [recipe.rate(step) for step in (0, 9)] == pytest.approx([0.1 + 0.9 / 10, 1.0])
    wanted = [0.1 + 0.45 * (1 + math.cos(math.pi * (t**0.34) / 40**0.34)) for t in (0, 1, 20, 39)]
    assert [recipe.rate(10 + t) for t in (0, 1, 20, 39)] == pytest.approx(wanted)
    constant = Recipe(steps=50, warmup=0.2, decay="constant")
    assert [constant.rate(step) for step in (0, 4, 10, 30, 49)] == [0.1, 0.5, 1.0, 1.0, 1.0]


def test_every_sample_is_seen_once_per_epoch() -> None:
    order = list(sample_order(10, Recipe(steps=5, batch_size=4)))
    flat = [i for batch in order for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert {len(batch) for batch in order} == {4}


def test_accumulated_batches_make_the_step_of_a_large_one() -> None:
    task = load_task("digits", width=16, depth=1, dropout=0.0)  # its masks would differ
    rows = []
    for batch_size, accumulation in ((16, 1), (4, 4)):
        model, recipe = fresh(task), Recipe(6, batch_size, 1e-2, accumulation=accumulation, seed=1)
        norm = lambda model=model: {"norm": sum(float(p.grad.norm()) for p in model.parameters())}  # noqa: E731
        rows.append(train(model, task, recipe, hooks=Hooks(log=norm), progress=False))
    for one, four in zip(*rows, strict=True):
        assert four == pytest.approx(one, rel=1e-3)
    assert rows[0][0]["norm"] != rows[0][1]["norm"]


def test_accumulation_goes_on_where_it_was_killed(task: Task, tmp_path: Path) -> None:
    recipe = Recipe(steps=6, batch_size=4, accumulation=3, learning_rate=1e-2, checkpoint_every=2)
    undisturbed, resumed = fresh(task), fresh(task)
    history = train(undisturbed, task, recipe, progress=False)

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if calls == 3 * 4 + 2:
            raise KeyboardInterrupt
        return task.loss(model, batch)

    calls = 0
    with pytest.raises(KeyboardInterrupt):
        train(fresh(task), task, recipe, loss=loss, checkpoint=tmp_path, progress=False)
    assert train(resumed, task, recipe, checkpoint=tmp_path, progress=False) == history
    assert same(resumed, undisturbed)


def test_a_loss_that_is_not_finite_stops_at_once(task: Task) -> None:
    def loss(model, batch):
        return task.loss(model, batch) * float("nan")

    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 0: lower `learning_rate` \(now 0.01\)"):
        train(fresh(task), task, RECIPE, loss=loss, progress=False)


def test_bf16_trains_in_fp32_weights(task: Task) -> None:
    model = fresh(task)
    history = train(model, task, Recipe(steps=3, precision="bf16"), progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history[-1]["loss"] != train(fresh(task), task, Recipe(steps=3), progress=False)[-1]["loss"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, "`steps` must be >= 0, got -1"),
        ({"steps": 1, "learning_rate": 0.0}, "`learning_rate` must be > 0 and finite, got 0.0"),
        ({"steps": 1, "warmup": 2.0}, r"`warmup` must be in \[0, 1\], got 2.0"),
        ({"steps": 1, "accumulation": 0}, "`accumulation` must be >= 1, got 0"),
        ({"steps": 1, "decay": "linear"}, "`decay` must be 'cosine' or 'constant', got 'linear'"),
        ({"steps": 1, "decay_power": 0.0}, "`decay_power` must be > 0 and finite, got 0.0"),
        ({"steps": 1, "floor": 1.5}, r"`floor` must be in \[0, 1\], got 1.5"),
        ({"steps": 1, "checkpoint_every": 0}, "`checkpoint_every` must be >= 1, got 0"),
        ({"steps": 1, "precision": "fp16"}, "`precision` must be 'fp32' or 'bf16', got 'fp16'"),
    ],
)
def test_bad_recipes_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe(**options)


def test_what_does_not_change_results_is_no_part_of_their_identity() -> None:
    assert recipe_options(Recipe(5)) == recipe_options(Recipe(5, workers=3, checkpoint_every=7))
    assert recipe_options(Recipe(5)) != recipe_options(Recipe(5, clip=2.0))


def test_a_baseline_is_trained_once(task: Task, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_baseline(task, RECIPE)
    calls: list[object] = []
    monkeypatch.setattr("lowrank.tasks.baseline.train", lambda *args, **kwargs: calls.append(args))
    again = load_baseline(task, RECIPE)
    assert same(first.model, again.model)
    assert first.history == again.history
    assert calls == []
    with pytest.raises(
        FileNotFoundError
    ):  # another recipe is another baseline: it is built, by a trainer that does nothing
        monkeypatch.setattr("lowrank.tasks.baseline.save_model", lambda *args: None)
        load_baseline(task, Recipe(steps=24, batch_size=16, learning_rate=1e-2, seed=2))
    assert len(calls) == 1


def test_no_steps_take_the_model_as_it_comes(task: Task, cache: Path) -> None:
    baseline = load_baseline(task, Recipe(steps=0, seed=5))
    torch.manual_seed(5)
    assert same(baseline.model, task.make_model())
    assert not cache.exists()


def test_calibration_is_cached_per_model_and_data(task: Task, cache: Path) -> None:
    model = fresh(task)
    a = load_calibration(task, model, samples=32, batch_size=8, seed=0)
    files = sorted(cache.glob("statistics/*/statistics.safetensors"))
    stamp = files[0].stat().st_mtime_ns
    b = load_calibration(task, model, samples=32, batch_size=16, seed=0)
    assert files[0].stat().st_mtime_ns == stamp
    assert all(torch.equal(a[name].gram, b[name].gram) for name in a)
    load_calibration(task, model, samples=32, batch_size=8, seed=1)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    load_calibration(task, model, samples=32, batch_size=8, seed=0)
    assert len(list(cache.glob("statistics/*/statistics.safetensors"))) == 3


def test_only_whole_states_are_resumed_from(task: Task, tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "history.json").write_text(json.dumps([{"step": 0}]))
    (tmp_path / "unrelated").write_text("kept")
    assert count_saved_steps(tmp_path) == 0
    recipe = replace(RECIPE, checkpoint_every=10)
    history = train(fresh(task), task, recipe, checkpoint=tmp_path, progress=False)
    assert len(history) == RECIPE.steps
    assert (tmp_path / "unrelated").read_text() == "kept"
    assert [p.name for p in tmp_path.glob(FOLDERS)] == ["step-000000024"]  # at every tenth step and at the last


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@pytest.mark.parametrize("count", [0, 3])
def test_batches_that_end_before_the_steps_do_are_named(generator, count) -> None:
    batches = list(torch.randn(count, 8, 4, generator=generator))
    with pytest.raises(ValueError, match=rf"`batches` must have 1 for each of 5 steps, got enough for {count}"):
        fit(nn.Linear(4, 2), lambda done: batches[done:], Recipe(steps=5), squares, progress=False)


def test_what_is_logged_sees_the_gradients_and_survives_a_resume(generator, tmp_path: Path) -> None:
    batches = list(torch.randn(6, 8, 4, generator=generator))
    model = nn.Linear(4, 2)
    seen: list[float] = []

    def log() -> dict[str, float]:
        seen.append(float(model.weight.grad.norm()))  # pyright: ignore[reportOptionalMemberAccess]
        return {"gradient": seen[-1]}

    recipe = Recipe(steps=6, clip=1e-6, checkpoint_every=2)
    options = dict(loss=squares, hooks=Hooks(log=log), checkpoint=tmp_path, progress=False)
    fit(model, lambda done: batches[done:], replace(recipe, steps=4), **options)
    rows = fit(model, lambda done: batches[done:], recipe, **options)
    assert [row["gradient"] for row in rows] == seen
    assert min(seen) > 1e-3  # before they are clipped


def test_batches_beyond_the_steps_are_not_asked_for(generator) -> None:
    asked: list[int] = []

    def batches(done: int):
        for i in range(done, 9):
            asked.append(i)
            yield torch.randn(8, 4, generator=generator)

    assert len(fit(nn.Linear(4, 2), batches, Recipe(steps=5), squares, progress=False)) == 5
    assert asked == [0, 1, 2, 3, 4]


def test_only_parameters_that_require_gradients_are_trained(generator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    data = torch.randn(8, 16, 4, generator=generator)
    recipe = Recipe(steps=8, learning_rate=1e-2, weight_decay=0.5)  # decay alone would move the frozen ones
    fit(model, lambda done: data[done:], recipe, squares, progress=False)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == flags[name]
        assert torch.equal(parameter, before[name]) is not flags[name]


def test_a_finished_training_is_not_trained_again(generator, tmp_path: Path) -> None:
    data = torch.randn(6, 16, 4, generator=generator)

    def run() -> tuple[nn.Module, list]:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        return model, fit(
            model, lambda done: data[done:], Recipe(steps=6), squares, checkpoint=tmp_path, progress=False
        )

    (first, history), (second, again) = run(), run()
    assert same(first, second)
    assert history == again


def test_a_checkpoint_of_more_steps_is_refused(generator, tmp_path: Path) -> None:
    data = torch.randn(6, 16, 4, generator=generator)
    fit(nn.Linear(4, 2), lambda done: data[done:], Recipe(steps=6), squares, checkpoint=tmp_path, progress=False)
    with pytest.raises(ValueError, match="`checkpoint` must have at most the 4 steps of the recipe, got 6 in"):
        fit(nn.Linear(4, 2), lambda done: data[done:], Recipe(steps=4), squares, checkpoint=tmp_path, progress=False)


def test_gradients_are_clipped_to_their_norm(generator) -> None:
    """The first step of plain AdamW does not see the size of a gradient; the norm that reaches it does not exceed `clip`."""
    data, seen = torch.randn(3, 16, 4, generator=generator), []
    model = nn.Linear(4, 2)
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        recipe = Recipe(steps=3, clip=0.25)
        fit(model, lambda done: data[done:], recipe, lambda m, b: 1e3 * squares(m, b), progress=False)
    assert seen == pytest.approx([0.25] * 3, rel=1e-4)
