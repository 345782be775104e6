"""Gradient moments of any use of a layer are those of a direct computation, and a pass leaves nothing behind."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import LAYERS, REPLACED, ZOO, loss, made, of_zoo, sum_of_samples
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lowrank.calibration.collect import collect_statistics
from lowrank.calibration.on_demand import OnDemand
from lowrank.compression.compress import compress
from lowrank.factorization.moments import LayerStatistics
from lowrank.nn.batches import Batch
from lowrank.nn.targets import find_linears

Call = Callable[[nn.Module, Tensor], Tensor]
CALLS: dict[str, Call] = {
    "plain": lambda block, x: block(x),
    "recomputed": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
}


class Block(nn.Module):
    """A tall and a wide layer, and an activation that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Net(nn.Module):
    """Two blocks on a residual stream and a square layer."""

    def __init__(self, call: Call = CALLS["plain"]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(6, 6)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.call(block, x)
        return self.last(x)


class Auxiliary(Net):
    """A head that the loss does not see."""

    def __init__(self, call: Call = CALLS["plain"]) -> None:
        super().__init__(call)
        self.aux = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.seen = self.aux(y)
        return y


class Routed(Auxiliary):
    """A router of which only the choice is used."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.aux(x).argmax(-1, keepdim=True) == 0
        return self.last(torch.where(first, self.call(self.blocks[0], x), self.call(self.blocks[1], x)))


class Teacher(Net):
    """The same layers give a target without gradients first."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = super().forward(x)
        return super().forward(x) - 0.9 * target


class Twice(Net):
    """Every layer is called twice, the second time on half of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y, super().forward(torch.tanh(y[:, ::2]))], dim=1)


class Crops(Net):
    """Two sizes in one batch: whole samples, and three small crops of each."""

    def forward(self, x: Tensor) -> Tensor:
        small = torch.cat([x[:, :2], x[:, 1:3], x[:, 2:4]])
        return torch.cat([super().forward(x).flatten(0, 1), super().forward(small).flatten(0, 1)])


class Sparse(Net):
    """The second block is called on the samples of which the first entry is positive, perhaps on none."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0, 0] > 0
        y = x + self.call(self.blocks[0], x)
        return self.last(y.index_add(0, chosen.nonzero()[:, 0], self.blocks[1](y[chosen])))


KINDS = [Net, Auxiliary, Routed, Teacher, Twice, Crops, Sparse]


def built(kind: type[Net], call: str = "plain", frozen: bool = False) -> Net:
    torch.manual_seed(0)
    return kind(CALLS[call]).double().requires_grad_(not frozen).eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(n, 5, 6, generator=generator, dtype=torch.float64) for n in (4, 3, 1)]
    return [drawn[0], -drawn[1].abs(), drawn[0][:0], drawn[2].abs()]  # one without a choice of `Sparse`, one empty


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum()


def direct(
    model: nn.Module, data: list[Any], layers: Iterable[str] = (".*",), loss: Callable[..., Tensor] = square
) -> dict[str, LayerStatistics]:
    """A second method: a probe is added to the output of each call, and the loss is differentiated by the probes."""
    linears = find_linears(model, layers)
    found: dict[str, list[Tensor]] = {}
    fisher = {name: torch.zeros(len(layer.weight), dtype=torch.float64) for name, layer in linears.items()}
    for batch in data:
        calls: list[tuple[str, Tensor, Tensor]] = []

        def probe(name: str, calls: list = calls) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                calls.append((name, args[0].detach().clone(), torch.zeros_like(output, requires_grad=True)))
                return output + calls[-1][2]

            return hook

        handles = [layer.register_forward_hook(probe(name)) for name, layer in linears.items()]
        probes = loss(model, batch), [part for *_, part in calls]
        gradients = torch.autograd.grad(*probes, allow_unused=True, materialize_grads=True)
        for handle in handles:
            handle.remove()
        per_sample: dict[tuple[str, int], Tensor] = {}
        for (name, x, _), g in zip(calls, gradients, strict=True):
            found.setdefault(name, []).append(torch.cat([x, g], dim=-1).flatten(0, -2))
            key = name, len(x)
            g, x = (part.unsqueeze(1) if part.ndim == 2 else part.flatten(1, -2) for part in (g, x))
            product = g.mT @ x
            per_sample[key] = per_sample.get(key, torch.zeros((), dtype=torch.float64)) + product
        for (name, _), gradient in per_sample.items():
            fisher[name] += gradient.square().sum((0, 2))
    statistics = {}
    for name, layer in linears.items():
        x, g = torch.cat(found[name]).split([layer.in_features, layer.out_features], dim=1)
        pulled = g @ layer.weight.detach()
        statistics[name] = LayerStatistics(
            x.T @ x, len(x), x.mean(0), x.abs().mean(0), g.T @ g, fisher[name], input_gradient_gram=pulled.T @ pulled
        )
    return statistics


