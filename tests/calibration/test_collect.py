"""Second moments: any split, order, merge or padding gives the same; sharing; files; gradients; bad data."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank.calibration.collect import FewTokensWarning, collect_statistics
from lowrank.calibration.hooks import collect_inputs
from lowrank.calibration.storage import hash_statistics, load_statistics, save_statistics
from lowrank.factorization.moments import MOMENTS, LayerStatistics, output_norm, whitening_factor
from lowrank.factorization.running_moments import statistics_of_rows
from lowrank.io.hashing import hash_model


class Block(nn.Module):
    """Self-attention-like: q and k share an input, the rest have their own."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.up, self.down = (
            nn.Linear(*s) for s in ((width, width), (width, 6), (width, 20), (20, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(x) + self.k(x).sum(-1, keepdim=True)
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Two blocks on embedded tokens; a mapping batch, as transformers models take it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def tokens(rows: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1, 50, (rows, length), generator=generator)


def close(a: LayerStatistics, b: LayerStatistics, tolerance: float = 1e-12) -> bool:
    fields = ("gram", "mean", "abs_mean")
    pairs = [(getattr(a, f), getattr(b, f)) for f in fields]
    return a.tokens == b.tokens and all(((x - y).norm() / y.norm()) <= tolerance for x, y in pairs)


def test_moments_are_those_of_the_inputs(model, generator) -> None:
    ids = tokens(9, 7, generator)
    found = collect_statistics(model, [{"input_ids": ids}], ["blocks.0.q", "head"])
    x = model.embed(ids).reshape(-1, 12)
    assert close(found["blocks.0.q"], LayerStatistics(x.T @ x, 63, x.mean(0), x.abs().mean(0)), 1e-14)
    assert found["head"].tokens == 9  # one vector per sample


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [13, 27], [3, 30, 7]])
def test_any_split_and_order_gives_the_same(model, generator, sizes) -> None:
    ids = tokens(40, 7, generator)
    whole = collect_statistics(model, [{"input_ids": ids}])
    parts = collect_statistics(model, [{"input_ids": part} for part in reversed(ids.split(sizes))])
    assert whole.keys() == parts.keys()
    assert all(close(whole[name], parts[name]) for name in whole)


def test_merging_parts_gives_the_whole(model, generator) -> None:
    ids = tokens(40, 7, generator)
    whole = collect_statistics(model, [{"input_ids": ids}])
    one, two = (collect_statistics(model, [{"input_ids": part}]) for part in ids.split([11, 29]))
    for name in whole:
        assert close(whole[name], one[name] + two[name])
        assert close(whole[name], two[name] + one[name])


@pytest.mark.parametrize("padding", [0, 1, 10])
def test_padding_does_not_count(model, generator, padding) -> None:
    ids = tokens(6, 8, generator)
    lengths = torch.tensor([8, 3, 5, 1, 8, 2])
    mask = torch.arange(8) < lengths[:, None]
    padded = nn.functional.pad(ids * mask, (0, padding))
    masked = collect_statistics(
        model, [{"input_ids": padded, "attention_mask": nn.functional.pad(mask.long(), (0, padding))}]
    )
    alone = collect_statistics(model, [{"input_ids": ids[i : i + 1, :n]} for i, n in enumerate(lengths)])
    for name in alone:
        assert masked[name].tokens == alone[name].tokens == int(lengths.sum())
        assert close(masked[name], alone[name])


def test_layers_with_one_input_share_one_matrix(model, generator) -> None:
    found = collect_statistics(model, [{"input_ids": tokens(4, 5, generator)}] * 3)
    pointers = {name: layer.gram.data_ptr() for name, layer in found.items()}
    assert pointers["blocks.0.q"] == pointers["blocks.0.k"]
    assert len(set(pointers.values())) == 6  # of 8 layers


