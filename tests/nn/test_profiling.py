"""Costs against what is known: operations counted by hand, buffers of known size, calls that are recorded."""

import pytest
import torch
from torch import Tensor, nn

from lowrank.compression.configuration import Configuration
from lowrank.compression.replace import replace_layers
from lowrank.factorization.rank_allocation import kept_parameters
from lowrank.nn.profiling import (
    build_training_step,
    count_flops,
    generate_in_turns,
    peak_bytes,
    synchronize,
    time_in_turns,
    top_operators,
    weight_bytes,
)

TOKENS = 11


def linear(shape: tuple[int, int], bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(shape[1], shape[0], bias=bias))


# --- operations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_takes_two_operations_per_weight_and_token(shape, bias, generator) -> None:
    x = torch.randn(1, TOKENS, shape[1], generator=generator)
    model = linear(shape, bias)
    assert count_flops(lambda: model(x)) == 2 * shape[0] * shape[1] * TOKENS
    assert count_flops(lambda: model(torch.cat([x, x]))) == 4 * shape[0] * shape[1] * TOKENS


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_factored_layer_takes_two_operations_per_stored_parameter_and_token(shape, storage, generator) -> None:
    x = torch.randn(TOKENS, shape[1], generator=generator)
    for rank in (1, 6, 11):
        model = linear(shape)
        replace_layers(model, {"0": rank}, Configuration("svd", storage))
        assert count_flops(lambda model=model: model(x)) == 2 * kept_parameters(shape, rank, storage) * TOKENS


def test_operations_are_counted_without_gradients_and_add_up(generator) -> None:
    x = torch.randn(TOKENS, 40, generator=generator)
    one, two = linear((24, 40)), linear((40, 24))
    seen: list[bool] = []

    def both() -> Tensor:
        seen.append(torch.is_grad_enabled())
        return two(one(x))

    hidden = one(x)
    assert count_flops(both) == count_flops(lambda: one(x)) + count_flops(lambda: two(hidden))
    assert seen == [False]
    assert torch.is_grad_enabled()


# --- a training step --------------------------------------------------------------------------------------------------


def test_a_training_step_trains_what_is_trainable_and_moves_nothing(generator) -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8))
    model[0].weight.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    x = torch.randn(TOKENS, 24, generator=generator)
    calls: list[bool] = []

    def loss(own: nn.Module) -> Tensor:
        calls.append(own.training)
        return own(x).square().mean()

    step, held = build_training_step(model, loss)
    with torch.no_grad():  # as peak_bytes calls it
        step()
    assert calls == [True, True]
    trained = 40 + 40 * 8 + 8
    assert held == 4 * (24 * 40 + trained) + 2 * 4 * trained + 3 * 4  # weights, two moments, three counts of steps
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old, new, atol=1e-7, rtol=0)
    assert all(p.grad is None for p in model.parameters())


# --- memory -----------------------------------------------------------------------------------------------------------


def test_weights_take_the_bytes_of_their_elements(shape) -> None:
    count = shape[0] * shape[1] + shape[0]
    model = linear(shape)
    assert weight_bytes(model) == 4 * count
    assert weight_bytes(model.double()) == 8 * count
    assert weight_bytes(model.half()) == 2 * count
    model.register_buffer("mask", torch.ones(5, dtype=torch.bool))
    assert weight_bytes(model) == 2 * count + 5


def test_shared_tensors_are_counted_once() -> None:
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    apart = weight_bytes(nn.ModuleList([embedding, head]))
    head.weight = embedding.weight  # one parameter
    assert weight_bytes(nn.ModuleList([embedding, head])) == apart // 2 == 1600
    copy = nn.Linear(8, 50, bias=False)
    copy.weight = nn.Parameter(embedding.weight.detach())  # two parameters over the same memory
    assert weight_bytes(nn.ModuleList([embedding, copy])) == 1600


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_compressed_model_takes_fewer_bytes_by_what_was_saved(shape, storage) -> None:
    model = linear(shape)
    before = weight_bytes(model)
    replace_layers(model, {"0": 5}, Configuration("svd", storage))
    indices = 8 * shape[0] if storage == "pivoted" else 0  # the pivots, and the other rows
    saved = 4 * (shape[0] * shape[1] - kept_parameters(shape, 5, storage))
    assert weight_bytes(model) == before - saved + indices


@pytest.mark.parametrize("megabytes", [1, 4, 16])
def test_the_peak_holds_a_buffer_of_known_size(megabytes: int) -> None:
    size = megabytes * 2**20
    peak = peak_bytes(lambda: torch.empty(size, dtype=torch.uint8).fill_(1))
    assert size <= peak <= size + 2**16


def test_the_peak_is_of_what_is_held_at_once() -> None:
    size = 2**20

    def in_turn() -> None:
        for _ in range(5):
            torch.ones(size, dtype=torch.uint8)  # freed at once

    def together() -> list[Tensor]:
        return [torch.ones(size, dtype=torch.uint8) for _ in range(5)]

    assert size <= peak_bytes(in_turn) < 2 * size
    assert 5 * size <= peak_bytes(together) < 6 * size


def test_the_peak_leaves_out_what_was_held_before() -> None:
    held = torch.ones(2 * 2**20)  # 8 MiB
    assert peak_bytes(lambda: held.sum()) < 2**20
    assert peak_bytes(lambda: None) == 0


