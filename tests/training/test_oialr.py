"""OIALR: ranks are cut as published, functions are preserved, optimisers go on, states come back, replicas stay equal."""

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_in_two
from torch import Tensor, nn
from torch.nn import functional

from lowrank.compression.checkpoint import load_compressed, save_compressed
from lowrank.compression.replace import fold
from lowrank.nn.surgery import replace_module
from lowrank.nn.usv import USV, USVConv2d, USVLinear
from lowrank.training.loop import Hooks, Recipe, fit
from lowrank.training.oialr import OIALR, OIALRConfig
from lowrank.training.optimizer_state import replace_parameter
from lowrank.training.rank_cut import cut_rank

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "stability" / "rank_cut.json"
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
}
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)


class Net(nn.Module):
    """A convolution, a wide, a tall and a square layer, a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 2, stride=2)
        self.blocks = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False),
            nn.Flatten(),
            nn.Linear(48, 20, bias=False),
            nn.LayerNorm(20),
            nn.Tanh(),
            nn.Linear(20, 32),
            nn.Tanh(),
            nn.Linear(32, 32),
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch_embed(x)))


CONVERTED = ["blocks.0", "blocks.2", "blocks.5", "blocks.7"]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def images(count: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return x, (x.mean((2, 3)) > 0).sum(1)


def advance(model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor] | None = None) -> float:
    x, y = batch or images()
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(
    steps: int, kind: str = "adamw", seed: int = 0, **options: Any
) -> tuple[Net, Any, OIALR, list[tuple[int, list[int]]]]:
    """A model after some steps, its optimiser, its OIALR, and (step, ranks) of each."""
    model = net(seed)
    optimizer = OPTIMIZERS[kind](model.parameters())
    method = OIALR(model, OIALRConfig(**{"delay": 5, "frequency": 3, "coverage": 0.0} | options))
    seen = []
    for step in range(steps):
        advance(model, optimizer)
        method.step(optimizer)
        seen.append((step + 1, list(method.ranks.values())))
    return model, optimizer, method, seen


# --- the rank cut ---


def test_reference_cuts() -> None:
    for case in json.loads(GOLDEN.read_text())["cases"]:
        minimum = int(0.01 * case["prev_rank"])
        for values in (case["sigma"], torch.tensor(case["sigma"])):
            assert cut_rank(values, case["prev_rank"], case["beta"], minimum) == case["new_rank"], case["name"]


def test_a_steep_spectrum_is_halved_until_the_floor() -> None:
    sigma, rank, ranks = torch.tensor([100.0] + [1.0] * 299), 300, [300]
    for _ in range(9):
        rank = cut_rank(sigma[:rank], rank, 0.15, 3)
        ranks.append(rank)
    assert ranks == [300, 150, 75, 37, 18, 9, 4, 3, 3, 3]


def test_cuts_by_hand() -> None:
    assert cut_rank([4.0, 2.0, 1.0, 0.5], 4, 0.5, 0) == 2  # on the threshold is kept
    assert cut_rank(torch.tensor([10.0, 7.0, 1.0]), 3, 0.7, 0) == 2  # in float32 too
    assert cut_rank([1.0, 1.0, 1.0], 3, 0.99, 0) == 3  # a flat spectrum is uncut
    assert cut_rank([0.0, 0.0], 2, 0.5, 0) == 2
    assert cut_rank([5.0, 0.0, 0.0, 0.0], 4, 0.0, 0) == 4  # beta = 0 cuts nothing
    assert cut_rank([5.0, 1.0, 0.1, 0.1], 4, 0.9, 3) == 3  # the floor
    assert cut_rank([5.0], 1, 0.9, 4) == 1
    spectrum = torch.logspace(0, -3, 40, dtype=torch.float64)
    cuts = [cut_rank(spectrum, 40, beta, 0) for beta in torch.linspace(0, 0.99, 34).tolist()]
    assert cuts == sorted(cuts, reverse=True)
    assert min(cuts) == 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([1.0, 0.5], 3, 0.1, 0), r"`singular_values` must be of shape \(3,\), got \(2,\)"),
        (([1.0], 1, 1.0, 0), r"`sigma_cutoff` must be in \[0, 1\), got 1.0"),
        (([1.0], 1, -0.1, 0), r"`sigma_cutoff` must be in \[0, 1\), got -0.1"),
        (([1.0], 1, 0.1, -1), "`minimum` must be >= 0, got -1"),
        (([float("nan")], 1, 0.1, 0), "`singular_values` must be finite"),
        (([-1.0], 1, 0.1, 0), "`singular_values` must be finite"),
    ],
)
def test_cut_refusals(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cut_rank(*arguments)


# --- layers ---


def random_usv(m: int, n: int, rank: int) -> USV:
    u, vh = torch.linalg.qr(torch.randn(m, rank)).Q, torch.linalg.qr(torch.randn(n, rank)).Q.T
    return USV(u, torch.randn(rank, rank), vh)


@pytest.mark.parametrize("rank", [1, 3, 12, 24])
@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_layer_is_its_weight(
    shape: tuple[int, int], rank: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(rank)
    dense = nn.Linear(shape[1], shape[0], bias=bias)
    layer = USVLinear.from_dense(dense, random_usv(*shape, rank))
    x = torch.randn(2, 5, shape[1])
    wanted = functional.linear(x, layer.weight, dense.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.merge()(x), wanted, rtol=1e-4, atol=1e-4)
    m, n = shape
    for tokens in (1, 10, 10**9):
        assert layer.is_thin(tokens) == (
            tokens * rank * (m + rank + n) < tokens * m * n + m * rank * rank + m * rank * n
        )
    whole = functional.linear(x, layer.flat_weight(), layer.bias)
    for thin in (True, False):
        monkeypatch.setattr(USVLinear, "is_thin", lambda self, tokens, thin=thin: thin)
        torch.testing.assert_close(layer(x), whole, rtol=1e-4, atol=1e-4)
    assert layer.bias is dense.bias
    assert layer.merge().bias is dense.bias


@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("moves", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}], ids=str)
def test_the_convolution_is_its_kernel(rank: int, moves: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(rank)
    dense = nn.Conv2d(5, 6, (3, 2), **moves)
    layer = USVConv2d.from_dense(dense, random_usv(6, 30, rank))
    x = torch.randn(2, 5, 9, 8)
    made = layer.merge()
    assert made.weight.shape == dense.weight.shape
    torch.testing.assert_close(layer(x), made(x), rtol=1e-4, atol=1e-4)
    for thin in (True, False):
        monkeypatch.setattr(USVConv2d, "is_thin", lambda self, tokens, thin=thin: thin)
        torch.testing.assert_close(layer(x), made(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(x)[0], layer(x[0]), rtol=1e-4, atol=1e-4)
    dense.weight = made.weight
    torch.testing.assert_close(dense(x), made(x))


def test_low_precision_models_keep_wide_bases() -> None:
    model = net().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(images()[0].bfloat16())
    OIALR(model, OIALRConfig(delay=1, sigma_cutoff=0.0)).step(optimizer)
    layer: Any = model.blocks[7]
    assert layer.u.dtype == layer.s.dtype == torch.float32
    torch.testing.assert_close(layer.u.T @ layer.u, torch.eye(layer.rank), atol=1e-5, rtol=0)
    after = model(images()[0].bfloat16())
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(before, after, atol=0.05, rtol=0.05)
    assert layer.merge().weight.dtype == torch.bfloat16


# --- conversion, refresh, cut ---


@every_optimizer
def test_conversion_and_refresh_without_a_cut_keep_the_function(kind: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    method = OIALR(model, OIALRConfig(delay=3, frequency=2, sigma_cutoff=0.0))
    x, _ = images()
    for _ in range(9):
        advance(model, optimizer)
        model.eval()
        before = model(x)
        method.step(optimizer)
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
        for name in method.ranks:
            layer: Any = model.get_submodule(name)
            eye = torch.eye(layer.rank)
            torch.testing.assert_close(layer.u.T @ layer.u, eye, atol=1e-5, rtol=0)
            torch.testing.assert_close(layer.vh @ layer.vh.T, eye, atol=1e-5, rtol=0)
    assert list(method.ranks) == CONVERTED
    assert {row["discarded"] for row in method.history} == {0.0}


def test_a_cut_discards_what_it_says() -> None:
    model, optimizer, method, _ = trained(7, sigma_cutoff=0.3)
    advance(model, optimizer)
    before = {name: model.get_submodule(name).dense() for name in method.ranks}  # type: ignore[operator]
    method.step(optimizer)
    rows = [row for row in method.history if row["step"] == 8]
    assert len(rows) == 4
    assert sum(row["discarded"] > 0 for row in rows) >= 2
    for row in rows:
        layer: Any = model.get_submodule(row["layer"])
        lost = (before[row["layer"]] - layer.dense()).norm().item()
        assert lost == pytest.approx(row["discarded"], rel=1e-5, abs=1e-5)
        assert layer.rank == row["rank"] == method.ranks[row["layer"]]
        sigma = layer.s.diagonal()
        torch.testing.assert_close(sigma.diag(), layer.s)
        assert torch.equal(sigma, sigma.sort(descending=True).values)


def test_ranks_only_fall_and_at_most_by_half() -> None:
    _, _, method, seen = trained(30, sigma_cutoff=0.6, minimum=0.1)
    assert seen[3][1] == []
    assert seen[4][1] != []
    for name in method.ranks:
        full = [row["full_rank"] for row in method.history if row["layer"] == name]
        ranks = [full[0]] + [row["rank"] for row in method.history if row["layer"] == name]
        assert all(after <= before and after >= before // 2 for before, after in itertools.pairwise(ranks))
        assert ranks[-1] < full[0]
        assert ranks[-1] >= int(0.1 * full[0])


def test_bases_stand_still_between_refreshes_and_get_no_gradient() -> None:
    model, optimizer, method, _ = trained(5, sigma_cutoff=0.3)
    layers: list[Any] = [model.get_submodule(name) for name in method.ranks]
    bases = [(layer.u.clone(), layer.vh.clone(), layer.s.clone()) for layer in layers]
    for _ in range(2):
        advance(model, optimizer)
        assert not method.step(optimizer)
    for layer, (u, vh, s) in zip(layers, bases, strict=True):
        assert torch.equal(layer.u, u)
        assert torch.equal(layer.vh, vh)
        assert layer.u.grad is None
        assert layer.vh.grad is None
        assert not torch.equal(layer.s, s)
        assert layer.s.grad is not None
    assert method.step(optimizer)  # step 8


def test_gradients_of_s_are_those_of_the_weight() -> None:
    model, optimizer, method, _ = trained(5, sigma_cutoff=0.3)
    x, y = images()
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    dense = copy.deepcopy(model)
    for name in method.ranks:
        layer: Any = dense.get_submodule(name)
        parent, _, own = name.rpartition(".")
        setattr(dense.get_submodule(parent), own, layer.merge())
    dense.zero_grad()
    functional.cross_entropy(dense(x), y).backward()
    for name in method.ranks:
        own_layer: Any = model.get_submodule(name)
        whole: Any = dense.get_submodule(name).weight.grad
        wanted = own_layer.u.T @ whole.flatten(1) @ own_layer.vh.T
        torch.testing.assert_close(own_layer.s.grad, wanted, atol=1e-5, rtol=1e-4)


# --- optimisers ---


@every_optimizer
def test_the_optimiser_holds_each_live_parameter_once(kind: str) -> None:
    model, optimizer, _, _ = trained(14, kind, sigma_cutoff=0.4)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in held}
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]  # in the order of a fresh optimiser
    optimizer.load_state_dict(optimizer.state_dict())
    before = [parameter.detach().clone() for parameter in held]
    advance(model, optimizer)
    assert all(not torch.equal(old, new) for old, new in zip(before, held, strict=True))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e-3])
def test_no_update_after_a_switch_exceeds_a_learning_rate(scale: float) -> None:
    """After long steady gradients, then others: AdamW's moments must not shoot."""
    model, rate = net(), 1e-2
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    method = OIALR(model, OIALRConfig(delay=40, frequency=5, sigma_cutoff=0.2))
    for step in range(60):
        x, y = images(seed=step)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(".s")}
        advance(model, optimizer, (x * (scale if step >= 40 else 1.0), y))
        for name, own in model.named_parameters():
            if name in before and step % 5 == 0:  # the first step after a conversion or a refresh
                assert (own.detach() - before[name]).abs().max() <= 1.1 * rate
        method.step(optimizer)
    assert method.checks == 5


