"""Layers that only look linear: each kind is seen, left out by patterns, refused by name, and never changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import LAYERS, REPLACED, ZOO, made, of_zoo
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as masks

from lowrank.compression.compress import compress
from lowrank.compression.pruning import prune
from lowrank.compression.replace import replace_layers
from lowrank.nn.batches import run_model
from lowrank.nn.plain import find_obstacle, has_own_weight
from lowrank.nn.targets import find_left_out, find_linears
from lowrank.training.oialr import OIALR, OIALRConfig


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * 8, self.bias)


class Router(nn.Linear):
    """Return the outputs twice, as routers return scores and logits."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, y


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Tempered(nn.Linear):
    def __init__(self, inputs: int, out: int) -> None:
        super().__init__(inputs, out)
        self.temperature = nn.Parameter(torch.ones(()))


class Squared(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.square()


def with_own_method(xs: int, out: int) -> nn.Linear:
    layer: Any = nn.Linear(xs, out)
    layer.forward = lambda x: functional.linear(x, layer.weight.tanh())
    return layer


def after(change: Callable[..., Any], **options: Any) -> Callable[[int, int], nn.Linear]:
    def build(xs: int, out: int) -> nn.Linear:
        layer = nn.Linear(xs, out)
        change(layer, **options)
        return layer

    return build


COMPUTED: dict[str, Callable[[int, int], nn.Linear]] = {
    "weight norm": after(parametrizations.weight_norm),
    "spectral norm": after(parametrizations.spectral_norm),
    "orthogonal": after(parametrizations.orthogonal),
    "parametrised bias": after(
        lambda layer: parametrize.register_parametrization(layer, "bias", Squared()),
    ),
    "old spectral norm": after(nn.utils.spectral_norm),
    "mask": after(masks.l1_unstructured, name="weight", amount=0.5),
    "masked bias": after(masks.l1_unstructured, name="bias", amount=0.5),
}
FORWARDS: dict[str, Callable[[int, int], nn.Linear]] = {
    "scaled": Scaled,
    "router": Router,
    "called": Called,
    "own method": with_own_method,
    "tempered": Tempered,
}
ODD = COMPUTED | FORWARDS
CLOSED = [kind for kind in ODD if kind != "router"]  # whose output a next layer takes


def model_with(kind: str) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(ODD[kind](6, 8), nn.Linear(8, 6), nn.Linear(6, 6)).eval()


@pytest.mark.parametrize("family", ["vit", "plain", *ZOO])
def test_every_layer_that_is_found_computes_a_product_with_its_weight(family: str) -> None:
    model, batches = of_zoo(family) if family in ZOO else made(family)[:2]
    linears, seen = find_linears(model, [".*"]), set[str]()
    read = find_linears(model, LAYERS).keys() - find_linears(model, REPLACED.get(family, LAYERS)).keys()

    def check(name: str, layer: nn.Linear) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.add(name)
            torch.testing.assert_close(output, functional.linear(args[0], layer.weight, layer.bias))

        return hook

    for name, layer in linears.items():
        layer.register_forward_hook(check(name, layer))
    with torch.no_grad():
        run_model(model, batches[0])
    assert seen == linears.keys() - read


@pytest.mark.parametrize("kind", ODD)
def test_patterns_leave_an_odd_layer_out_and_tell_why(kind: str) -> None:
    model = model_with(kind)
    reason = find_obstacle(model[0], model)
    assert reason
    assert list(find_linears(model, [r"\d"])) == ["1", "2"]
    assert find_left_out(model, [r"\d"]) == {"0": reason}
    assert find_left_out(model, ["1"]) == {}
    assert has_own_weight(model[0]) == (kind in FORWARDS)


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_layer_is_refused_by_name_and_stays_as_it_is(kind: str) -> None:
    model = model_with(kind)
    before, layers, x = copy.deepcopy(model.state_dict()), list(model), torch.randn(5, 6)
    expected = model[0](x)
    for refused in (
        lambda: find_linears(model, ["0"]),
        lambda: find_linears(model, ["[^12]"]),  # matches this layer only
        lambda: replace_layers(model, {"1": 2, "0": 2}, "svd"),
        lambda: compress(model, ranks={"1": 2, "0": 2}, method="svd"),
        lambda: prune(model, {"0": 0.5, "1": 0.5}, "magnitude"),
    ):
        with pytest.raises(ValueError, match="of '0', "):
            refused()
    assert torch.equal(model[0](x)[0], expected[0])
    assert list(model) == layers
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", CLOSED)
def test_compress_replaces_the_layers_around_an_odd_one_and_names_it(kind: str) -> None:
    model, batches = model_with(kind), [torch.randn(64, 6) for _ in range(4)]
    odd = model[0]
    result = compress(model, batches, 0.9, layers=[r"\d"], progress=False)
    assert model[0] is odd
    assert list(result.ranks) == ["1", "2"]
    assert list(result.left_out) == ["0"]
    assert f"left out: 0: {result.left_out['0']}" in str(result)


@pytest.mark.parametrize("kind", ODD)
def test_pruning_refuses_a_computed_weight_and_warns_of_other_odd_layers(kind: str) -> None:
    model = model_with(kind)
    before = copy.deepcopy(model.state_dict())
    if kind in COMPUTED:
        with pytest.raises(ValueError, match="`layers` must leave out '0': its weight or bias is not a parameter"):
            prune(model, 0.5, "magnitude", layers=[r"\d"])
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    else:
        with pytest.warns(UserWarning, match="layer '0' is left out: "):
            rows = prune(model, 0.5, "magnitude", layers=[r"\d"])
        assert [row["layer"] for row in rows] == ["1", "2"]


@pytest.mark.parametrize("kind", ODD)
def test_oialr_skips_an_odd_layer_with_the_reason(kind: str) -> None:
    model = model_with(kind)
    training = OIALR(model, OIALRConfig(delay=1), exclude=())
    assert list(training.layers) == ["1", "2"]
    assert training.skipped == {"0": find_obstacle(model[0])}


def test_convolutions_with_padding_of_their_own_are_skipped() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(functional.pad(x, (1, 1, 1, 1)))

    class Standardised(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight - weight.mean(), bias)

    model = nn.Sequential(Same(3, 8, 3), Standardised(8, 8, 3), nn.Conv2d(8, 8, 3))
    training = OIALR(model, exclude=())
    assert list(training.layers) == ["2"]
    assert training.skipped == {
        "0": "Same has a forward pass of its own",
        "1": "Standardised has a forward pass of its own",
    }


def test_a_layer_before_its_first_pass_is_odd() -> None:
    assert find_obstacle(nn.LazyLinear(4)) == "it has no sizes before its first pass"
    layer = nn.LazyLinear(4)
    layer(torch.zeros(2, 3))
    assert find_obstacle(layer) is None


def test_a_model_that_is_a_layer_itself_is_refused() -> None:
    model = nn.Linear(8, 8)
    for refused in (
        lambda: find_linears(model, [".*"]),
        lambda: compress(model, ranks={"": 2}, method="svd"),
        lambda: compress(model, [torch.randn(9, 8)], 0.5, layers=[".*"], progress=False),
        lambda: replace_layers(model, {"": 2}, "svd"),
        lambda: prune(model, 0.5, "magnitude", layers=[".*"]),
        lambda: OIALR(model, exclude=()),
    ):
        with pytest.raises(ValueError, match=r"got one that is a Linear itself: pass nn.Sequential\(model\)"):
            refused()
    assert list(dict(model.named_modules())) == [""]