class Fickle(nn.Module):
    """Three layers; a plan says for each call which of them receive x itself, a copy of it, or nothing."""

    def __init__(self, plan: Sequence[str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.plan = iter(plan)
        self.seen: list[list[Tensor]] = [[], [], []]

    def forward(self, x: Tensor) -> Tensor:
        inputs = {"x": x, "c": 2.0 * x, "-": None}
        total = torch.zeros(())
        for block, seen, which in zip(self.blocks, self.seen, next(self.plan), strict=True):
            if (value := inputs[which]) is not None:
                seen.append(value)
                total = total + block(value).sum()
        return total


PLANS = {
    "always": ["xxx"] * 3,
    "apart at once": ["xxc", "xxx", "xcx"],
    "apart later": ["xxx", "xxx", "xcx", "xxx", "ccx"],
    "two leave together": ["xxx", "xcc", "xxx"],
    "the first leaves": ["xxx", "cxx", "xxx"],
    "one pauses": ["xxx", "x-x", "xxx"],
    "the first pauses": ["xxx", "-xx", "xxx"],
    "one comes late": ["x--", "xxx", "xxx"],
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_sharing_is_decided_at_every_call(generator, plan) -> None:
    model = Fickle(plan).double()
    batches = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in plan]
    found = collect_statistics(model, batches, [f"blocks.{i}" for i in range(3)])
    for index, seen in enumerate(model.seen):
        assert close(found[f"blocks.{index}"], statistics_of_rows(torch.cat(seen)))
    always = [i for i in range(3) if all(call[i] == call[0] == "x" for call in plan)]
    assert (
        len({found[f"blocks.{i}"].gram.data_ptr() for i in always}) <= 1
    )  # those that share to the end keep one matrix


def test_layers_that_stop_sharing_within_a_pass_are_set_apart(generator) -> None:
    class Twice(nn.Module):
        """One block used twice: the second time q and k receive different tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            y = self.blocks[0](x) + self.blocks[1](x)
            return self.blocks[0](y) + self.blocks[1](3.0 * y)

    model, x = Twice().double(), torch.randn(5, 4, generator=generator, dtype=torch.float64)
    y = (model.blocks[0](x) + model.blocks[1](x)).detach()
    found = collect_statistics(model, [x, x], ["blocks.0", "blocks.1"])
    assert close(found["blocks.0"], statistics_of_rows(torch.cat([x, y] * 2)))
    assert close(found["blocks.1"], statistics_of_rows(torch.cat([x, 3.0 * y] * 2)))


def test_an_input_changed_in_place_is_another_input(generator) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            y = self.blocks[0](x)
            return y + self.blocks[1](x.mul_(2.0))

    found = collect_statistics(InPlace(), [torch.randn(5, 4, generator=generator)], ["blocks.0", "blocks.1"])
    assert torch.allclose(found["blocks.1"].gram, 4 * found["blocks.0"].gram)


def test_weights_that_are_called_twice_see_both_inputs(generator) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](self.blocks[0](x))

    model, x = Shared().double(), torch.randn(5, 4, generator=generator, dtype=torch.float64)
    found = collect_statistics(model, [x], ["blocks.0"])["blocks.0"]
    assert found.tokens == 10
    assert close(found, statistics_of_rows(torch.cat([x, model.blocks[0](x).detach()])))


@pytest.mark.parametrize("kind", ["tensor", "pair", "list"])
def test_timm_style_batches(kind, generator) -> None:
    x = torch.randn(6, 4, generator=generator)
    batch = {"tensor": x, "pair": (x, torch.zeros(6)), "list": [x, torch.zeros(6)]}[kind]
    linear = nn.Sequential(nn.Linear(4, 2))
    single = collect_statistics(linear, [batch], ["0"])["0"]
    double = collect_statistics(linear, [batch], ["0"], products=torch.float64)["0"]
    assert single.gram.dtype == double.gram.dtype == torch.float64
    assert close(single, statistics_of_rows(x), 1e-6)
    assert close(double, statistics_of_rows(x))


def test_dropout_is_off_and_modes_are_restored(generator) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2), nn.Dropout(0.5))
    model.train()
    model[2].eval()
    x = torch.randn(6, 4, generator=generator)
    assert close(collect_statistics(model, [x], ["1"])["1"], statistics_of_rows(x), 1e-6)
    assert [module.training for module in model] == [True, True, False]


def test_an_autocast_that_is_on_does_not_reach_the_products(generator) -> None:
    x = torch.randn(64, 4, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        found = collect_statistics(nn.Sequential(nn.Linear(4, 2)), [x], ["0"])["0"]
    assert close(found, statistics_of_rows(x), 1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_moments_against_a_second_method(model, generator, frozen) -> None:
    model.requires_grad_(not frozen)
    ids, target = tokens(6, 5, generator), torch.randint(0, 3, (6,), generator=generator)
    batches = [{"input_ids": a, "labels": b} for a, b in zip(ids.split(2), target.split(2), strict=True)]

    def loss(net: nn.Module, batch) -> Tensor:
        return nn.functional.cross_entropy(net(batch["input_ids"]), batch["labels"], reduction="sum")

    found = collect_statistics(model, batches, ["blocks.1.up", "head"], loss=loss)
    assert all(p.grad is None for p in model.parameters())
    probabilities = model(ids).softmax(-1).detach()
    gradient = probabilities - nn.functional.one_hot(target, 3)  # of the cross-entropy at the head, in closed form
    assert torch.allclose(found["head"].gradient_gram, gradient.T @ gradient)
    assert found["blocks.1.up"].gradient_gram.shape == (20, 20)
    whole = collect_statistics(model, [{"input_ids": ids, "labels": target}], ["blocks.1.up"], loss=loss)
    assert torch.allclose(whole["blocks.1.up"].gradient_gram, found["blocks.1.up"].gradient_gram)
    assert close(whole["blocks.1.up"], found["blocks.1.up"])


class Mixing(Model):
    """Tokens see the mean of the tokens of their sample; one output per token."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for block in self.blocks:
            seen = (x * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
            x = block(x + seen)
        return self.head(x)


@pytest.fixture
def mixing() -> Mixing:
    torch.manual_seed(1)
    return Mixing().double()


def token_loss(net: nn.Module, batch) -> Tensor:
    """Summed over the tokens that are not padding."""
    outputs = net(batch["input_ids"], batch.get("attention_mask"))
    losses = nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return losses[batch["attention_mask"].flatten() > 0].sum() if "attention_mask" in batch else losses.sum()


def token_batches(generator: torch.Generator, padded: bool) -> list[dict[str, Tensor]]:
    whole = {"input_ids": tokens(7, 6, generator), "labels": torch.randint(0, 3, (7, 6), generator=generator)}
    if padded:
        lengths = torch.tensor([6, 2, 5, 1, 6, 3, 4])
        whole["attention_mask"] = (torch.arange(6) < lengths[:, None]).long()
    parts = [value.split([4, 3]) for value in whole.values()]
    return [dict(zip(whole, part, strict=True)) for part in zip(*parts, strict=True)]


def row_fisher_by_autograd(
    net: nn.Module, batches: Sequence[dict[str, Tensor]], layer: str, loss: Callable[[nn.Module, dict], Tensor]
) -> Tensor:
    """One backward pass per sample to the weight itself; its gradient squared and summed over samples and columns."""
    weight = net.get_submodule(layer).weight
    before = weight.requires_grad
    weight.requires_grad_(True)
    total = torch.zeros(len(weight), dtype=torch.float64)
    for batch in batches:
        for i in range(len(next(iter(batch.values())))):
            value = loss(net, {key: part[i : i + 1] for key, part in batch.items()})
            total += torch.autograd.grad(value, weight)[0].double().square().sum(1)
    weight.requires_grad_(before)
    return total


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_row_fisher_is_that_of_one_backward_pass_per_sample(mixing, generator, padded, frozen) -> None:
    mixing.requires_grad_(not frozen)
    batches = token_batches(generator, padded)
    found = collect_statistics(mixing, batches, loss=token_loss)
    assert len(found) == 8
    for name, layer in found.items():
        expected = row_fisher_by_autograd(mixing, batches, name, token_loss)
        assert layer.row_fisher.dtype == torch.float64
        assert torch.allclose(layer.row_fisher, expected, rtol=1e-5, atol=1e-7 * expected.max().item())
    assert all(p.grad is None and p.requires_grad is not frozen for p in mixing.parameters())


def test_products_in_float64_give_row_fisher_in_float64(mixing, generator) -> None:
    batches = token_batches(generator, padded=True)
    found = collect_statistics(mixing, batches, ["blocks.0.up"], loss=token_loss, products=torch.float64)
    expected = row_fisher_by_autograd(mixing, batches, "blocks.0.up", token_loss)
    assert torch.allclose(found["blocks.0.up"].row_fisher, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("scale", [1e-24, 1e-12, 1e12])
def test_the_scale_of_the_loss_scales_the_gradient_moments(mixing, generator, scale) -> None:
    batches = token_batches(generator, padded=False)
    one = collect_statistics(mixing, batches, ["blocks.0.up"], loss=token_loss)["blocks.0.up"]
    two = collect_statistics(mixing, batches, ["blocks.0.up"], loss=lambda n, b: scale * token_loss(n, b))[
        "blocks.0.up"
    ]
    assert torch.allclose(two.gradient_gram / scale / scale, one.gradient_gram, rtol=1e-6, atol=1e-12)
    assert torch.allclose(two.row_fisher / scale / scale, one.row_fisher, rtol=1e-4, atol=0)


def test_padding_does_not_count_in_the_gradient_moments(mixing, generator) -> None:
    batch = token_batches(generator, padded=True)[0]
    lengths = batch["attention_mask"].sum(1).tolist()
    alone = [
        {key: batch[key][i : i + 1, :n] for key in ("input_ids", "labels")} for i, n in enumerate(lengths)
    ]  # each without its padding
    one, two = (collect_statistics(mixing, batches, loss=token_loss) for batches in ([batch], alone))
    for name in one:
        assert torch.allclose(one[name].gradient_gram, two[name].gradient_gram)
        assert torch.allclose(one[name].row_fisher, two[name].row_fisher, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_activation_that_works_in_place_does_not_change_the_gradients(generator, frozen) -> None:
    def made(inplace: bool) -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(4, 9), nn.ReLU(inplace=inplace), nn.Linear(9, 3)).requires_grad_(not frozen)

    x, target = torch.randn(30, 4, generator=generator), torch.randint(0, 3, (30,), generator=generator)

    def loss(net: nn.Module, batch) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="sum")

    apart, in_place = (collect_statistics(made(kind), [(x, target)], ["0"], loss=loss)["0"] for kind in (False, True))
    assert torch.allclose(in_place.gradient_gram, apart.gradient_gram)
    assert torch.allclose(in_place.row_fisher, apart.row_fisher)


def test_row_fisher_of_weights_that_are_called_twice_is_that_of_the_weight(generator) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](torch.tanh(self.blocks[0](x)))

    torch.manual_seed(3)
    net = Shared()
    batches = [{"x": torch.randn(5, 4, generator=generator)}]

    def loss(model: nn.Module, batch) -> Tensor:
        return model(batch["x"]).square().sum()

    found = collect_statistics(net, batches, ["blocks.0"], loss=loss)["blocks.0"]
    expected = row_fisher_by_autograd(net, batches, "blocks.0", loss)
    assert torch.allclose(found.row_fisher, expected, rtol=1e-4)


def test_gradient_moments_merge_and_split_like_the_others(mixing, generator) -> None:
    batches = token_batches(generator, padded=True)
    whole = collect_statistics(mixing, batches, loss=token_loss)
    one, two = (collect_statistics(mixing, [batch], loss=token_loss) for batch in batches)
    plain = collect_statistics(mixing, batches)
    for name in whole:
        for merged in (one[name] + two[name], two[name] + one[name]):
            assert torch.allclose(merged.gradient_gram, whole[name].gradient_gram)
            assert torch.allclose(merged.row_fisher, whole[name].row_fisher)
        assert close(plain[name], whole[name])  # the loss changes nothing in the moments of the inputs
        assert plain[name].gradient_gram is plain[name].row_fisher is None
        with pytest.raises(
            ValueError, match="must hold second moments of the output gradients exactly if this one does"
        ):
            one[name] + plain[name]


def test_files_bring_gradient_moments_back(mixing, generator, tmp_path) -> None:
    found = collect_statistics(mixing, token_batches(generator, padded=True), loss=token_loss)
    found["blocks.1.up"] = replace(
        found["blocks.1.up"], gradient_gram=None, row_fisher=None
    )  # not every layer need have them
    save_statistics(tmp_path / "s.safetensors", found, mixing, "some data")
    again = load_statistics(tmp_path / "s.safetensors", mixing, "some data")
    assert again.keys() == found.keys()
    for name in found.keys() - {"blocks.1.up"}:
        assert torch.equal(again[name].gradient_gram, found[name].gradient_gram)
        assert torch.equal(again[name].row_fisher, found[name].row_fisher)
        assert again[name].row_fisher.dtype == torch.float64
    assert again["blocks.1.up"].gradient_gram is again["blocks.1.up"].row_fisher is None
    assert again["blocks.0.q"].gram.data_ptr() == again["blocks.0.k"].gram.data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_named(mixing, generator, bad) -> None:
    with pytest.raises(ValueError, match="must give finite gradients, got NaN or infinity in layer"):
        collect_statistics(mixing, token_batches(generator, False), loss=lambda n, b: token_loss(n, b) * bad)


def test_inputs_can_be_collected_themselves(model, generator) -> None:
    ids = tokens(9, 7, generator)
    rows = collect_inputs(model, [{"input_ids": part} for part in ids.split(2)], ["blocks.0.q"], 20)["blocks.0.q"]
    assert torch.equal(rows, model.embed(ids).reshape(-1, 12)[:20])
    with pytest.raises(ValueError, match="at least 64 tokens, got 63"):
        collect_inputs(model, [{"input_ids": ids}], ["blocks.0.q"], 64)


@pytest.mark.parametrize("shrinkage", [0.0, 1e-3, 1.0])
def test_whitening_factor_is_a_factor_and_whitens(generator, shrinkage) -> None:
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) * torch.logspace(0, -4, 12)
    statistics = statistics_of_rows(x)
    factor = whitening_factor(statistics, shrinkage)
    second = statistics.gram / 200
    ridge = shrinkage * second.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    assert torch.allclose(factor @ factor.T, second + ridge, rtol=1e-12, atol=1e-15)
    if shrinkage == 0:
        white = x @ torch.linalg.inv(factor).T
        assert (white.T @ white / 200 - torch.eye(12)).norm() / 12**0.5 <= 1e-8


def test_shrinkage_is_continuous_and_scales_with_the_data(generator) -> None:
    statistics = statistics_of_rows(torch.randn(30, 8, generator=generator, dtype=torch.float64))
    factors = [whitening_factor(statistics, c) for c in (1e-1, 1e-3, 1e-6, 0.0)]
    moments = [factor @ factor.T for factor in factors]
    distances = [(moment - moments[-1]).norm().item() for moment in moments]
    assert all(a > b for a, b in pairwise(distances))
    scaled = statistics_of_rows(torch.randn(30, 8, generator=generator.manual_seed(0), dtype=torch.float64) * 100)
    assert torch.allclose(whitening_factor(scaled, 0.1).abs(), 100 * factors[0].abs())


def test_output_norm(generator) -> None:
    x, w = torch.randn(50, 6, generator=generator), torch.randn(4, 6, generator=generator)
    assert output_norm(w, statistics_of_rows(x)) == pytest.approx((w @ x.T).norm().item(), rel=1e-6)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model, generator, tmp_path) -> tuple[Path, dict[str, LayerStatistics]]:
    found = collect_statistics(model, [{"input_ids": tokens(9, 7, generator)}])
    save_statistics(tmp_path / "s.safetensors", found, model, "some data")
    return tmp_path / "s.safetensors", found