def test_moments_turn_with_the_bases() -> None:
    """What SGD remembers after a conversion is what it would, had it seen the gradients of S all along."""
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(9, 4)).Q.T, torch.linalg.qr(torch.randn(7, 4)).Q.T
    for kind, make in OPTIMIZERS.items():
        old, new = (nn.Parameter(torch.zeros(*size)) for size in ((9, 7), (4, 4)))
        other = nn.Parameter(torch.zeros(4, 4))
        one, two = make([old]), make([other])
        for _ in range(6):
            old.grad = torch.randn(9, 7)
            other.grad = left @ old.grad @ right.T
            one.step()
            two.step()
        replace_parameter(one, old, new, left, right)
        if kind == "sgd":
            torch.testing.assert_close(one.state[new]["momentum_buffer"], two.state[other]["momentum_buffer"])
        if kind == "plain sgd":
            assert new not in one.state
        if kind in ("adamw", "amsgrad"):
            state, wanted = one.state[new], two.state[other]["exp_avg"] / (1 - 0.9**6)
            torch.testing.assert_close(state["exp_avg"], 0.1 * wanted)
            torch.testing.assert_close(state["exp_avg_sq"], 0.001 * wanted.square())
            assert state["step"] == 1
        new.grad = torch.randn(4, 4)
        one.step()


