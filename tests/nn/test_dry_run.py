"""Layers that a model reads, asks for their class or holds elsewhere: seen before anything is replaced."""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
from families import LAYERS, REPLACED, ZOO, made, of_zoo
from torch import Tensor, nn
from torch.nn import functional
from transformers import Llama4ForCausalLM, Llama4TextConfig, PhimoeConfig, PhimoeForCausalLM

from lowrank.compression.compress import compress
from lowrank.io.hashing import hash_model
from lowrank.nn.batches import Batch, compute_logits
from lowrank.nn.dry_run import find_irreplaceable
from lowrank.nn.targets import find_linears

READ = "the model reads its weight instead of calling it"
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers: one that is called, and `odd`, for a family of faults."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.odd = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.good(x) + self.use(x)

    def use(self, x: Tensor) -> Tensor:
        return self.odd(x)


class Read(Net):
    def use(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.odd.weight)


class ReadInPart(Net):
    def use(self, x: Tensor) -> Tensor:
        return x @ self.odd.weight[:4].T @ x.new_ones(4, 8)


class Asked(Net):
    def use(self, x: Tensor) -> Tensor:
        if not isinstance(self.odd, nn.Linear):
            raise TypeError("no linear layer\nbut another")
        return self.odd(x)


class Branched(Net):
    def use(self, x: Tensor) -> Tensor:
        return self.odd(x) if isinstance(self.odd, nn.Linear) else 3 * self.odd(x)


class Listed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.odd]

    def use(self, x: Tensor) -> Tensor:
        return self.kept[0](x)


class Typed(Net):
    """Ask the weight for its dtype, as T5 does: harmless."""

    def use(self, x: Tensor) -> Tensor:
        return self.odd(x.to(self.odd.weight.dtype))


class Unreached(Net):
    def use(self, x: Tensor) -> Tensor:
        return x


class Random(Net):
    """Draw random numbers in evaluation mode: two passes differ, unless they draw the same."""

    def use(self, x: Tensor) -> Tensor:
        return self.odd(x) * torch.rand(())


FAULTS: dict[type[Net], str] = {
    Read: READ,
    ReadInPart: READ,
    Asked: "the model fails without it as an nn.Linear (TypeError: no linear layer)",
    Branched: "the model computes something else if it is no nn.Linear",
    Listed: "the model calls it from another place than its name",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_found_and_the_model_stays_as_it_was(kind: type[Net]) -> None:
    model = kind().train()
    state, draws = hash_model(model), torch.get_rng_state()
    modules = dict(model.named_modules())
    assert find_irreplaceable(model, X, find_linears(model, [".*"])) == {"odd": FAULTS[kind]}
    assert dict(model.named_modules()) == modules
    assert model.training
    assert model.odd.training
    assert hash_model(model) == state
    assert torch.equal(torch.get_rng_state(), draws)
    assert not model.odd._forward_pre_hooks


@pytest.mark.parametrize("kind", [Net, Typed, Unreached, Random])
def test_harmless_models_pass(kind: type[Net]) -> None:
    model = kind()
    assert find_irreplaceable(model, X, find_linears(model, [".*"])) == {}


@pytest.mark.parametrize("kind", FAULTS)
def test_compress_leaves_such_layers_out_and_refuses_them_by_name(kind: type[Net]) -> None:
    model, batches = kind().eval(), [torch.randn(40, 8) for _ in range(2)]
    odd, reference = model.odd, copy.deepcopy(model)
    for options in ({"ranks": {"odd": 2, "good": 2}}, {"keep": 0.5, "layers": ["good", "odd"]}):
        argument = "ranks" if "ranks" in options else "layers"
        with pytest.raises(ValueError, match=re.escape(f"`{argument}` must leave out 'odd': {FAULTS[kind]}.")):
            compress(model, batches, progress=False, **options)
        assert type(model.good) is nn.Linear
    result = compress(model, batches, 0.9, layers=[".*"], progress=False)
    assert model.odd is odd
    assert list(result.ranks) == ["good"]
    assert result.left_out == {"odd": FAULTS[kind]}
    assert model(X).shape == reference(X).shape


def test_a_model_of_nothing_else_is_refused() -> None:
    class All(Net):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(functional.linear(x, self.good.weight), self.odd.weight)

    with pytest.raises(ValueError, match=f"`layers` must leave out 'good': {READ}"):
        compress(All(), [X], 0.5, method="svd", layers=[".*"], progress=False)


def test_layers_that_fail_together_only_are_refused() -> None:
    class Either(Net):
        def use(self, x: Tensor) -> Tensor:
            assert isinstance(self.good, nn.Linear) or isinstance(self.odd, nn.Linear)
            return self.odd(x)

    with pytest.raises(ValueError, match="`model` must run with its layers replaced, got: the model fails"):
        find_irreplaceable(model := Either(), X, find_linears(model, [".*"]))


def test_batches_are_read_once_and_in_their_order() -> None:
    """An iterator may be read once; a loader that shuffles must not be started twice."""
    started = []

    class Loader:
        def __iter__(self) -> Any:
            started.append(True)
            return iter([X, X + 1, X + 2])

    results = [
        compress(model, batches, 0.6, layers=[".*"], progress=False)
        for model, batches in (
            (copy.deepcopy(NET), [X, X + 1, X + 2]),
            (copy.deepcopy(NET), iter([X, X + 1, X + 2])),
            (copy.deepcopy(NET), Loader()),
        )
    ]
    assert started == [True]
    assert results[0].layers == results[1].layers == results[2].layers


NET = Net().eval()


@pytest.mark.parametrize("family", ["vit", "plain", *ZOO])
def test_all_layers_of_the_families_can_be_replaced(family: str) -> None:
    """But one that BEiT never calls."""
    model, batches = of_zoo(family) if family in ZOO else made(family)[:2]
    linears = find_linears(model, LAYERS)
    irreplaceable = linears.keys() - find_linears(model, REPLACED.get(family, LAYERS)).keys()
    assert find_irreplaceable(model, batches[0], linears) == dict.fromkeys(irreplaceable, READ)


def phimoe() -> nn.Module:
    sizes = dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_local_experts=4)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return PhimoeForCausalLM(PhimoeConfig(**sizes, **tokens, num_attention_heads=2, num_key_value_heads=1))