def test_files_bring_everything_back(model, saved) -> None:
    path, found = saved
    again = load_statistics(path, model, "some data")
    assert again.keys() == found.keys()
    assert all(close(again[name], found[name], 0) for name in found)
    assert again["blocks.0.q"].gram.data_ptr() == again["blocks.0.k"].gram.data_ptr()
    assert sum(key.endswith("/gram") for key in load_file(path)) == 6
    assert [p.name for p in path.parent.iterdir()] == ["s.safetensors"]


def test_files_with_the_hash_of_former_versions_are_read_and_checked(model, saved) -> None:
    path, found = saved
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors, path, metadata | {"model": hash_model(model, 16)})
    assert load_statistics(path, model).keys() == found.keys()
    save_file(tensors, path, metadata | {"model": hash_model(nn.Linear(2, 2), 16)})
    with pytest.raises(ValueError, match="`model` must be the one of"):
        load_statistics(path, model)


SIDES = ("inputs", "outputs", "smaller")


@pytest.mark.parametrize("side", SIDES)
def test_files_bring_every_moment_and_its_hash_back(mixing, generator, tmp_path, side) -> None:
    statistics = collect_statistics(mixing, token_batches(generator, padded=False), loss=token_loss, side=side)
    save_statistics(tmp_path / "s.safetensors", statistics, mixing, "some data")
    again = load_statistics(tmp_path / "s.safetensors", mixing)
    for name, layer in statistics.items():
        assert (again[name].moments().keys(), again[name].side) == (layer.moments().keys(), layer.side)
        assert all(torch.equal(again[name].moments()[field], value) for field, value in layer.moments().items())
        assert hash_statistics(again[name]) == hash_statistics(layer)