def test_an_unknown_optimiser_starts_afresh() -> None:
    old, new = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.RMSprop([old])
    old.grad = torch.ones(3, 3)
    optimizer.step()
    replace_parameter(optimizer, old, new, torch.eye(2, 3), torch.eye(2, 3))
    assert len(optimizer.state) == 0
    new.grad = torch.ones(2, 2)
    optimizer.step()
    with pytest.raises(ValueError, match="`optimizer` must hold every trained weight"):
        replace_parameter(optimizer, old, new, torch.eye(2, 3), torch.eye(2, 3))


def test_schedules_go_on() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    method = OIALR(model, OIALRConfig(delay=2, frequency=1))
    for step in range(5):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / (step + 1))
        advance(model, optimizer)
        method.step(optimizer)
        schedule.step()


# --- what is converted, when ---


def test_heads_and_embeddings_stay_and_reasons_are_given() -> None:
    model = net()
    model.extra = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "thin": nn.Linear(64, 6),
            "frozen": nn.Linear(8, 8).requires_grad_(False),
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "mirrored": nn.Conv2d(8, 8, 3, padding_mode="reflect", padding=1),
            "tied": nn.Linear(8, 8),
            "other": nn.Linear(8, 8),
        }
    )
    model.extra["other"].weight = model.extra["tied"].weight
    method = OIALR(model)
    assert list(method.layers) == CONVERTED
    reasons = {name.rpartition(".")[2]: reason for name, reason in method.skipped.items()}
    assert reasons == {
        "out_proj": "nn.MultiheadAttention reads its weight itself",
        "thin": "its sides, (6, 64), differ by more than 10 times",
        "frozen": "its weight is frozen",
        "grouped": "its groups or padding have no such form",
        "mirrored": "its groups or padding have no such form",
        "tied": "its weight is shared",
        "other": "its weight is shared",
    }
    assert "patch_embed" in OIALR(net(), exclude=["head"]).layers
    assert list(OIALR(net(), include=[r"blocks\.[57]"]).layers) == ["blocks.5", "blocks.7"]


