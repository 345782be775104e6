"""Moments on the smaller side: the same factors, spectra and errors as from the moments of the inputs."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.on_demand import OnDemand
from lowrank.calibration.storage import load_statistics, save_statistics
from lowrank.compression.compress import compress
from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import replace_layers
from lowrank.factorization.factorize import factorize, measured_norm, weighted_norm, weighted_spectrum
from lowrank.factorization.methods import METHODS, READS
from lowrank.factorization.moments import LayerStatistics, centre_moments, shrink_moments, whitening_factor
from lowrank.factorization.sides import fields_for, reads_of

SHAPES = {"tall": (20, 8), "square": (12, 12), "wide": (8, 20)}
SIDES = ("outputs", "smaller")
BIAS = 0.5


class Net(nn.Module):
    """One layer between a fixed mixing of inputs and a loss; `deficient` leaves half of its inputs without signal."""

    def __init__(self, shape: tuple[int, int], deficient: bool = False, bias: bool = True) -> None:
        super().__init__()
        out, inputs = shape
        self.mix = nn.Linear(inputs, inputs)
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(inputs, out, bias=bias)})])
        with torch.no_grad():
            self.mix.weight.mul_(torch.logspace(0, -3, inputs)[:, None])
            if deficient:
                self.mix.weight[inputs // 2 :] = 0
                self.mix.bias[inputs // 2 :] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0]["fc"](self.mix(x))


NAME = "blocks.0.fc"


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch).tanh() ** 3).sum()


def setting(kind: str, deficient: bool = False, scale: float = 1.0, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    model = Net(SHAPES[kind], deficient).to(dtype)
    model.mix.weight.data *= scale
    model.mix.bias.data *= scale
    batches = [torch.randn(16, 9, SHAPES[kind][1], dtype=dtype) for _ in range(3)]
    return model, batches


def collect(model, batches, side: str, **options) -> LayerStatistics:
    return collect_statistics(model, batches, [NAME], loss=loss, side=side, **options)[NAME]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("deficient", [False, True])
def test_factors_are_as_good_as_from_the_moments_of_the_inputs(kind, side, method, scale, deficient) -> None:
    model, batches = setting(kind, deficient, scale)
    weight = model.get_submodule(NAME).weight.detach()
    full, small = collect(model, batches, "inputs"), collect(model, batches, side)
    norm, seen = METHODS[method](full, weight), METHODS[method](small, weight)
    whole = weighted_norm(weight, norm)
    best = factorize(weight, 1, norm).spectrum
    assert torch.allclose(factorize(weight, 1, seen).spectrum, best, rtol=1e-8, atol=3e-8 * whole)
    assert torch.allclose(weighted_spectrum(weight, seen), best, rtol=1e-8, atol=3e-8 * whole)
    for rank, spectrum in product((1, 3, 6, min(SHAPES[kind])), (True, False)):
        factors = factorize(weight, rank, seen, spectrum=spectrum)
        error = weighted_norm(weight - factors.dense(), norm)
        assert factors.error == pytest.approx(error, rel=1e-6, abs=1e-7 * whole)
        optimum = weighted_norm(weight - factorize(weight, rank, norm).dense(), norm)
        assert error**2 - optimum**2 <= 1e-10 * max(optimum**2, 1e-4 * whole**2)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", ["whitened", "two_sided"])
@pytest.mark.parametrize("deficient", [False, True])
def test_full_rank_gives_the_weight_back(kind, side, method, deficient) -> None:
    model, batches = setting(kind, deficient)
    weight = model.get_submodule(NAME).weight.detach()
    weighting = METHODS[method](collect(model, batches, side), weight)
    again = factorize(weight, min(weight.shape), weighting).dense()
    assert torch.allclose(again, weight, atol=1e-9)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("method", ["whitened", "two_sided"])
def test_centring_and_shrinking_work_on_every_side(kind, method) -> None:
    model, batches = setting(kind)
    weight = model.get_submodule(NAME).weight.detach()
    full = collect(model, batches, "inputs")
    for change in (
        centre_moments,
        lambda s: shrink_moments(s, 0.1, weight),
        lambda s: shrink_moments(centre_moments(s), 0.1, weight),
    ):
        norm = METHODS[method](change(full), weight)
        for side in SIDES:
            seen = METHODS[method](change(collect(model, batches, side)), weight)
            assert torch.allclose(weighted_spectrum(weight, seen), weighted_spectrum(weight, norm), rtol=1e-8)
            error = weighted_norm(weight - factorize(weight, 4, seen).dense(), norm)
            assert error == pytest.approx(factorize(weight, 4, norm).error, rel=1e-10)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", SIDES)
def test_half_and_single_precision_models_lose_nothing_to_rounded_outputs(kind, dtype, side) -> None:
    model, batches = setting(kind, dtype=dtype)
    weight = model.get_submodule(NAME).weight.detach()
    full = collect(model, batches, "inputs", products=torch.float64)
    small = collect(model, batches, side, products=torch.float64)
    norm, seen = METHODS["whitened"](full, weight), METHODS["whitened"](small, weight)
    error = weighted_norm(weight.double() - factorize(weight.double(), 4, seen).dense(), norm)
    assert error == pytest.approx(factorize(weight.double(), 4, norm).error, rel=1e-10)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", ["whitened", "two_sided"])
@pytest.mark.parametrize("centred", [False, True])
def test_the_measured_norm_sees_the_error_and_what_storing_adds(kind, side, method, centred) -> None:
    model, batches = setting(kind)
    weight = model.get_submodule(NAME).weight.detach()
    full, small = collect(model, batches, "inputs"), collect(model, batches, side)
    if centred:
        full, small = centre_moments(full), centre_moments(small)
    norm, seen = METHODS[method](full, weight), METHODS[method](small, weight)
    factors = factorize(weight, 5, seen)
    exact = weighted_norm(weight - factors.dense(), norm)
    assert measured_norm(weight, factors, lambda x: factors.dense() @ x, seen) == pytest.approx(exact, rel=1e-7)
    half = (factors.left.bfloat16().double() @ factors.right.bfloat16().double()).double()
    wanted = weighted_norm(weight - half, norm)
    assert measured_norm(weight, factors, lambda x: half @ x, seen) == pytest.approx(wanted, rel=0.25)
    broken = factors.dense() + 0.1 * weight.norm() * torch.randn_like(weight) / weight.numel() ** 0.5
    wanted = weighted_norm(weight - broken, norm)
    assert measured_norm(weight, factors, lambda x: broken @ x, seen) == pytest.approx(wanted, rel=0.4)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("side", ["inputs", *SIDES])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_centring_keeps_its_digits_where_the_mean_is_large(kind, side, mean, tmp_path) -> None:
    """The optimum of the centred inputs, and the error in the table, for a model and products in float32."""
    torch.manual_seed(0)
    (out, inputs), rank = SHAPES[kind], 3
    model = nn.Sequential(nn.Linear(inputs, out))
    rows = torch.randn(2000, inputs) * torch.logspace(0, -1, inputs) + mean
    whole = collect_statistics(model, rows.split(700), ["0"], side=side)
    save_statistics(tmp_path / "moments", whole, model, "data")
    parts = [collect_statistics(model, [part], ["0"], side=side)["0"] for part in rows.split(1000)]
    exact, wanted = rows.double(), model.double()(rows.double()).detach()
    spectrum = torch.linalg.svdvals((exact - exact.mean(0)) @ model[0].weight.detach().T)
    optimum = spectrum[rank:].norm().item()
    model.float()
    for found in (whole, load_statistics(tmp_path / "moments", model), {"0": parts[0] + parts[1]}):
        small = copy.deepcopy(model)
        row = replace_layers(small, {"0": rank}, Configuration("whitened", centre=True), found)[0]
        error = (small.double()(exact) - wanted).norm().item()
        assert error <= optimum * 1.001
        for predicted in (row["predicted_error"], row["measured_error"]):
            assert predicted == pytest.approx(optimum / spectrum.norm().item(), rel=1e-3)


def test_only_what_the_methods_read_is_collected() -> None:
    model, batches = setting("wide")
    sizes = {}
    for method in METHODS:
        found = collect_statistics(model, batches, [NAME], loss=loss, side="smaller", methods=[method])[NAME]
        sizes[method] = set(found.moments())
        METHODS[method](found, model.get_submodule(NAME).weight)
    assert sizes["svd"] == {"mean"}
    assert sizes["asvd"] == {"mean", "abs_mean"}
    assert sizes["fwsvd"] == {"mean", "row_fisher"}
    assert sizes["whitened"] == {"mean", "output_gram", "output_mean", "input_square", "input_sketch"}
    assert sizes["two_sided"] == sizes["whitened"] | {"gradient_gram"}


@pytest.mark.parametrize("kind", SHAPES)
def test_matrices_are_of_the_smaller_size(kind) -> None:
    model, batches = setting(kind)
    found = collect(model, batches, "smaller").moments()
    assert {len(found[name]) for name in found if name.endswith("gram")} == {min(SHAPES[kind])}
    assert ("gram" in found, "output_gram" in found) == (kind != "wide", kind == "wide")
    assert ("input_gradient_gram" in found) == (kind == "tall")


def test_moments_have_their_closed_forms() -> None:
    model, batches = setting("tall")
    layer = model.get_submodule(NAME)
    small, out = collect(model, batches, "smaller"), collect(model, batches, "outputs")
    x = model.mix(torch.cat(batches)).flatten(0, 1).detach()
    y = x @ layer.weight.T.detach()
    g = y + layer.bias.detach()
    g = 3 * g.tanh() ** 2 * (1 - g.tanh() ** 2)
    back = g @ layer.weight.detach()
    assert torch.allclose(out.output_gram, y.T @ y)
    assert torch.allclose(out.output_mean, y.mean(0))
    assert torch.allclose(out.gradient_gram, g.T @ g)
    assert torch.allclose(small.input_gradient_gram, back.T @ back)
    assert torch.allclose(small.gradient_square, g.square().sum())
    assert torch.allclose(small.input_square, small.gram.trace())
    assert small.input_sketch[:, -1].abs().sum() > 0


def test_sketches_estimate_norms_without_bias_also_over_batches_and_parts() -> None:
    difference = torch.randn(20, 8, dtype=torch.float64)
    ratios = []
    for seed in range(20):
        model, _ = setting("tall")
        torch.manual_seed(seed)
        batch = torch.randn(16, 9, 8, dtype=torch.float64)
        for batches in ([batch, batch], [batch], [batch + 3]):  # a repeated batch counts twice, not four times
            found = collect(model, batches, "smaller")
            exact = (difference @ found.gram * difference).sum()
            ratios.append((difference @ found.input_sketch[:, :-1].T).square().sum() / exact)
    assert torch.stack(ratios).mean() == pytest.approx(1.0, abs=0.06)
    model, batches = setting("tall")
    one, two = (collect(model, [batch], "smaller") for batch in batches[:2])
    joined = one + two
    exact = (difference @ joined.gram * difference).sum()
    assert (difference @ joined.input_sketch[:, :-1].T).square().sum() == pytest.approx(exact, rel=0.5)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_parts_files_and_demand_give_the_same_as_one_pass(kind, side, tmp_path) -> None:
    model, batches = setting(kind)
    whole = collect(model, batches, side)
    parts = [collect(model, [batch], side) for batch in batches]
    joined = parts[0] + parts[1] + parts[2]
    demanded = OnDemand(model, batches, [NAME], loss=loss, side=side)[NAME]
    save_statistics(tmp_path / "s.safetensors", {NAME: whole}, model, "data")
    again = load_statistics(tmp_path / "s.safetensors", model)[NAME]
    assert joined.tokens == whole.tokens == again.tokens == demanded.tokens
    for other in (joined, again, demanded):
        assert other.moments().keys() == whole.moments().keys()
        for field, value in whole.moments().items():
            if not field.endswith("sketch"):
                assert torch.allclose(other.moments()[field], value, rtol=1e-12)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_padding_counts_on_no_side(kind, side) -> None:
    model, batches = setting(kind)
    inner = model.forward
    model.forward = lambda x, attention_mask=None: inner(x)
    lengths = [9, 4, 1, 7] * 4
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]

    def total(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (net(**batch).tanh() ** 3)[batch["attention_mask"].bool()].sum()

    padded = [{"x": batches[0], "attention_mask": mask.long()}]
    alone = [
        {"x": row[None, :n], "attention_mask": mask[:1, :n].long()} for row, n in zip(batches[0], lengths, strict=True)
    ]
    one, two = (collect_statistics(model, data, [NAME], loss=total, side=side)[NAME] for data in (padded, alone))
    assert one.tokens == two.tokens == sum(lengths)
    for field in one.moments().keys() - {"input_sketch", "gradient_sketch"}:
        assert torch.allclose(getattr(one, field), getattr(two, field), rtol=1e-10)


def test_parts_on_different_sides_do_not_merge() -> None:
    model, batches = setting("wide")
    with pytest.raises(ValueError, match="`other` must hold second moments of the inputs exactly if this one does"):
        collect(model, batches, "inputs") + collect(model, batches, "smaller")


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("method", ["whitened", "two_sided"])
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_compress_gives_the_same_model_from_either_side(kind, method, storage) -> None:
    model, batches = setting(kind)
    twin, _ = setting(kind)
    full = collect_statistics(model, batches, [NAME], loss=loss)
    one = compress(model, keep=0.6, statistics=full, method=method, storage=storage, progress=False)
    two = compress(twin, batches, keep=0.6, loss=loss, method=method, storage=storage, progress=False)
    assert one.ranks == two.ranks
    assert (one.layers[0]["measured_on"], two.layers[0]["measured_on"]) == ("moments", "sketch")
    for key in ("predicted_error", "measured_error"):
        assert two.layers[0][key] == pytest.approx(one.layers[0][key], rel=1e-6)
    x = batches[0]
    assert torch.allclose(model(x), twin(x), atol=1e-8)


@pytest.mark.parametrize("method", ["svd", "asvd", "fwsvd"])
def test_methods_that_read_no_second_moment_can_restore_the_mean_output(method) -> None:
    model, batches = setting("wide")
    wanted = torch.cat([model(batch) for batch in batches]).mean((0, 1))
    compress(model, batches, keep=0.5, loss=loss, method=method, centre=True, progress=False)
    assert torch.allclose(torch.cat([model(batch) for batch in batches]).mean((0, 1)), wanted, atol=1e-10)


def test_the_wrong_side_is_named() -> None:
    model, batches = setting("wide")
    weight = model.get_submodule(NAME).weight.detach()
    small = collect(model, batches, "smaller")
    with pytest.raises(ValueError, match=r"on the side of the outputs, pass `side='inputs'` to collect_statistics"):
        whitening_factor(small)
    with pytest.raises(ValueError, match="`weight` must be given for statistics on the side of the outputs"):
        shrink_moments(small, 0.1)
    with pytest.raises(ValueError, match="`side` must be one of"):
        collect(model, batches, "left")
    with pytest.raises(ValueError, match="`methods` must be among"):
        collect(model, batches, "smaller", methods=["best"])
    plain = collect_statistics(model, batches, [NAME], side="smaller")[NAME]
    with pytest.raises(ValueError, match="pass `loss` to collect_statistics"):
        METHODS["two_sided"](plain, weight)
    few = collect_statistics(model, batches, [NAME], side="smaller", methods=["whitened"])[NAME]
    with pytest.raises(ValueError, match=r"mean \|x\|: name the method in `methods` of collect_statistics"):
        METHODS["asvd"](few, weight)
    with pytest.raises(ValueError, match="`weighting` must hold `outputs` and `inputs`"):
        weighted_norm(weight, METHODS["whitened"](small, weight))


def test_no_gradient_leaves_the_one_sided_factors() -> None:
    model, batches = setting("tall")
    weight = model.get_submodule(NAME).weight.detach()
    found = collect(model, batches, "smaller")
    silent = replace(found, **{f: torch.zeros_like(v) for f, v in found.moments().items() if "gradient" in f})
    one, two = (factorize(weight, 3, METHODS[m](silent, weight)) for m in ("whitened", "two_sided"))
    assert torch.allclose(one.dense(), two.dense(), atol=1e-10)


def test_every_method_of_the_library_says_what_it_reads() -> None:
    assert READS.keys() == METHODS.keys()
    assert set(reads_of(None)) == {field for fields in READS.values() for field in fields}
    assert "gram" in reads_of(["not known"])
    assert fields_for((8, 20), "smaller", ["gram"], gradients=False)[0] == "mean"