def test_the_hash_of_statistics_depends_on_every_field(mixing, generator) -> None:
    batches, every = token_batches(generator, padded=False), {}
    for side in SIDES:
        for layer in collect_statistics(mixing, batches, ["head", "blocks.0.up"], loss=token_loss, side=side).values():
            changed = [replace(layer, **{field: value * 1.5}) for field, value in layer.moments().items()]
            absent = [replace(layer, **{field: None}) for field in layer.moments() if field != "mean"]
            hashes = [hash_statistics(each) for each in (layer, *changed, *absent, replace(layer, tokens=1))]
            assert len(set(hashes)) == len(hashes)
            every |= layer.moments()
    assert every.keys() == MOMENTS.keys()


def test_every_field_declares_how_it_merges() -> None:
    assert [item.name for item in fields(LayerStatistics) if item.name not in MOMENTS] == ["tokens"]
    assert {name for name, about in MOMENTS.items() if about["merge"] == "mean"} == {"mean", "abs_mean", "output_mean"}
    assert all((about["over_tokens"] is None) != (about["over_samples"] is None) for about in MOMENTS.values())


def test_files_are_refused_for_another_model_or_data(model, saved) -> None:
    path, _ = saved
    with pytest.raises(ValueError, match=r"`data` must be that of .*'some data'\), got 'other'"):
        load_statistics(path, model, "other")
    with torch.no_grad():
        model.blocks[0].q.weight[0, 0] += 1e-9
    with pytest.raises(ValueError, match="`model` must be the one of"):
        load_statistics(path, model)