def test_the_published_model_has_the_published_numbers() -> None:
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    sizes: dict[str, Any] = dict(img_size=32, patch_size=8, num_classes=10, embed_dim=768, depth=6, num_heads=6)
    with torch.device("meta"):
        model = VisionTransformer(**sizes, qkv_bias=False)
    method = OIALR(model, exclude=["head", r"blocks\.5\.mlp\.fc2"])
    assert method.parameter_counts()["dense"] == 42_684_682
    assert len(method.layers) == 24
    for name, (out, flat) in ((n, (s[0], s[1:].numel())) for n, s in method.layers.items()):
        rank = min(out, flat)  # shapes alone: 24 decompositions of this size take a minute
        usv = USV(*(torch.empty(size, device="meta") for size in ((out, rank), (rank, rank), (rank, flat))))
        layer: Any = model.get_submodule(name)
        kind: Any = USVConv2d if layer.weight.dim() == 4 else USVLinear
        replace_module(model, name, kind.from_dense(layer, usv))
        method.ranks[name] = rank
    assert method.parameter_counts() == {"trainable": 16_032_010, "stored": 69_890_314, "dense": 42_684_682}


def test_checks_cover_the_last_layers_first() -> None:
    _, _, method, _ = trained(14, coverage=0.34, sigma_cutoff=0.3)  # int(3 * 0.34) = 1 more layer at each check
    covered = {step: [row["layer"] for row in method.history if row["step"] == step] for step in (5, 8, 11, 14)}
    assert list(covered.values()) == [CONVERTED[-count:] for count in (1, 2, 3, 4)]