def test_the_peak_of_a_model_grows_with_the_batch_and_holds_no_gradients(generator) -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)])
    small, large = (torch.randn(size, 64, generator=generator) for size in (1024, 4096))
    assert peak_bytes(lambda: model(large)) > 3 * peak_bytes(lambda: model(small))
    activation = 4 * large.numel()
    assert activation <= peak_bytes(lambda: model(large)) < 5 * activation  # of 20


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("repeats", "warmup"), [(1, 0), (3, 2), (0, 1)])
def test_competitors_take_turns_and_the_warm_up_does_not_count(repeats: int, warmup: int) -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = time_in_turns(functions, repeats=repeats, warmup=warmup)
    assert calls == list("abc") * (repeats + warmup)
    assert list(times) == list("abc")
    assert all(len(values) == repeats and all(value >= 0 for value in values) for values in times.values())


def test_the_clock_is_read_around_each_call_after_waiting_for_the_device(monkeypatch) -> None:
    events: list[str] = []
    clock = iter(range(100))

    def read() -> float:
        events.append("clock")
        return float(next(clock) ** 2)

    monkeypatch.setattr("lowrank.nn.profiling.synchronize", lambda device: events.append("wait"))
    functions = {"a": lambda: events.append("a"), "b": lambda: events.append("b")}
    times = time_in_turns(functions, repeats=2, warmup=0, clock=read)
    turn = [event for name in "ab" for event in ("wait", "clock", name, "wait", "clock")]
    assert events == turn * 2
    assert times == {"a": [1.0, 25 - 16.0], "b": [9 - 4.0, 49 - 36.0]}


def test_waiting_for_the_cpu_returns() -> None:
    assert synchronize(torch.device("cpu")) is None


# --- operators --------------------------------------------------------------------------------------------------------


def test_operators_share_all_the_time_the_longest_first(generator) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64))
    x = torch.randn(32, 64, generator=generator)
    rows = top_operators(lambda: model(x))
    assert [list(row) for row in rows] == [["operator", "calls", "self_ms", "share"]] * len(rows)
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-6)
    assert all(row["self_ms"] > 0 for row in rows)
    times = [row["self_ms"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert [row["share"] for row in rows] == pytest.approx([time / sum(times) for time in times])
    calls = {row["operator"]: row["calls"] for row in rows}
    assert len(calls) == len(rows)
    expected = {"aten::addmm": 2, "aten::linear": 2, "aten::gelu": 1, "aten::native_layer_norm": 1}
    assert {name: calls[name] for name in expected} == expected


@pytest.mark.parametrize(("bias", "product"), [(True, "aten::addmm"), (False, "aten::mm")])
def test_time_is_where_the_product_is_computed_and_not_in_what_calls_it(bias: bool, product: str, generator) -> None:
    model, x = linear((1024, 1024), bias), torch.randn(512, 1024, generator=generator)
    rows = top_operators(lambda: model(x))
    shares = {row["operator"]: row["share"] for row in rows}
    assert rows[0]["operator"] == product
    assert shares["aten::linear"] < shares[product]  # which holds all of it


def test_operators_are_counted_in_one_call_without_gradients_after_another(generator) -> None:
    x = torch.randn(8, 8, generator=generator, requires_grad=True)
    seen: list[bool] = []

    def call() -> Tensor:
        seen.append(torch.is_grad_enabled())
        for _ in range(3):
            y = x @ x
        return y

    rows = top_operators(call)
    assert seen == [False, False]
    assert {row["operator"]: row["calls"] for row in rows}["aten::mm"] == 3
    assert torch.is_grad_enabled()


def test_a_call_without_operators_has_no_rows() -> None:
    assert top_operators(lambda: None) == []


# --- generation -------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Passes calls on to a language model and remembers what they were."""

    def __init__(self, model: nn.Module, calls: list[tuple[str, int, int, bool]], name: str) -> None:
        super().__init__()
        self.model, self.calls, self.name = model, calls, name
        self.tokens: list[Tensor] = []

    def forward(self, input_ids: Tensor, past_key_values=None, **named):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        self.calls.append((self.name, input_ids.shape[1], past, self.training))
        self.tokens.append(input_ids)
        assert not torch.is_grad_enabled()
        return self.model(input_ids=input_ids, past_key_values=past_key_values, **named)


def llama(seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, num_key_value_heads=1, initializer_range=0.5, **sizes))


@pytest.mark.parametrize("new_tokens", [1, 2, 6])
def test_generation_takes_turns_and_uses_its_cache_the_same_number_of_times(new_tokens: int, generator) -> None:
    calls: list[tuple[str, int, int, bool]] = []
    models = {name: Recorder(llama(seed), calls, name).train() for seed, name in enumerate("ab")}
    prompt = torch.randint(0, 31, (3, 5), generator=generator)
    times = generate_in_turns(models, prompt, new_tokens, repeats=2, warmup=1)
    once = [
        (name, *sizes, False)
        for name in "ab"
        for sizes in [(5, 0), *((1, 5 + step) for step in range(new_tokens - 1))]  # the prompt, then one token each
    ]
    assert calls == once * 3
    assert {name: {part: len(values) for part, values in parts.items()} for name, parts in times.items()} == {
        name: {"prefill": 2, "decode": 2} for name in "ab"
    }
    assert all(value >= 0 for parts in times.values() for values in parts.values() for value in values)
    assert all(model.training for model in models.values())


def test_the_tokens_are_those_of_greedy_generation(generator) -> None:
    model, prompt = llama(3).eval(), torch.randint(0, 31, (2, 5), generator=generator)
    recorder = Recorder(model, [], "a")
    generate_in_turns({"a": recorder}, prompt, 7, repeats=1, warmup=0)
    expected = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=7, max_new_tokens=7, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(torch.cat(recorder.tokens, 1), expected[:, :-1])  # the last token is never passed on