def test_damaged_and_foreign_files_are_refused(model, saved, tmp_path) -> None:
    path, _ = saved
    content = path.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100, 4, 0):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="`path` must be a whole safetensors file"):
            load_statistics(path, model)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="must have format 'lowrank.statistics/3', got None"):
        load_statistics(tmp_path / "foreign.safetensors", model)
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors.*does not exist"):
        load_statistics(tmp_path / "nowhere.safetensors", model)


# --- bad calibration data ---------------------------------------------------------------------------------------------


def test_bad_calibration_data_is_named(model, generator) -> None:
    ids = tokens(4, 5, generator)
    with pytest.raises(ValueError, match=r"no calibration token for 'blocks.0.q'"):
        collect_statistics(model, [])
    with pytest.raises(ValueError, match="at least one unmasked token, got none for layer 'blocks.0.q'"):
        collect_statistics(model, [{"input_ids": ids, "attention_mask": torch.zeros(4, 5).long()}])
    with pytest.raises(ValueError, match=r"shape \(batch, tokens\), .*, got \(4,\)"):
        collect_statistics(model, [{"input_ids": ids, "attention_mask": torch.ones(4)}])
    linear = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 2))
    for bad in (float("nan"), float("inf")):
        x = torch.ones(3, 5)
        x[1, 2] = bad
        with pytest.raises(ValueError, match="must give finite activations, got NaN or infinity in layer '0'"):
            collect_statistics(linear, [torch.ones(3, 5), x], ["0", "1"])
    with pytest.raises(ValueError, match=r"got 'blocks.7'"):
        collect_statistics(model, [{"input_ids": ids}], ["blocks.7"])
    with pytest.raises(ValueError, match="single string"):
        collect_statistics(model, [{"input_ids": ids}], "blocks.0.q")