# --- states, merging ---


@pytest.mark.parametrize("at", [3, 6, 11])
def test_a_training_goes_on_from_its_state(at: int, tmp_path: Path) -> None:
    config = OIALRConfig(sigma_cutoff=0.4, delay=4, frequency=3, coverage=0.0)

    def go(model: nn.Module, optimizer: Any, method: OIALR, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(advance(model, optimizer, images(seed=step)))
            method.step(optimizer)
        return losses

    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    method = OIALR(model, config)
    go(model, optimizer, method, range(at))
    torch.save([method.state_dict(), model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    wanted = go(model, optimizer, method, range(at, 16))

    other = net(seed=7)
    resumed = OIALR(other, config)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(states[0])
    assert {name: len(other.get_submodule(name).s) for name in resumed.ranks} == states[0]["ranks"]  # type: ignore[arg-type]
    other.load_state_dict(states[1])
    again = OPTIMIZERS["adamw"](other.parameters())
    again.load_state_dict(states[2])
    assert go(other, again, resumed, range(at, 16)) == wanted
    assert resumed.ranks == method.ranks
    assert resumed.history == method.history
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_states_of_other_models_are_refused() -> None:
    _, _, method, _ = trained(8)
    state, config = method.state_dict(), method.config
    wider = net()
    wider.blocks[7] = nn.Linear(32, 40)
    wider.head = nn.Linear(40, 4)
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(ValueError, match=r"for layer 'blocks.7' it has \(32, 32\), the model \(40, 32\)"):
        OIALR(wider, config).load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), wider.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="`state` must be of this model: for layer 'patch_embed'"):
        OIALR(net(), config, exclude=["head"]).load_state_dict(state)
    taller = net()
    taller.head = nn.Linear(32, 5)
    with pytest.raises(ValueError, match="`state` must be of this model with"):
        OIALR(taller, config).load_state_dict(state)
    with pytest.raises(ValueError, match="`frequency` must be as before, 3, got 4"):
        OIALR(net(), replace(config, frequency=4)).load_state_dict(state)


def test_merging_gives_a_plain_model_of_the_same_function() -> None:
    model, _, method, _ = trained(14, sigma_cutoff=0.4)
    x, _ = images()
    before, ranks = model(x), dict(method.ranks)
    biases = [model.blocks[5].bias, model.blocks[7].bias]
    assert method.merge() is model
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    assert {name: type(m) for name, m in model.named_modules()} == {n: type(m) for n, m in net().named_modules()}
    assert list(model.state_dict()) == list(net().state_dict())
    assert model.blocks[5].bias is biases[0]
    for name, rank in ranks.items():
        sigma = torch.linalg.svdvals(model.get_submodule(name).weight.flatten(1).double())  # type: ignore[operator, union-attr]
        assert (sigma > 1e-5 * sigma[0]).sum() == rank


def test_linear_models_are_saved_as_compressed_ones_are(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415

    sizes: dict[str, Any] = dict(
        img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=16, depth=2, num_heads=2
    )
    torch.manual_seed(0)
    model = VisionTransformer(**sizes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    OIALR(model, OIALRConfig(delay=1, sigma_cutoff=0.5)).step(optimizer)
    save_compressed(model, tmp_path / "model", base={"timm": "VisionTransformer", "options": sizes})
    loaded, x = load_compressed(tmp_path / "model"), torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x), model.eval()(x))
    torch.testing.assert_close(fold(loaded)(x), model(x), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, USVLinear) for module in loaded.modules())


