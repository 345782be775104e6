"""π³ against reference outputs, the official list of tensors, what must not change its outputs, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from pi3_models import TINY, images, model
from safetensors.torch import load_file
from torch import Tensor

from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import replace_layers
from lowrank.nn.targets import find_linears
from lowrank.pi3.blocks import build_rotary_table, rotate
from lowrank.pi3.heads import nearest_rotation
from lowrank.pi3.model import Pi3, Pi3Config

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "pi3"


def test_reference_outputs() -> None:
    about, tensors = json.loads((GOLDEN / "small_a.json").read_text()), load_file(GOLDEN / "small_a.safetensors")
    made = Pi3(Pi3Config(**about["config"])).eval()
    weights = {name.removeprefix("weight."): value for name, value in tensors.items() if name.startswith("weight.")}
    made.load_state_dict(weights, strict=True)
    assert sum(parameter.numel() for parameter in made.parameters()) == about["n_params"]
    seen: dict[str, Tensor] = {}
    made.encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.update(encoder_tokens_in=given[0]))
    made.point_decoder.register_forward_pre_hook(lambda _, given: seen.update(decoder_out=given[0]))
    watched = {"encoder_block.0": made.encoder.blocks[0], "encoder_patch_tokens": made.encoder}
    watched |= {f"decoder_block.{index}": block for index, block in enumerate(made.decoder)}
    watched |= {f"{name}_hidden": getattr(made, f"{name}_decoder") for name in ("point", "conf", "camera")}
    for name, module in watched.items():
        module.register_forward_hook(lambda *args, name=name: seen.update({name: args[-1]}))
    with torch.no_grad():
        outputs = made(tensors["input.imgs"])
    for name, value in seen.items():
        atol = 2e-5 if name.endswith("hidden") else 5e-6
        torch.testing.assert_close(value, tensors[f"inter.{name}"], atol=atol, rtol=0)
    for name, value in outputs.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, tensors[f"output.{name}"], atol=5e-5, rtol=0)
    rows, columns = (side // 14 for side in tensors["input.imgs"].shape[-2:])
    assert torch.equal(made.token_positions(rows, columns), tensors["inter.pos"][0])


def test_the_published_size_has_the_official_tensors() -> None:
    with torch.device("meta"):
        made = Pi3()
    own = {name: list(value.shape) for name, value in made.state_dict().items()}
    assert own == {
        name: shape for name, (shape, _) in json.loads((GOLDEN / "state_dict_full.json").read_text()).items()
    }


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        made = Pi3()
    assert sum(parameter.numel() for parameter in made.parameters()) == 958_696_732
    assert len(made.state_dict()) == 1210
    decoder = find_linears(made, [r"decoder\.\d+\..*"])
    assert sum(layer.weight.numel() for layer in decoder.values()) == 452_984_832


@pytest.mark.parametrize("scenes", [1, 2])
def test_views_in_another_order_give_the_same_outputs_in_that_order(scenes: int) -> None:
    made, shots = model(), images(scenes, 4, 3, 8, 12)
    order = [2, 0, 3, 1]
    with torch.no_grad():
        plain, turned = made(shots), made(shots[:, order])
    for name, value in plain.items():
        torch.testing.assert_close(turned[name], value[:, order], atol=1e-5, rtol=1e-4)


def test_scenes_of_a_batch_do_not_see_one_another_and_views_do() -> None:
    made, shots = model(), images(2, 3, 3, 8, 8)
    other = shots.clone()
    other[1, 2] = images(3, 8, 8, seed=1)
    with torch.no_grad():
        before, after = made(shots)["local_points"], made(other)["local_points"]
    torch.testing.assert_close(before[0], after[0], atol=1e-6, rtol=1e-5)
    assert (before[1, 0] - after[1, 0]).abs().max() > 1e-3


def test_points_are_the_local_ones_seen_from_their_camera() -> None:
    with torch.no_grad():
        found = model()(images(1, 2, 3, 12, 8))
    poses, local = found["camera_poses"], found["local_points"]
    moved = torch.einsum("bnij,bnhwj->bnhwi", poses[..., :3, :3], local) + poses[:, :, None, None, :3, 3]
    torch.testing.assert_close(found["points"], moved)
    assert (local[..., 2] > 0).all()
    rotation = poses[..., :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=5e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(1, 2), atol=5e-6, rtol=0)
    assert [tuple(found[name].shape) for name in ("points", "conf", "camera_poses")] == [
        (1, 2, 12, 8, 3),
        (1, 2, 12, 8, 1),
        (1, 2, 4, 4),
    ]


def test_gradients_of_the_nearest_rotation() -> None:
    """By finite differences at any matrix, mirrored ones too, and finite where singular values are equal."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(6, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    assert len(torch.linalg.det(matrices).sign().unique()) == 2
    assert torch.autograd.gradcheck(nearest_rotation, matrices)
    at_rotation = torch.eye(3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(nearest_rotation, at_rotation)


def test_channels_of_a_head_go_to_the_pixels_of_their_patch() -> None:
    made = model()
    tokens = torch.randn(1, 6, TINY["point_out"])
    flat = made.point_head.proj(tokens)
    shuffled = made.point_head(tokens, 2, 3)
    for patch, channel, dy, dx in ((0, 0, 0, 0), (4, 2, 3, 1), (5, 1, 0, 2)):
        y, x = 4 * (patch // 3) + dy, 4 * (patch % 3) + dx
        assert shuffled[0, y, x, channel] == flat[0, patch, channel * 16 + dy * 4 + dx]


def test_rotary_positions_see_differences_alone() -> None:
    """The product of a turned query and key depends on how far apart they are, in y and in x."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator) for _ in range(2))

    def product(one: tuple[int, int], two: tuple[int, int]) -> float:
        turned = (rotate(x, build_rotary_table(torch.tensor([at]), 16, 100)) for x, at in ((q, one), (k, two)))
        return float((next(turned) * next(turned)).sum())

    assert product((3, 5), (4, 2)) == pytest.approx(product((10, 9), (11, 6)), rel=1e-5)
    assert product((3, 5), (4, 2)) != pytest.approx(product((5, 3), (2, 4)), rel=1e-3)
    assert product((7, 7), (7, 7)) == pytest.approx(float((q * k).sum()), rel=1e-5)


def test_the_grid_of_positions_is_used_as_it_is_where_it_fits() -> None:
    made = model()
    assert torch.equal(made.encoder.resize_positions(3, 3), made.encoder.pos_embed[:, 1:])
    assert made.encoder.resize_positions(2, 5).shape == (1, 10, 32)


def test_the_nearest_rotation_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    found = nearest_rotation(torch.randn(50, 3, 3, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(found @ found.mT, torch.eye(3, dtype=torch.float64).expand(50, 3, 3))
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(nearest_rotation(found), found)
    torch.testing.assert_close(
        nearest_rotation(found * torch.tensor([1.0, 2.0, 3.0]).double()[:, None]), found
    )  # rows alone


def test_half_precision_stays_near_single() -> None:
    made, shots = model(), images(1, 3, 3, 12, 12)
    with torch.no_grad():
        single = made(shots)
        with torch.autocast("cpu", torch.bfloat16):
            half = made(shots)
    for name, value in single.items():
        assert half[name].dtype == torch.float32
        assert (half[name] - value).norm() <= 0.05 * value.norm(), name


def test_compiled_and_eager_agree() -> None:
    made, shots = model(), images(1, 2, 3, 8, 8)
    with torch.no_grad():
        eager, compiled = made(shots), torch.compile(made, backend="aot_eager")(shots)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_factors_of_the_whole_rank_change_nothing(storage: str) -> None:
    """Only linear layers are swapped: the norms of q and k and the positions stay."""
    made, shots = model(), images(1, 2, 3, 8, 8)
    linears = find_linears(made, [r"decoder\.\d+\..*"])
    with torch.no_grad():
        for layer in linears.values():
            u, sigma, v = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(u[:, :8] * sigma[:8] @ v[:8])
        before = made(shots)
        rows = replace_layers(made, dict.fromkeys(linears, 8), Configuration("svd", storage))
        after = made(shots)
    assert {row["storage"] for row in rows} == {storage}
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(1, 3, 8, 8), r"of shape \(B, N, 3, H, W\), got \(1, 3, 8, 8\)"),
        (torch.zeros(1, 2, 4, 8, 8), r"of shape \(B, N, 3, H, W\), got \(1, 2, 4, 8, 8\)"),
        (torch.zeros(1, 2, 3, 9, 8), "H a multiple of 4, got 9"),
        (torch.zeros(1, 2, 3, 8, 6), "W a multiple of 4, got 6"),
        (torch.zeros(1, 0, 3, 8, 8), "at least one view"),
        (torch.full((1, 1, 3, 8, 8), 1.5), "in \\[0, 1\\] and without NaN, got values from 1.5 to 1.5"),
        (torch.full((1, 1, 3, 8, 8), -0.1), "in \\[0, 1\\] and without NaN, got values from -0.1"),
        (torch.full((1, 1, 3, 8, 8), float("nan")), "in \\[0, 1\\] and without NaN, got values from nan"),
    ],
)
def test_refused_images(given: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model()(given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder_dim": 64}, "`decoder_dim` must be `encoder_dim`"),
        ({"decoder_depth": 3}, "`decoder_depth` must be even"),
        ({"head_heads": 4}, "`head_dim` must be a multiple of 4 times `head_heads`"),
        ({"patch_size": 0}, "`patch_size` must be >= 1, got 0"),
        ({"encoder_heads": 5}, "`encoder_dim` must be a multiple of 1 times `encoder_heads`"),
    ],
)
def test_refused_sizes(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Pi3Config(**TINY | changes)
