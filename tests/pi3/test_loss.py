"""The loss π³ is trained with: exact scales, what it does not depend on, and a training that lowers it."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from pi3_models import images, model
from torch import Tensor, nn
from torch.nn import functional

from lowrank.calibration.collect import collect_statistics
from lowrank.pi3.checkpoint import load_pi3
from lowrank.pi3.loss import (
    CONFIDENCE_WEIGHT,
    absolute_scale,
    distillation_loss,
    geometry_loss,
    relative_poses,
    sampled_loss,
)
from lowrank.pi3.pretrain import main
from lowrank.pi3.scenes import render_scene
from lowrank.pi3.small import SMALL_CONFIG, SMALL_RECIPE, scene_batches
from lowrank.training.loop import Recipe


@pytest.mark.parametrize("seed", range(10))
def test_the_scale_is_of_least_weighted_absolute_error(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y, w = (torch.randn(3, 41, generator=generator, dtype=torch.float64) for _ in range(3))
    w, x[:, :5] = w.abs(), 0.0
    found = absolute_scale(x, y, w)
    error = lambda s: (w * (s[:, None] * x - y).abs()).sum(1)  # noqa: E731
    tried = [error(y[:, i] / x[:, i]) for i in range(5, 41)]  # the optimum is at one of these
    torch.testing.assert_close(error(found), torch.stack(tried).min(0).values)


def truth(seed: int = 0, views: int = 3) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    shot = render_scene(seed, views, 16, 16)
    points, poses = shot.local_points[None], shot.poses[None]
    return (
        {"local_points": points, "camera_poses": poses, "conf": torch.full((1, views, 16, 16, 1), 40.0)},
        points,
        poses,
    )


def test_the_truth_has_no_loss_in_any_frame_and_scale() -> None:
    outputs, points, poses = truth()
    assert geometry_loss(outputs, points, poses) == pytest.approx(0.0, abs=1e-4)
    frame = render_scene(7, 1, 4, 4).poses[0]
    moved = frame @ poses
    moved[..., :3, 3] *= 2.5
    scaled = {**outputs, "local_points": 2.5 * points, "camera_poses": moved}
    assert geometry_loss(scaled, points, poses) == pytest.approx(0.0, abs=1e-4)


def test_each_part_counts() -> None:
    outputs, points, poses = truth()
    turned = poses.clone()
    turned[:, 1] = poses[:, 2]
    doubtful = torch.zeros_like(outputs["conf"])
    for name, value in (
        ("local_points", points * torch.linspace(0.5, 1.5, 16)[:, None]),
        ("camera_poses", turned),
        ("conf", doubtful),
    ):
        assert geometry_loss({**outputs, name: value}, points, poses) > 0.02


def test_relative_poses_are_of_one_camera_in_the_frame_of_another() -> None:
    poses = render_scene(1, 3, 4, 4).poses[None].double()
    expected = torch.linalg.inv(poses)[:, :, None] @ poses[:, None]
    torch.testing.assert_close(relative_poses(poses), expected, atol=1e-6, rtol=0)


def test_batches_hold_new_scenes_in_every_step_and_are_the_same_again() -> None:
    recipe = Recipe(steps=3, batch_size=8)
    one, again = list(scene_batches(0, recipe)), list(scene_batches(1, recipe))
    assert len(one) == 3
    assert all(batch[0].shape[0] * batch[0].shape[1] <= 8 for batch in one)
    assert torch.equal(one[1][0], again[0][0])
    assert not torch.equal(one[0][0][0, 0], one[1][0][0, 0])


def test_the_command_trains_and_what_it_wrote_is_read(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank.pi3.small.SMALL_RECIPE", replace(SMALL_RECIPE, steps=2, batch_size=4))
    assert main(["--folder", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "run.json"]
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["recipe"]["steps"] == 2
    assert load_pi3(tmp_path).config == SMALL_CONFIG


# --- a teacher --------------------------------------------------------------------------------------------------------


def test_a_model_that_is_its_teacher_has_no_loss_but_that_of_doubt() -> None:
    made, shots = model(), images(2, 3, 3, 8, 12)
    with torch.no_grad():
        found = distillation_loss(copy.deepcopy(made))(made, shots)
        doubt = CONFIDENCE_WEIGHT * functional.softplus(-made(shots)["conf"]).mean()  # all is right, and to be trusted
    assert found - doubt == pytest.approx(0, abs=1e-5)


def test_a_student_is_told_by_the_teacher_alone_whatever_the_batch_holds() -> None:
    student, teacher, shots = model(1), model(0), images(2, 2, 3, 8, 8)
    loss = distillation_loss(teacher)
    found = loss(student, shots)
    with torch.no_grad():
        wanted = teacher(shots)
        assert found > 0.05 + loss(teacher, shots)
        expected = geometry_loss(student(shots), wanted["local_points"], wanted["camera_poses"])
    torch.testing.assert_close(found.detach(), expected)
    for batch in ((shots, torch.zeros(3)), [shots]):
        torch.testing.assert_close(loss(student, batch), found)
    found.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    gradients = [parameter.grad for parameter in student.parameters()]
    assert all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)
    assert student.decoder[0].attn.qkv.weight.grad.norm() > 0


def test_steps_against_the_gradient_bring_a_student_nearer() -> None:
    teacher, shots = model(0), images(1, 2, 3, 8, 8)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    loss, optimizer = distillation_loss(teacher), torch.optim.Adam(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        value = loss(student, shots)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]


# --- targets that the model draws itself ------------------------------------------------------------------------------


class Scaled(nn.Module):
    """One parameter for each output of each scene: scales of local points, of positions and of confidence, and a change of
    rotations. All scenes are the same, so that each is a draw of its own."""

    def __init__(self, scenes: int) -> None:
        super().__init__()
        shot = render_scene(3, 2, 3, 4)
        self.points, self.poses = shot.local_points, shot.poses
        self.trust = torch.linspace(-2, 2, 24).view(2, 3, 4, 1)
        self.change = torch.linspace(-1, 1, 9).view(3, 3)
        starts = {"points": 1.5, "positions": 0.7, "trust": 0.8, "rotations": 0.0}
        self.own = nn.ParameterDict({name: torch.full((scenes,), start) for name, start in starts.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        own = {name: values[:, None, None, None] for name, values in self.own.items()}
        turned = self.poses[:, :3, :3] + own["rotations"] * self.change
        upper = torch.cat([turned, own["positions"] * self.poses[:, :3, 3:]], -1)
        poses = torch.cat([upper, self.poses[:, 3:].expand(len(upper), -1, -1, -1)], -2)
        points, trust = own["points"][..., None] * self.points, own["trust"][..., None] * self.trust
        return {"local_points": points, "camera_poses": poses, "conf": trust}

    def fisher(self) -> dict[str, float]:
        """Information on each parameter: squared derivatives of the normal means over a variance of 1/2; p (1 - p) of coins."""
        scale, logits = self.own["points"][0].item(), self.own["trust"][0].item() * self.trust
        extent = scale * self.points[..., 2].mean()
        return {
            "points": 2 * (self.points / (scale * self.points[..., 2:])).square().sum().item(),
            "positions": 2 * (self.poses[:, :3, 3] / extent).square().sum().item(),
            "trust": (logits.sigmoid() * (1 - logits.sigmoid()) * self.trust.square()).sum().item(),
            "rotations": 2 * 2 * self.change.square().sum().item(),  # of two views
        }


def gradients(toy: Scaled, seed: int) -> dict[str, Tensor]:
    toy.zero_grad()
    sampled_loss(seed)(toy, torch.zeros(1)).backward()
    return {name: parameter.grad for name, parameter in toy.own.items()}


def test_squared_gradients_are_the_fisher_information() -> None:
    toy, seeds = Scaled(400), 25
    drawn = [gradients(toy, seed) for seed in range(seeds)]
    for name, information in toy.fisher().items():
        own = torch.cat([one[name] for one in drawn])
        assert own.square().mean().item() == pytest.approx(information, rel=0.05), name  # 1.4 % is one deviation
        assert abs(own.mean().item()) < 4 * (information / len(own)) ** 0.5, name


def test_draws_are_of_the_seed_and_new_in_every_call() -> None:
    toy = Scaled(2)
    losses = [sampled_loss(seed) for seed in (0, 0, 1)]
    first, again, other = ([loss(toy, torch.zeros(1)).item() for _ in range(3)] for loss in losses)
    assert first == again
    assert len({*first, *other}) == 6
    assert all(torch.equal(value, gradients(toy, 5)[name]) for name, value in gradients(toy, 5).items())


def test_information_adds_up_over_scenes_and_views() -> None:
    """Summed over the batch: on average one half for each normal number, and the entropy of each coin."""
    made, shots = model(), images(3, 2, 3, 8, 12)
    loss = sampled_loss(0)
    with torch.no_grad():
        found = sum(loss(made, batch).item() for batch in [shots, (shots, None)] * 10) / 20
        coins = torch.distributions.Bernoulli(logits=made(shots)["conf"]).entropy().sum().item()
    normals = 3 * 2 * (8 * 12 * 3 + 3 * 4)
    assert found == pytest.approx(normals / 2 + coins, rel=0.03)


def test_statistics_of_gradients_are_collected_with_it() -> None:
    made = model()
    batches: list[Any] = [images(2, 2, 3, 8, 12, seed=seed) for seed in range(3)]
    layers = [r"decoder\.\d+\.mlp\.fc1"]
    one, again = (collect_statistics(made, batches, layers, loss=sampled_loss(0)) for _ in range(2))
    assert len(one) == 4
    for name, found in one.items():
        assert found.gradient_gram is not None
        assert again[name].gradient_gram is not None
        torch.testing.assert_close(found.gradient_gram, again[name].gradient_gram)
        assert found.gradient_gram.diagonal().min() > 0
        assert found.tokens == 3 * 2 * 2 * (6 + made.config.decoder_registers)