# --- the training loop ---


def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    recipe = Recipe(14, learning_rate=1e-2, weight_decay=0.01, checkpoint_every=2)

    def run(folder: Path | None, until: int | None = None) -> tuple[Net, OIALR, list[Any]]:
        model = net()
        method = OIALR(model, OIALRConfig(delay=4, frequency=3, sigma_cutoff=0.4, coverage=0.0))

        def batches(done: int) -> Any:
            for step in range(done, recipe.steps):
                if step == until:
                    raise KeyboardInterrupt
                yield images(seed=step)

        def loss(own: nn.Module, batch: Any) -> Tensor:
            return functional.cross_entropy(own(batch[0]), batch[1])

        hooks = Hooks(after_step=method.step, states=[method])
        return model, method, fit(model, batches, recipe, loss, hooks=hooks, checkpoint=folder, progress=False)

    model, method, history = run(None)
    for killed in (3, 7, 12):  # before the conversion, after it, after a cut
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, killed)
    again, other, rows = run(tmp_path)
    assert rows == history
    assert other.ranks == method.ranks
    assert min(method.ranks.values()) < 20
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


WORKER = """
import sys, torch
from accelerate import PartialState
sys.path.insert(0, {tests!r})
from test_oialr import net, images
from torch.nn import functional
from lowrank.training.oialr import OIALR, OIALRConfig
from lowrank.training.loop import Hooks, Recipe, fit
state = PartialState(cpu=True)
assert state.num_processes == 2, state
model = net()
method = OIALR(model, OIALRConfig(delay=4, frequency=3, sigma_cutoff=0.4, coverage=0.0))
def batches(done):
    for step in range(done, 14):
        x, y = images(seed=step)
        yield x[state.process_index::2], y[state.process_index::2]
fit(model, batches, Recipe(14, learning_rate=1e-2), lambda own, b: functional.cross_entropy(own(b[0]), b[1]),
    hooks=Hooks(after_step=method.step, states=[method]), progress=False)
torch.save([model.state_dict(), method.ranks, str(method.history)], {folder!r} + f"/{{state.process_index}}.pt")
"""


