"""Ranks by the input: entropies in closed form, shares of regimes, slices that are what compressing at their rank gives."""

import copy
import math

import pytest
import torch
from pi3_models import images, model
from torch import Tensor

from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import replace_layers
from lowrank.nn.low_rank import LowRankLinear
from lowrank.nn.profiling import count_flops
from lowrank.pi3.adaptive import (
    KEEP_STEPS,
    AdaptiveRank,
    EntropyScale,
    FixedRegimes,
    image_entropy,
    slice_factors,
    slice_ranks,
)
from lowrank.pi3.flops import pi3_macs
from lowrank.pi3.model import Pi3
from lowrank.pi3.speed import published_ranks

BITS = EntropyScale(0.0, 8.0, 0.25, 0.75)  # below 2 bits, from 2 to 6, from 6 on
BASE = 0.6


def factored(base: float = BASE, targets: str = "decoder") -> tuple[Pi3, Pi3]:
    """A model compressed at a base, and as it was before."""
    dense = model()
    made = copy.deepcopy(dense)
    replace_layers(made, published_ranks(made, targets, base), "svd")
    return made, dense


def levels(count: int, height: int = 16, width: int = 24) -> Tensor:
    """An image (3, H, W) of gray levels that are equally often: log2(count) bits."""
    steps = torch.arange(height * width) * count // (height * width)
    return ((steps + 0.5) / 255).view(1, height, width).expand(3, height, width)


def mixed() -> Tensor:
    """Scenes of one view of 0, 7, 4, 7 and 0 bits."""
    shots = [levels(count) for count in (1, 128, 16, 128, 1)]
    shots[3], shots[4] = shots[3].flip(-1), shots[4] + 0.5
    return torch.stack(shots)[:, None]


# --- entropy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_an_image_of_one_level_has_no_entropy(value: float) -> None:
    assert image_entropy(torch.full((3, 8, 8), value)).item() == 0


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.3)])
def test_two_halves_have_one_bit(low: float, high: float) -> None:
    image = torch.full((3, 8, 8), low)
    image[:, 2:6] = high
    assert image_entropy(image).item() == pytest.approx(1)


@pytest.mark.parametrize("count", [2, 4, 16, 255])
def test_levels_that_are_equally_often_have_the_logarithm_of_their_number(count: int) -> None:
    assert image_entropy(levels(count, 16, 255)).item() == pytest.approx(math.log2(count), rel=1e-6)


def test_all_levels_have_eight_bits() -> None:
    """But for one of 256: published weights of the channels add up to 0.9999, so that white is the level below the last."""
    image = (torch.arange(256) / 255).view(1, 16, 16).expand(3, 16, 16)
    assert image_entropy(image).item() == pytest.approx(8, abs=0.01)


def test_shares_count_as_in_the_definition() -> None:
    image = torch.zeros(3, 1, 10)
    image[:, 0, 5:8], image[:, 0, 8:] = 0.4, 0.9
    shares = (0.5, 0.3, 0.2)
    assert image_entropy(image).item() == pytest.approx(-sum(p * math.log2(p) for p in shares))


def test_channels_weigh_as_in_gray() -> None:
    """Colours of one gray are one level; of three colours equally bright none is another's gray."""
    gray = torch.zeros(3, 2, 6)
    gray[0, 0], gray[1, 1] = 0.5870, 0.2989  # red and green: 0.17545 both
    gray += 0.3 / 255  # away from the border of two levels
    assert image_entropy(gray).item() == 0
    colours = torch.eye(3)[:, None, :]
    assert image_entropy(colours).item() == pytest.approx(math.log2(3))


def test_where_pixels_are_does_not_count_and_images_are_apart() -> None:
    shots = images(2, 4, 3, 12, 20)
    shots[0, 1] = shots[0, 1] * 0.1
    found = image_entropy(shots)
    assert found.shape == (2, 4)
    order = torch.randperm(240, generator=torch.Generator().manual_seed(0))
    shuffled = shots.flatten(-2)[..., order].view_as(shots)
    assert torch.equal(image_entropy(shuffled), found)
    one_by_one = torch.stack([image_entropy(image) for image in shots.flatten(0, 1)]).view(2, 4)
    torch.testing.assert_close(one_by_one, found)
    assert found[0, 1] < found[0, 0] - 1


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), 255.0])
def test_values_that_are_no_image_are_refused(value: float) -> None:
    image = torch.rand(3, 4, 4)
    image[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"`images` must be in \[0, 1\] and without NaN, got values from"):
        image_entropy(image)