def llama4() -> nn.Module:
    sizes = dict(vocab_size=60, hidden_size=16, intermediate_size=24, intermediate_size_mlp=24, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, attention_chunk_size=32)
    experts = dict(num_local_experts=4, num_experts_per_tok=1, pad_token_id=0)
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **experts))


def beit() -> nn.Module:
    return timm.models.Beit(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3)


def swinv2() -> nn.Module:
    sizes = dict(img_size=16, patch_size=4, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4)
    return timm.models.SwinTransformerV2(**sizes, num_classes=3)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1))


def texts(generator: torch.Generator) -> Batch:
    return {"input_ids": torch.randint(3, 60, (4, 12), generator=generator)}


def images(generator: torch.Generator) -> Batch:
    return torch.randn(4, 3, 16, 16, generator=generator)


def sequences(generator: torch.Generator) -> Batch:
    return torch.randn(4, 9, 16, generator=generator)


OWN_FORWARD = "has a forward pass of its own"
LEFT_OUT: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Batch], Mapping[str, str]]] = {
    "phimoe": (
        phimoe,
        texts,
        {
            "model.layers.0.mlp.router": OWN_FORWARD,
            "model.layers.0.mlp.experts.gate_up_proj": "a stack of matrices (4, 48, 16)",
            "model.layers.0.mlp.experts.down_proj": "a stack of matrices (4, 16, 24)",
        },
    ),
    "llama4": (
        llama4,
        texts,
        {
            "model.layers.0.feed_forward.router": OWN_FORWARD,
            "model.layers.0.feed_forward.experts.gate_up_proj": "a stack of matrices (4, 16, 48)",
            "model.layers.0.feed_forward.experts.down_proj": "a stack of matrices (4, 24, 16)",
        },
    ),
    "beit": (beit, images, {"blocks.0.attn.qkv": READ}),
    "swinv2": (swinv2, images, {"layers.0.blocks.0.attn.qkv": READ}),
    "encoder": (encoder, sequences, {"0.layers.0.self_attn.out_proj": "nn.MultiheadAttention reads its weight itself"}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lowrank.io.weights.LeftOutWarning")
@pytest.mark.parametrize("family", LEFT_OUT)
def test_families_with_odd_layers_are_compressed_without_them(family: str) -> None:
    build, sample, expected = LEFT_OUT[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        for parameter in model.parameters():  # norms that start at 0 hide what stands before them
            nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(1)
    batches = [sample(generator) for _ in range(2)]
    find = lambda name: getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])  # noqa: E731
    odd = {name: find(name) for name in expected}
    with torch.no_grad():
        before = compute_logits(model, batches[0])
        result = compress(model, batches, 0.8, progress=False)
        after = compute_logits(model, batches[0])
    assert all(find(name) is odd[name] for name in expected)
    assert result.left_out.keys() == expected.keys()
    assert all(result.left_out[name].endswith(reason) for name, reason in expected.items())
    assert 0 < (after - before).norm() < 0.6 * before.norm()
    assert any(row["storage"] != "dense" for row in result.layers)


@pytest.mark.parametrize(
    ("batch", "seen"),
    [
        ({"x": torch.ones(32, 5), "y": torch.ones(32)}, [1, 1]),
        ({"x": torch.ones(1, 5), "y": torch.ones(1)}, [1, 1]),
        ({"x": torch.ones(32, 5), "y": torch.ones(1)}, [32, 32]),  # what counts the samples is not known
        (
            {"x": torch.ones(32, 5), "y": torch.ones(32), "names": ["a"] * 32},
            [1, 32, 32],
        ),  # a model that needs them all
    ],
)
def test_one_sample_is_enough_where_the_model_runs_on_it(batch: dict[str, Any], seen: list[int]) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(5, 5), []

        def forward(self, x: torch.Tensor, y: torch.Tensor, names: list[str] | None = None) -> torch.Tensor:
            self.seen.append(len(x))
            assert names is None or len(names) == len(x)
            return self.layer(x) + y.sum() + functional.linear(x, self.layer.weight)

    model = Counts()
    assert find_irreplaceable(model, batch, {"layer": model.layer}) == {}
    assert model.seen == seen