@contextmanager
def nothing_left_behind(model: nn.Module) -> Iterator[None]:
    """Hooks, flags, gradients, modes and torch's own function are as before, also after an error."""

    def state() -> list[Any]:
        hooks = [
            (module.training, list(module._forward_hooks), list(module._forward_pre_hooks))
            for module in model.modules()
        ]
        return [
            *hooks,
            *((p.requires_grad, p.grad) for p in model.parameters()),
            torch.utils.checkpoint.CheckpointFunction,
        ]

    before = state()
    yield
    assert state() == before
    assert torch.utils.checkpoint.CheckpointFunction is CheckpointFunction


@pytest.mark.parametrize("frozen", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_moments_are_those_of_a_direct_computation(kind: type[Net], call: str, frozen: bool) -> None:
    expected = direct(built(kind), [batch for batch in batches() if len(batch)])
    model = built(kind, call, frozen).train()
    model.blocks[1].eval()
    with nothing_left_behind(model):
        found = collect_statistics(model, batches(), [".*"], loss=square)
        smaller = collect_statistics(model, batches(), [".*"], loss=square, side="smaller")
    assert found.keys() == expected.keys()
    for name, layer in found.items():
        assert layer.tokens == smaller[name].tokens == expected[name].tokens
        for field in ("gram", "mean", "abs_mean", "gradient_gram", "row_fisher"):
            torch.testing.assert_close(getattr(layer, field), getattr(expected[name], field), msg=f"{field} of {name}")
        for field in ("gradient_gram", "input_gradient_gram"):
            if (value := getattr(smaller[name], field)) is not None:
                torch.testing.assert_close(value, getattr(expected[name], field), msg=f"{field} of {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_any_caller_s_mode_of_autograd_gives_the_same(kind: type[Net]) -> None:
    model, expected = built(kind), collect_statistics(built(kind), batches(), [".*"], loss=square)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = collect_statistics(model, batches(), [".*"], loss=square)  # the batches are made in this mode too
        for name, layer in found.items():
            for field, value in layer.moments().items():
                assert torch.equal(value, getattr(expected[name], field)), (mode, name, field)
                assert not value.is_inference()


def test_a_layer_without_gradients_is_compressed_with_the_others() -> None:
    model = built(Auxiliary)
    with torch.inference_mode():
        result = compress(model, batches(), 0.7, layers=[".*"], loss=square, progress=False)
    rows = {row["layer"]: row for row in result.layers}
    assert rows.keys() == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "last", "aux"}
    x = batches()[0]
    assert torch.isfinite(model(x)).all()
    square(model, x).backward()  # what was made in inference mode may be trained
    assert all(p.grad is not None for name, p in model.named_parameters() if "aux" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama", "opt", "gpt2", "t5", "vit"])
def test_families_with_gradient_checkpointing_give_the_same(family: str) -> None:
    model, data, expected = made(family)
    switch: Any = getattr(model, "gradient_checkpointing_enable", None) or model.set_grad_checkpointing
    switch()
    model.train()
    with nothing_left_behind(model):
        found = collect_statistics(model, data, LAYERS, loss=loss)
        last = OnDemand(model, data, LAYERS, loss=loss)
        name = next(reversed(list(last)))
        assert last[name].tokens == expected[name].tokens
    for name, layer in found.items():
        assert layer.tokens == expected[name].tokens
        torch.testing.assert_close(layer.gram, expected[name].gram)
        torch.testing.assert_close(layer.gradient_gram, expected[name].gradient_gram, rtol=1e-5, atol=1e-9)


def without_masks(batch: Batch) -> Batch:
    """All is a token, so that a direct computation needs no notion of padding."""
    return batch if isinstance(batch, Tensor) else {key: batch[key] for key in batch if not key.endswith("_mask")}


def recomputed(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Transformers recomputes blocks in training mode alone: set that mode for the blocks, without dropout of their own."""

    def run(model: nn.Module, batch: Batch) -> Tensor:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
                for name in ("dropout", "activation_dropout", "attention_dropout"):
                    if isinstance(getattr(module, name, None), float):
                        setattr(module, name, 0.0)
        return loss(model, batch)

    return run


@pytest.mark.parametrize("family", ZOO)
def test_gradients_in_every_family_are_those_of_a_direct_computation(family: str) -> None:
    """Also if blocks are recomputed in the backward pass, where the family can."""
    model, data = of_zoo(family, torch.float64)
    data = [without_masks(batch) for batch in data]
    expected = direct(model, data, REPLACED[family], sum_of_samples)
    found = [collect_statistics(model, data, REPLACED[family], loss=sum_of_samples)]
    if switch := getattr(model, "gradient_checkpointing_enable", getattr(model, "set_grad_checkpointing", None)):
        switch()
        calls, first = [], next(iter(find_linears(model, REPLACED[family]).values()))
        first.register_forward_hook(lambda *_: calls.append(1))
        with nothing_left_behind(model.train()):
            found.append(collect_statistics(model, data, REPLACED[family], loss=recomputed(sum_of_samples)))
        assert len(calls) == 2 * len(data)
    for statistics in found:
        assert statistics.keys() == expected.keys()
        for name, layer in statistics.items():
            for field in ("gram", "gradient_gram", "row_fisher"):
                torch.testing.assert_close(
                    getattr(layer, field), getattr(expected[name], field), msg=f"{field}, {name}"
                )


@pytest.mark.parametrize("family", ZOO)
def test_what_the_loss_does_not_see_has_gradients_of_zero(family: str) -> None:
    model, data = of_zoo(family, torch.float64)
    linears, order, seen = find_linears(model, REPLACED[family]), [], []
    for name, layer in linears.items():
        layer.register_forward_hook(lambda module, args, output, name=name: order.append((name, output)))

    def of_one_layer(model: nn.Module, batch: Batch) -> Tensor:
        order.clear()
        loss(model, batch)
        seen.append(order[0][1].detach().flatten(0, -2))
        return order[0][1].square().sum()

    found = collect_statistics(model, [without_masks(data[0])], REPLACED[family], loss=of_one_layer)
    first = order[0][0]
    torch.testing.assert_close(found[first].gradient_gram, 4 * seen[0].mT @ seen[0])
    others = [layer for name, layer in found.items() if name != first]
    assert others
    assert not any(layer.gradient_gram.any() or layer.row_fisher.any() for layer in others)


class Recomputing(torch.autograd.Function):
    """A reentrant checkpoint that is not torch's."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)  # torch runs it without autograd

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.block(x).backward(gradient)
        return None, x.grad


class Blind(Net):
    """The whole forward pass is without autograd."""

    mode: Any = torch.no_grad

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            return super().forward(x)


def made_in_inference_mode() -> Net:
    with torch.inference_mode():
        return Net().double().eval()


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Any], str]] = {
    "a checkpoint of its own": (
        lambda: Net(lambda block, x: Recomputing.apply(block, x)).double(),
        square,
        "must run layer 'blocks.0.up' with autograd .* checkpointing of its own makes: switch that off",
    ),
    "no_grad": (lambda: built(Blind), square, "must run layers with autograd .* 'blocks.0.up' under torch.no_grad"),
    "a loss of numbers": (lambda: built(Net), lambda m, x: 3.0 * len(m(x)), "`loss` must return a scalar tensor"),
    "a loss of vectors": (lambda: built(Net), lambda m, x: m(x).sum(-1), "`loss` must return a scalar tensor"),
    "a detached loss": (lambda: built(Net), lambda m, x: square(m, x).detach(), "`loss` must depend on the model"),
    "inference weights": (made_in_inference_mode, square, "copy 'blocks.0.up.weight'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_gradients_is_refused_by_name(case: str) -> None:
    build, wrong, message = REFUSED[case]
    model = build().train()
    with nothing_left_behind(model), pytest.raises(ValueError, match=message):
        collect_statistics(model, batches(), [".*"], loss=wrong)


def test_an_error_of_the_loss_leaves_nothing_behind() -> None:
    def fails(model: nn.Module, batch: Tensor) -> Tensor:
        square(model, batch)
        raise KeyError("inside")

    model = built(Twice, "reentrant").train()
    with nothing_left_behind(model), pytest.raises(KeyError, match="inside"):
        collect_statistics(model, batches(), [".*"], loss=fails)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_models_that_run_without_autograd_give_the_moments_of_inputs(mode: Any, side: str) -> None:
    model, expected = built(Blind), collect_statistics(built(Net), batches(), [".*"], side=side)
    model.mode = mode
    found = collect_statistics(model, batches(), [".*"], side=side)
    for name, layer in found.items():
        for field, value in layer.moments().items():
            torch.testing.assert_close(value, getattr(expected[name], field))
            assert not value.is_inference()
    model = made_in_inference_mode()
    assert collect_statistics(model, batches(), [".*"], side=side).keys() == find_linears(model, [".*"]).keys()


def test_calls_on_other_numbers_of_samples_merge_with_other_data() -> None:
    model, data = built(Crops), [batch for batch in batches() if len(batch)]
    whole = collect_statistics(model, data, [".*"], loss=square)
    parts = [collect_statistics(model, [batch], [".*"], loss=square) for batch in data]
    for name, layer in whole.items():
        merged = parts[0][name] + parts[1][name] + parts[2][name]
        torch.testing.assert_close(merged.row_fisher, layer.row_fisher)
        torch.testing.assert_close(replace(merged, gram=None).gradient_gram, layer.gradient_gram)