# --- regimes ----------------------------------------------------------------------------------------------------------


def test_a_quarter_of_calibration_images_is_low_and_a_quarter_high() -> None:
    entropies = 5 + 1.5 * torch.randn(400, generator=torch.Generator().manual_seed(0))
    regimes = EntropyScale.fit(entropies).find_regimes(entropies)
    assert torch.bincount(regimes, minlength=3).tolist() == [100, 200, 100]
    order = entropies.argsort()
    assert torch.equal(regimes[order], regimes.sort().values)  # never a lower regime for more entropy


def test_the_scale_by_hand() -> None:
    """Of 0 ... 100: percentiles 5 and 95, quartiles 25 and 75 of what lies between, stretched."""
    scale = EntropyScale.fit(torch.arange(101.0))
    assert (scale.least, scale.most) == pytest.approx((5, 95))
    assert (scale.low, scale.high) == pytest.approx((20 / 90, 70 / 90))
    found = scale.find_regimes(torch.tensor([[-5.0, 24.9, 25.1], [74.9, 75.1, 500.0]]))
    assert found.tolist() == [[0, 0, 1], [1, 2, 2]]
    assert BITS.find_regimes(torch.tensor([0.0, 2.0, 6.0, 8.0])).tolist() == [
        0,
        1,
        2,
        2,
    ]  # borders belong to what is above


def test_the_published_scale() -> None:
    scale = EntropyScale(0.65978, 5.53399, 0.27932, 0.73236)
    borders = (0.65978 + share * (5.53399 - 0.65978) for share in (0.27932, 0.73236))
    near = [border + step for border in borders for step in (-1e-4, 1e-4)]
    assert scale.find_regimes(torch.tensor(near)).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("entropies", [torch.full((9,), 3.0), torch.tensor([4.0]), torch.tensor([1.0, float("nan")])])
def test_entropies_that_have_no_scale_are_refused(entropies: Tensor) -> None:
    with pytest.raises(ValueError, match="`entropies` must differ, got percentiles"):
        EntropyScale.fit(entropies)


# --- slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["decoder", "all linears"])
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, BASE])
def test_a_slice_is_what_compressing_at_its_rank_gives(keep: float, targets: str) -> None:
    made, dense = factored(targets=targets)
    ranks, shots = slice_ranks(made, keep, BASE), images(1, 2, 3, 16, 24)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.no_grad():
        found = torch.func.functional_call(made, slice_factors(made, ranks), (shots,))
        replace_layers(dense, ranks, "svd")
        wanted = dense(shots)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())  # what is stored stays


def test_ranks_are_rounded_shares_of_the_stored_ones() -> None:
    made, _ = factored()
    stored = {name: layer.rank for name, layer in made.named_modules() if isinstance(layer, LowRankLinear)}
    assert len(stored) == 16
    assert slice_ranks(made, BASE, BASE) == stored
    assert slice_ranks(made, 0.2, BASE) == {name: round(rank / 3) for name, rank in stored.items()}
    assert set(slice_ranks(made, 1e-6, BASE).values()) == {1}


def test_slices_are_views_of_what_is_stored() -> None:
    made, _ = factored()
    parts = slice_factors(made, slice_ranks(made, 0.3, BASE))
    stored = dict(made.named_parameters())
    assert len(parts) == 2 * 16
    for name, part in parts.items():
        assert part.untyped_storage().data_ptr() == stored[name].untyped_storage().data_ptr()
        assert part.numel() < stored[name].numel()
    assert parts["decoder.0.attn.proj.right.weight"].shape == (round(9 / 2), 32)
    assert parts["decoder.0.attn.proj.left.weight"].shape == (32, round(9 / 2))


@pytest.mark.parametrize("keep", [0.0, -0.1, 0.61, float("nan")])
def test_a_share_beyond_the_stored_one_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=r"`keep` must be in \(0, 0.6\], the share that the model is factored at, got"):
        slice_ranks(factored()[0], keep, BASE)


def test_a_model_without_ordered_factors_is_refused() -> None:
    words = "`model` must have layers of two factors, as lowrank.compress makes them, got none"
    pivoted = model()
    replace_layers(pivoted, published_ranks(pivoted, "decoder", 0.5), Configuration("svd", "pivoted"))
    for made in (model(), pivoted):
        with pytest.raises(ValueError, match=words):
            AdaptiveRank(made, BASE, BITS)


# --- a model whose ranks depend on the scene --------------------------------------------------------------------------