def test_two_processes_keep_equal_replicas(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    run_in_two(script)
    (one, ranks, history), (two, other_ranks, other_history) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert ranks == other_ranks
    assert history == other_history
    assert ranks
    assert all(torch.equal(one[name], two[name]) for name in one)
    # one process with all samples goes the same way
    model = net()
    method = OIALR(model, OIALRConfig(delay=4, frequency=3, sigma_cutoff=0.4, coverage=0.0))
    fit(
        model,
        lambda done: (images(seed=step) for step in range(done, 14)),
        Recipe(14, learning_rate=1e-2),
        lambda own, batch: functional.cross_entropy(own(batch[0]), batch[1]),  # type: ignore[index]
        hooks=Hooks(after_step=method.step, states=[method]),
        progress=False,
    )
    assert method.ranks == ranks
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one[name].abs(), value.abs(), atol=2e-3, rtol=2e-2)


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sigma_cutoff": 1.0}, r"`sigma_cutoff` must be in \[0, 1\), got 1.0"),
        ({"sigma_cutoff": -0.1}, r"`sigma_cutoff` must be in \[0, 1\), got -0.1"),
        ({"delay": 0}, "`delay` must be >= 1, got 0"),
        ({"frequency": 0}, "`frequency` must be >= 1, got 0"),
        ({"minimum": 1.5}, r"`minimum` must be in \[0, 1\], got 1.5"),
        ({"coverage": -1.0}, r"`coverage` must be in \[0, 1\], got -1.0"),
        ({"include": ["encoder"]}, "`include` must match layers of the model, got 'encoder'"),
        ({"include": "blocks"}, r"`include` must be Iterable\[str\], got the single string 'blocks'"),
        ({"include": ["head"]}, "`model` must have a layer that can be converted, got none"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fields = OIALRConfig.__dataclass_fields__.keys() & options.keys()
        config = OIALRConfig(**{name: options[name] for name in fields})
        OIALR(net(), config, **{name: value for name, value in options.items() if name not in fields})
    with pytest.raises(ValueError, match="`include` must hold at least one name or pattern"):
        OIALR(net(), include=[])


def test_weights_that_are_not_finite_are_named_and_nothing_is_changed() -> None:
    for steps in (4, 7):  # before the conversion, before a refresh
        model, optimizer, method, _ = trained(steps)
        layer: Any = model.get_submodule("blocks.5")
        with torch.no_grad():
            (layer.s if steps == 7 else layer.weight)[0, 0] = float("nan")
        kinds, ranks = [type(m) for m in model.modules()], dict(method.ranks)
        with pytest.raises(ValueError, match=rf"NaN or infinity in layer 'blocks.5' at step {steps + 1}"):
            method.step(optimizer)
        assert [type(m) for m in model.modules()] == kinds
        assert method.ranks == ranks


def test_an_optimiser_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="`optimizer` must hold every trained weight of the model"):
        OIALR(net(), OIALRConfig(delay=1)).step(torch.optim.SGD(net().parameters(), lr=0.1))


def test_an_optimiser_without_one_weight_changes_nothing() -> None:
    """Each layer in turn is missing: before the conversion, and before a refresh that all the others could make."""
    for steps, name in itertools.product((4, 7), CONVERTED):
        model, optimizer, method, _ = trained(steps)
        layer: Any = model.get_submodule(name)
        missing = layer.s if steps == 7 else layer.weight
        group = optimizer.param_groups[0]
        group["params"] = [parameter for parameter in group["params"] if parameter is not missing]
        modules, state, held = dict(model.named_modules()), copy.deepcopy(model.state_dict()), list(group["params"])
        ranks, history = dict(method.ranks), list(method.history)
        with pytest.raises(ValueError, match=f"`optimizer` must hold every trained weight .* layer {name!r} of shape"):
            method.step(optimizer)
        assert dict(model.named_modules()) == modules
        assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
        assert all(one is other for one, other in zip(group["params"], held, strict=True))
        assert (method.ranks, method.history) == (ranks, history)


@pytest.mark.parametrize("rank", [0, 33, 2.0, "3", None])
def test_a_state_with_a_rank_out_of_range_changes_nothing(rank: Any) -> None:
    _, _, method, _ = trained(8)
    for name in CONVERTED:
        state = copy.deepcopy(method.state_dict())
        state["ranks"][name] = rank
        model = net()
        other, modules = OIALR(model, method.config), dict(model.named_modules())
        with pytest.raises(ValueError, match=rf"`state` must hold ranks in \[1, \d+\] for layer {name!r}, got "):
            other.load_state_dict(state)
        assert dict(model.named_modules()) == modules
    state = method.state_dict() | {"ranks": {"blocks.99": 2}}
    with pytest.raises(ValueError, match="for layer 'blocks.99', got 2"):
        OIALR(net(), method.config).load_state_dict(state)