def test_too_few_tokens_are_warned_of(model, generator) -> None:
    with pytest.warns(
        FewTokensWarning, match=r"'blocks.0.down' has 63 calibration tokens for 20 inputs: pass more batches"
    ):
        collect_statistics(model, [{"input_ids": tokens(9, 7, generator)}], ["blocks.0.q", "blocks.0.down"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect_statistics(model, [{"input_ids": tokens(20, 5, generator)}], ["blocks.0.q", "blocks.0.down"])


def test_padding_that_does_not_fit_a_layer_is_named(generator) -> None:
    class Pooled(Model):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(input_ids)
            return self.head(x.reshape(len(x), 2, -1, 12)[:, :, 0])

    mask = torch.ones(3, 4)
    mask[0, 2:] = 0
    with pytest.raises(ValueError, match="does not fit layer 'head', whose rows have shape"):
        collect_statistics(Pooled(), [{"input_ids": tokens(3, 4, generator), "attention_mask": mask}], ["head"])


def test_parts_that_do_not_fit_cannot_be_merged(generator) -> None:
    a, b = (statistics_of_rows(torch.randn(9, n, generator=generator)) for n in (4, 5))
    with pytest.raises(ValueError, match=r"shape \(4, 4\), got \(5, 5\)"):
        a + b


def test_metadata_names_model_and_data(saved) -> None:
    path, found = saved
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert header["__metadata__"]["data"] == "some data"
    assert len(header["__metadata__"]["model"]) == 32
    assert json.loads(header["__metadata__"]["layers"]).keys() == found.keys()