def test_scenes_of_a_batch_get_their_own_regimes_and_keep_their_order() -> None:
    adaptive = AdaptiveRank(factored()[0], BASE, BITS)
    with torch.no_grad():
        found = adaptive(mixed())
        assert adaptive.regime_counts == [2, 1, 2]
        for scene, regime in enumerate([0, 2, 1, 2, 0]):
            alone, other = (adaptive.run_regime(at, mixed()[scene : scene + 1]) for at in (regime, (regime + 1) % 3))
            for name, value in found.items():
                torch.testing.assert_close(value[scene], alone[name][0], atol=1e-5, rtol=1e-4)
            assert (found["local_points"][scene] - other["local_points"][0]).abs().max() > 1e-3
        assert adaptive.regime_counts == [2, 1, 2]  # `run_regime` is no forward pass of a scene


def test_the_mean_entropy_of_its_views_decides() -> None:
    adaptive = AdaptiveRank(factored()[0], BASE, BITS)
    views = torch.stack([torch.stack([levels(1), levels(128)]), torch.stack([levels(128), levels(128)])])
    with torch.no_grad():
        adaptive(views)  # 3.5 and 7 bits
    assert adaptive.regime_counts == [0, 1, 1]


@pytest.mark.parametrize("base", [0.4, 0.5, 0.6, 1.0])
def test_regimes_are_the_published_steps_below_the_base(base: float) -> None:
    made = factored()[0]  # at another share, which does not matter for the shares of its ranks
    adaptive = AdaptiveRank(made, base, BITS)
    assert adaptive.ranks == [slice_ranks(made, base - step, base) for step in (0.3, 0.2, 0.1)]
    ranks = [own["decoder.0.mlp.fc1"] for own in adaptive.ranks]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("base", [0.3, 0.1, 1.01, float("nan")])
def test_a_base_that_leaves_nothing_is_refused(base: float) -> None:
    with pytest.raises(ValueError, match=r"`base` must be in \(0.3, 1\], got"):
        AdaptiveRank(factored()[0], base, BITS)


def test_what_was_spent_is_told() -> None:
    adaptive = AdaptiveRank(factored()[0], BASE, BITS)
    assert adaptive.summarise_costs([1, 2, 3]) == {
        "keep_stored": BASE,
        "keep_computed": 0,
        "macs": 0,
        "scenes": [0, 0, 0],
    }
    with torch.no_grad():
        adaptive(mixed())
        adaptive(mixed()[:1])
    found = adaptive.summarise_costs(iter([10.0, 20.0, 40.0]))
    assert found["scenes"] == [3, 1, 2]
    assert found["keep_stored"] == BASE
    assert found["keep_computed"] == pytest.approx((3 * 0.3 + 1 * 0.4 + 2 * 0.5) / 6)
    assert found["macs"] == pytest.approx((3 * 10 + 20 + 2 * 40) / 6)


@pytest.mark.parametrize("regime", range(len(KEEP_STEPS)))
def test_a_regime_computes_less_by_what_it_saves(regime: int) -> None:
    made, dense = factored()
    adaptive, shots = AdaptiveRank(made, BASE, BITS), images(1, 2, 3, 16, 24)
    config = dense.config
    saved = sum(pi3_macs(config, 2, 16, 24).values()) - sum(
        pi3_macs(config, 2, 16, 24, saved=adaptive.count_saved(dense, regime)).values()
    )
    assert saved > 0
    assert count_flops(lambda: dense(shots)) - count_flops(lambda: adaptive.run_regime(regime, shots)) == 2 * saved


def test_an_order_of_ones_own_gives_each_scene_the_slice_that_it_names() -> None:
    adaptive, shots = AdaptiveRank(factored()[0], BASE, BITS), mixed()
    ordered = FixedRegimes(adaptive, iter([1, 0, 2, 0, 1]))
    with torch.no_grad():
        found = [ordered(shots[:3]), ordered(shots[3:])]
        for scene, regime in enumerate([1, 0, 2, 0, 1]):
            alone = adaptive.run_regime(regime, shots[scene : scene + 1])
            for name, value in alone.items():
                torch.testing.assert_close(torch.cat([part[name] for part in found])[scene], value[0])
    assert adaptive.regime_counts == [0, 0, 0]


def test_an_order_that_ends_too_early() -> None:
    adaptive = AdaptiveRank(factored()[0], BASE, BITS)
    with pytest.raises(ValueError, match="`regimes` must be one for each scene, got none for the last 2"):
        FixedRegimes(adaptive, [0, 1, 2])(mixed())
