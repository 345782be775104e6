"""Make bad inputs for every public function, run each, and count how they end: `python tests/bad_inputs.py` prints the counts.

A case is a valid call with one argument replaced. It ends *clear* if the error is one of those that a caller expects and names
the argument (or the file) and what is wrong; *unclear* if it names neither; *wrong* if a result comes back, or if the model was
changed before the refusal; *traceback* if the error is one of Python or torch from somewhere inside.

It runs in a process of its own, without the type checks of the test suite, as a user calls the library.
"""

import json
import random
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lowrank
from lowrank.compression.configuration import Retargeting
from lowrank.compression.quantize import quantize
from lowrank.compression.retarget import retarget_layers
from lowrank.io.hashing import hash_model
from lowrank.selection.scores import Scores

NAN, INF = float("nan"), float("inf")
# argument -> what else an error may name: the option inside of it, or what it has to fit
ALSO = {
    "configuration": ("method",),
    "ratios": ("layers",),
    "dense": ("layers",),
    "batches": ("batch",),
    "multiple": ("keep",),
}
EXPECTED = (ValueError, TypeError, OSError, FloatingPointError)  # what a docstring announces, and a missing argument
NO_NUMBER: list[Any] = ["3", "", None, [1], {}, True, 1j, object(), b"1", torch.ones(2)]
NO_WHOLE: list[Any] = [*NO_NUMBER, 0, -1, -(10**30), 2.5, NAN, INF]  # for what takes whole floats too
NO_COUNT: list[Any] = [*NO_WHOLE, 2.0]
NO_SIZE: list[Any] = [*NO_NUMBER, -1, 2.5, NAN, INF]  # 0 is one
NO_SHARE: list[Any] = [*NO_NUMBER, -0.1, 1.5, -INF, INF, NAN, 10**30]
NO_AMOUNT: list[Any] = [*NO_NUMBER, -1e-9, -INF, INF, NAN]
NO_CHOICE: list[Any] = ["nonesuch", "", " ", 5, None, ["svd"], b"svd", 2.5, {}]
NO_MODEL: list[Any] = [None, 5, "model", nn.Linear, {}, [], torch.ones(2, 2), lambda x: x]
NO_LAYERS: list[Any] = ["blocks.0.up", "", 5, None, [], [""], ["nowhere"], [5], [None], {"blocks.0.up"}.__len__]
NO_BATCH: list[Any] = [[5], ["x"], [None], [()], [{}], [(5, 6)], [[1.0, 2.0]], [{"x": None}], [np.ones((4, 6))]]
NO_BATCHES: list[Any] = [5, 2.5, "batches", *NO_BATCH, [], iter([]), {}.get]
NO_FLAG: list[Any] = ["yes", 1, 0, None, [], NAN]
NO_CALL: list[Any] = [5, "loss", [], {}]
NO_DEVICE: list[Any] = [2.5, [], {}, "nowhere", "", "cuda:x", "cpu:0:0", object()]


class Block(nn.Module):
    """Two layers with biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 8), nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two blocks, on inputs `(samples, 6)`."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def data() -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(3)]


def statistics(**options: Any) -> dict[str, Any]:
    return lowrank.collect_statistics(net(), data(), **options)


def wrong_statistics() -> list[Any]:
    """No statistics, and some of other layers, other sizes and other values."""
    good = statistics()
    first = next(iter(good))
    mend = lambda **fields: good | {first: type(good[first])(**vars(good[first]) | fields)}  # noqa: E731
    small = lowrank.collect_statistics(Net(5), [torch.randn(9, 5)])
    return [
        5,
        "statistics",
        [],
        {5: good[first]},
        {first: 5},
        {"nowhere": good[first]},
        {},
        small,
        mend(mean=torch.full((6,), NAN), gram=torch.full((6, 6), NAN)),
        mend(tokens=0),
        mend(gram=None),
    ]


@dataclass(frozen=True)
class Case:
    """One bad call."""

    function: str
    argument: str
    value: Any
    call: Callable[..., Any]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """How to call a function well, and what its arguments must not be."""

    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    bad: dict[str, list[Any]]


def tiny_llama() -> nn.Module:
    import transformers  # noqa: PLC0415

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=32)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def factored() -> nn.Module:
    model = net()
    lowrank.compress(model, ranks=dict.fromkeys(lowrank.find_linears(model), 2), method="svd", progress=False)
    return model


def rank_config() -> Any:
    return lowrank.RankConfig({"blocks.0.up": 2}, {"blocks.0.up": {"out": 8, "in": 6}}, {"rule": "budget"})


def tuned() -> nn.Module:
    model = net()
    with torch.no_grad():
        model.blocks[0].up.weight += 0.1 * torch.randn(8, 6)
    return model


def library() -> dict[str, Spec]:
    """Return function name -> how to call it, for functions that read no file."""
    ranks, weight = dict.fromkeys(lowrank.find_linears(net()), 2), torch.eye(4, 5)
    shapes = {"a": (8, 6), "b": (6, 8)}
    some, none = statistics(loss=cross_entropy), lambda *more: [5, *more]
    recipe = lowrank.Recipe(steps=2)
    no_ranks = [
        5,
        "2",
        [],
        {},
        {"nowhere": 2},
        {5: 2},
        *(ranks | {"blocks.1.down": value} for value in (0, -1, 7, 10**30, 2.5, "2", None, NAN, True, [2])),
    ]
    no_weight = [
        None,
        5,
        "w",
        [[1.0]],
        np.eye(3),
        torch.eye(3, dtype=torch.int64),
        torch.ones(3),
        torch.ones(2, 2, 2),
        torch.empty(0, 3),
        torch.full((2, 2), NAN),
        torch.full((2, 2), INF),
        torch.eye(3) * 1j,
    ]
    weighting = [
        5,
        "white",
        None,
        {},
        *(
            lowrank.Weighting(inputs=value)
            for value in (
                "x",
                5,
                torch.eye(3),
                torch.ones(3),
                torch.full((5,), NAN),
                -torch.ones(5),
                torch.ones(5, 5, 5),
                torch.ones(5, dtype=torch.int64),
                torch.full((5, 5), INF),
            )
        ),
        *(
            lowrank.Weighting(outputs=value)
            for value in ("x", torch.eye(3), torch.zeros(4, 4), torch.full((4, 4), NAN))
        ),
    ]
    no_spectra = [
        5,
        "s",
        [],
        {},
        {"a": torch.ones(6)},
        {"a": torch.ones(3), "b": torch.ones(6)},
        {"a": "x", "b": torch.ones(6)},
        {"a": torch.full((6,), NAN), "b": torch.ones(6)},
        {"a": -torch.ones(6), "b": torch.ones(6)},
    ]
    no_numbers = [
        5,
        "12",
        None,
        {},
        [],
        [1, 2],
        [1, -1, 2],
        [1, NAN, 2],
        [1, INF, 2],
        ["1", 2, 3],
        [None, 1, 2],
        [[1], 2, 3],
    ]
    training = {"loss": NO_CALL, "checkpoint": [5, "folder", []], "recipe": none("fast", {}, [])}
    return {
        "collect_statistics": Spec(
            lowrank.collect_statistics,
            lambda: dict(model=net(), batches=data()),
            dict(
                model=NO_MODEL,
                layers=NO_LAYERS,
                loss=NO_CALL,
                side=NO_CHOICE,
                methods=[5, "svd", ["nonesuch"], [5]],
                batches=[*NO_BATCHES, [torch.full((4, 6), NAN)], [torch.full((4, 6), INF)], [torch.empty(0, 6)]],
                device=NO_DEVICE,
                products=[5, "float32", torch.int64, torch.float16, torch.bool, None],
            ),
        ),
        "OnDemand": Spec(
            lambda **given: dict(lowrank.OnDemand(**given)),
            lambda: dict(model=net(), batches=data()),
            dict(model=NO_MODEL, batches=NO_BATCHES, layers=NO_LAYERS, side=NO_CHOICE, colour=[5]),
        ),
        "compress": Spec(
            lowrank.compress,
            lambda: dict(model=net(), batches=data(), keep=0.6, progress=False),
            dict(
                model=NO_MODEL,
                keep=[*NO_SHARE, 0, 0.01],
                batches=NO_BATCHES,
                statistics=wrong_statistics(),
                layers=NO_LAYERS,
                method=NO_CHOICE[:3] + NO_CHOICE[5:],
                storage=NO_CHOICE,
                allocation=NO_CHOICE,
                multiple=[*NO_COUNT, 100],
                retarget=[5, "yes", []],
                ranks=[*no_ranks, ranks],
                loss=NO_CALL,
                colour=[5],
                centre=NO_FLAG,
                progress=NO_FLAG,
            ),
        ),
        "decompose": Spec(
            lowrank.decompose,
            lambda: dict(model=net(), statistics=some),
            dict(
                model=NO_MODEL,
                method=NO_CHOICE,
                statistics=[*wrong_statistics(), None],
                layers=NO_LAYERS,
                centre=NO_FLAG,
            ),
        ),
        "replace_layers": Spec(
            lowrank.replace_layers,
            lambda: dict(model=net(), ranks=ranks, statistics=some),
            dict(
                model=NO_MODEL,
                ranks=[*no_ranks, None],
                configuration=[*NO_CHOICE],
                statistics=[*wrong_statistics(), None],
                factors=[5, "f", [], {}, {"blocks.0.up": 5}],
            ),
        ),
        "prune": Spec(
            lowrank.prune,
            lambda: dict(model=net(), ratios=0.5, statistics=some),
            dict(
                model=NO_MODEL,
                method=NO_CHOICE,
                per=NO_CHOICE,
                statistics=[*wrong_statistics(), None],
                layers=NO_LAYERS[:3],
                ratios=[*NO_SHARE, 1, {"nowhere": 0.5}, {"blocks.0.up": "x"}, {"blocks.0.up": NAN}, {5: 0.5}],
                pattern=[5, (2, 4), "2:4", (4, 2)],
            ),
        ),
        "quantize": Spec(
            quantize,
            lambda: dict(model=net()),
            dict(model=NO_MODEL, bits=[0, 3, 8.5, "8", None], layers=NO_LAYERS, group=[0, -1, 2.5, "x"]),
        ),
        "fold": Spec(lowrank.fold, lambda: dict(model=factored()), dict(model=NO_MODEL)),
        "parameter_counts": Spec(
            lowrank.parameter_counts,
            lambda: dict(model=factored(), dense=net(), layers=[".*up"]),
            dict(model=[*NO_MODEL, nn.Linear(2, 2)], dense=[*NO_MODEL, nn.Linear(2, 2)], layers=NO_LAYERS),
        ),
        "find_linears": Spec(lowrank.find_linears, lambda: dict(model=net()), dict(model=NO_MODEL, layers=NO_LAYERS)),
        "split_packed": Spec(
            lowrank.split_packed,
            lambda: dict(model=net(), layers=["blocks.0.down"], parts=("a", "b", "c")),
            dict(
                model=NO_MODEL,
                layers=NO_LAYERS,
                parts=[5, "qkv", [], [5], ["a"] * 3, ["a", "b", "c", "d"], ["a.b", "c"], [""]],
            ),
        ),
        "unify_linears": Spec(lowrank.unify_linears, lambda: dict(model=net()), dict(model=NO_MODEL)),
        "factorize": Spec(
            lowrank.factorize,
            lambda: dict(weight=weight, rank=2),
            dict(weight=no_weight, rank=[*NO_COUNT, 5, 10**30], weighting=weighting, spectrum=NO_FLAG),
        ),
        "allocate_ranks": Spec(
            lowrank.allocate_ranks,
            lambda: dict(shapes=shapes, keep=0.5),
            dict(
                shapes=[5, "s", [], {"a": 5}, {"a": "86"}, {5: (8, 6)}],
                keep=[*NO_SHARE, 0, 1e-9],
                spectra=no_spectra,
                storage=NO_CHOICE,
                floor=NO_SHARE,
                multiple=[*NO_COUNT, 100],
                dense=[5, "a", ["nowhere"], [5]],
                weights=[
                    5,
                    [],
                    {},
                    {"a": 1.0},
                    {"a": -1.0, "b": 1.0},
                    {"a": NAN, "b": 1.0},
                    {"a": INF, "b": 1.0},
                    {"a": "x", "b": 1.0},
                ],
            ),
        ),
        "assign_layers": Spec(
            lowrank.assign_layers,
            lambda: dict(values=[1, 2, 3], costs=[1, 1, 1], budgets=[2, 1]),
            dict(
                values=no_numbers,
                costs=[*no_numbers, [1, 0, 1], [1, 1.5, 1]],
                order=NO_CHOICE,
                limit=NO_COUNT[:11],
                budgets=[5, "12", None, {}, [], [-1], [NAN], [INF], ["1"], [None], [[1]]],
                seconds=[*NO_NUMBER, 0, -1, -INF, NAN],
            ),
        ),
        "delta_spectra": Spec(
            lowrank.delta_spectra,
            lambda: dict(base=net(), tuned=tuned(), progress=False),
            dict(
                base=[5, None, [], {}, nn.Linear(2, 2), Net(5), "nowhere/at/all"],
                tuned=[5, None, nn.Linear(2, 2), Net(5), "./no"],
                layers=NO_LAYERS,
            ),
        ),
        "layer_scores": Spec(
            lowrank.layer_scores,
            lambda: dict(model=net(), metric="norm", config=lowrank.ScoringConfig(prunable="larger"), progress=False),
            dict(
                model=[5, None, [], {}, nn.ReLU(), "nowhere/at/all", "."],
                metric=NO_CHOICE,
                config=none("x", {}),
                layers=NO_LAYERS,
                device=NO_DEVICE,
                name=[5, [], {}],
            ),
        ),
        "add_adapter": Spec(
            lowrank.add_adapter,
            lambda: dict(model=net(), config=rank_config()),
            dict(
                model=[*NO_MODEL, nn.Linear(2, 2)],
                config=none("c", {}, None),
                start=[*NO_CHOICE, "warm", "eva"],
                seed=NO_SIZE[:10],
                batches=[5, "b"],
                scaling=["x", [], NAN, INF, 0, -1],
                colour=[5],
                r=[3],
            ),
        ),
        "perplexity": Spec(
            lowrank.perplexity,
            lambda: dict(model=LLAMA, token_ids=torch.arange(16), window=8),
            dict(
                model=NO_MODEL,
                window=[*NO_COUNT, 1, 17],
                token_ids=[
                    5,
                    "text",
                    None,
                    [1, 2],
                    torch.rand(16),
                    torch.ones(2, 16, dtype=torch.int64),
                    torch.empty(0, dtype=torch.int64),
                    torch.full((16,), 32),
                    torch.full((16,), -1),
                    torch.ones(16, dtype=torch.bool),
                ],
            ),
        ),
        "load_task": Spec(lowrank.load_task, dict, {}),
        "load_pi3": Spec(
            lowrank.load_pi3, dict, dict(source=[5, None, [], "", ".", "a/b/c/d"], config=none("small", {}))
        ),
        "prehab": Spec(
            lowrank.prehab,
            lambda: dict(
                model=net(), statistics=some, batches=data(), config=lowrank.PrehabConfig(steps=1), progress=False
            ),
            dict(
                model=NO_MODEL,
                statistics=[*wrong_statistics(), None],
                config=none("c", {}),
                **training,
                batches=[5, 2.5, "batches", *NO_BATCH, [], iter(data()), [torch.randn(4, 6)]],
            ),
        ),
        "refine_factors": Spec(
            lowrank.refine_factors,
            lambda: dict(model=factored(), batches=data(), recipe=recipe, progress=False),
            dict(
                model=[*NO_MODEL, net()],
                order=NO_CHOICE,
                lora=none("c", {}),
                batches=[5, 2.5, "batches", *NO_BATCH, [], iter(data())],
                **training,
            ),
        ),
        "OIALR": Spec(
            lowrank.OIALR,
            lambda: dict(model=net()),
            dict(
                model=[*NO_MODEL, nn.ReLU()], config=none("c", {}), include=NO_LAYERS[:-1], exclude=["x", 5, None, [5]]
            ),
        ),
        "BasisMonitor": Spec(
            lambda **given: lowrank.BasisMonitor(**given).check(net()),
            lambda: dict(progress=False),
            dict(every=NO_COUNT, include=NO_LAYERS[:-1], exclude=["x", 5, None, [5]]),
        ),
    }


LLAMA = tiny_llama()


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def options() -> dict[str, Spec]:
    """Return the classes that hold options."""
    count, size, share, amount = NO_COUNT, NO_SIZE, NO_SHARE, NO_AMOUNT
    positive, below = [*amount, 0], [*share, 1]
    return {
        "Configuration": Spec(
            lowrank.Configuration,
            dict,
            dict(
                method=NO_CHOICE,
                storage=NO_CHOICE,
                allocation=NO_CHOICE,
                multiple=count,
                centre=NO_FLAG,
                retarget=[5, "x", [], {}],
            ),
        ),
        "Retargeting": Spec(
            Retargeting,
            dict,
            dict(
                ridges=[5, "x", (), (0,), (-1,), (NAN,), (INF,), ("x",)],
                blends=[5, "x", (), (-1,), (2,), (NAN,), ("x",)],
                held_out=[*share, 0, 1],
                folder=[5, []],
                residual=NO_FLAG,
            ),
        ),
        "RankRule": Spec(
            lowrank.RankRule,
            dict,
            dict(
                threshold=[*share, 0],
                min_rank=[*NO_WHOLE, 10**6],
                max_rank=NO_WHOLE,
                smoothing=share,
                powers_of_two=NO_FLAG,
                per=NO_CHOICE,
                group=[5, "x"],
                parameters=[*NO_AMOUNT[:2], *NO_AMOUNT[3:], 0, -1],  # a budget of 2.5 is one of 2; None is none
            ),
        ),
        "ScoringConfig": Spec(
            lowrank.ScoringConfig,
            dict,
            dict(
                window=NO_CHOICE,
                smallest=amount,
                prunable=[value for value in NO_CHOICE if value is not None],
                mapping=NO_CHOICE,
                sparsity=below,
                epsilon=below,
                exact=NO_FLAG,
                missing=NO_CHOICE,
            ),
        ),
        "Recipe": Spec(
            lowrank.Recipe,
            lambda: dict(steps=3),
            dict(
                steps=size,
                batch_size=count,
                learning_rate=positive,
                weight_decay=amount,
                warmup=share,
                decay=NO_CHOICE,
                decay_power=positive,
                floor=share,
                precision=NO_CHOICE,
                seed=size[:10],
                workers=size,
                accumulation=count,
                checkpoint_every=count,
            ),
        ),
        "OIALRConfig": Spec(
            lowrank.OIALRConfig,
            dict,
            dict(delay=count, frequency=count, sigma_cutoff=below, minimum=share, coverage=share),
        ),
        "PrehabConfig": Spec(
            lowrank.PrehabConfig,
            dict,
            dict(
                penalty=NO_CHOICE,
                strength=amount,
                steps=size,
                target_keep=[*share, 0],
                schedule=NO_CHOICE,
                others=NO_FLAG,
                shrinkage=positive,
                refresh=count,
            ),
        ),
    }


def values_in(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value inside a JSON value; of several items in one list the first."""
    if place:
        yield place
    children = (
        content.items() if isinstance(content, dict) else enumerate(content[:1]) if isinstance(content, list) else ()
    )
    for key, value in children:
        yield from values_in(value, (*place, key))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a copy with another value at a place; `...` takes it away."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return copy


@dataclass(frozen=True)
class Format:
    """A file that is read again: its JSON content, how to write another, how to read it, and the names an error may use."""

    content: Any
    write: Callable[[str | bytes], None]
    load: Callable[[], Any]
    names: tuple[str, ...]


def formats(folder: Path) -> dict[str, Format]:
    """Write one file of each format, all whole."""
    model = tiny_llama()
    lowrank.compress(model, keep=0.6, method="svd", layers=[r".*(q|down)_proj"], progress=False)
    lowrank.save_compressed(model, folder / "compressed")
    lowrank.layer_scores(net(), progress=False, metric="norm", config=lowrank.ScoringConfig(prunable="larger")).save(
        folder / "scores.json"
    )
    rank_config().save(folder / "ranks.json")
    lowrank.save_statistics(folder / "statistics.safetensors", statistics(), net(), "data")
    (folder / "sharded").mkdir()
    save_file(tuned().state_dict(), folder / "sharded" / "one.safetensors")
    names = dict.fromkeys(net().state_dict(), "one.safetensors")
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    blocks = lowrank.Configuration("svd", retarget=Retargeting(folder=folder / "blocks", ridges=(0.1,), blends=(0.0,)))
    retarget = lambda: retarget_layers(net(), {"blocks.0.up": 2, "blocks.1.up": 2}, blocks, None, data())  # noqa: E731
    retarget()
    return {
        "lowrank.json": _json(
            folder / "compressed" / "lowrank.json",
            lambda: lowrank.load_compressed(folder / "compressed"),
            "folder",
            "architecture",
        ),
        "scores": _json(folder / "scores.json", lambda: Scores.load(folder / "scores.json", net()), "path", "model"),
        "rank config": _json(folder / "ranks.json", lambda: lowrank.RankConfig.load(folder / "ranks.json"), "path"),
        "shard index": _json(
            folder / "sharded" / "model.safetensors.index.json",
            lambda: lowrank.delta_spectra(net(), folder / "sharded", progress=False),
            "tuned",
        ),
        "statistics": _metadata(
            folder / "statistics.safetensors",
            "layers",
            lambda: lowrank.load_statistics(folder / "statistics.safetensors", net(), "data"),
            "path",
            "model",
            "layers",
        ),
        "blocks": _json(folder / "blocks" / "identity.json", retarget, "folder"),
        "block": _metadata(folder / "blocks" / "blocks.0.safetensors", "rows", retarget, "folder", "layers"),
    }


def _json(path: Path, load: Callable[[], Any], *names: str) -> Format:
    write = lambda text: path.write_bytes(text if isinstance(text, bytes) else text.encode())  # noqa: E731
    return Format(json.loads(path.read_text()), write, load, (*names, path.name))


def _metadata(path: Path, key: str, load: Callable[[], Any], *names: str) -> Format:
    """A format whose JSON is one of the metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118

    def write(text: str | bytes) -> None:
        save_file(tensors, path, {**about, key: text if isinstance(text, str) else text.decode("latin1")})

    return Format(json.loads(about[key]), write, load, (*names, path.name))


TEXTS: list[str | bytes] = [
    "",
    "{",
    "[]",
    "null",
    "5",
    '"text"',
    b"\xff\xfe\x00",
    '{"format": 1, "format": 2}',
    "[" * 10**5,
    "1" * 5000,
]
PUT: list[Any] = [..., None, "x", -1, 2.5, [], {}, True, [None], {"x": None}]


def end_of(
    call: Callable[[], Any], names: tuple[str, ...], model: nn.Module | None, returns: str = "wrong"
) -> tuple[str, str]:
    """Return how a bad call ends, and the text of its error."""
    before = hash_model(model) if isinstance(model, nn.Module) else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = call()
    except EXPECTED as error:
        text = str(error)
        if isinstance(model, nn.Module) and hash_model(model) != before:
            return "wrong", f"the model was changed before: {text}"
        named = any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) for name in names)
        rule = re.search(r"\bmust\b|unexpected keyword|missing .*argument", text)
        return ("clear" if named and rule and "\n" not in text else "unclear"), f"{type(error).__name__}: {text}"
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return returns, f"returned {type(found).__name__}"


def run_calls() -> Iterator[tuple[str, str, str]]:
    """Run every bad call, and yield where, how it ended, and its text."""
    for name, spec in (library() | options()).items():
        for argument, values in spec.bad.items():
            for value in values:
                given = spec.good() | {argument: value}
                if name == "compress" and argument == "ranks":
                    given["keep"] = given["keep"] if value == given.get("ranks") else None
                model = given.get("model")
                names = (argument, f"{argument}s", *ALSO.get(argument, ()))
                where = f"{name}({argument}={' '.join(repr(value).split()):.50})"
                yield where, *end_of(lambda spec=spec, given=given: spec.call(**given), names, model)


def run_files() -> Iterator[tuple[str, str, str]]:
    """Read files of every format with one value changed, or of no format at all."""
    with tempfile.TemporaryDirectory() as folder:
        for name, form in formats(Path(folder)).items():
            form.load()  # the whole file is read
            for text in TEXTS:
                form.write(text)
                yield f"{name}: {text[:30]!r}", *end_of(form.load, form.names, None)
            for place in values_in(form.content):
                for value in random.Random(str(place)).sample(PUT, 4):
                    form.write(json.dumps(changed(form.content, place, value)))
                    where = f"{name}: {value!r} at {'.'.join(map(str, place))}"
                    yield where, *end_of(form.load, (*form.names, *map(str, place)), None, "harmless")
            form.write(json.dumps(form.content))


def main() -> None:
    """Print the counts as one line of JSON, after a line for each case that is not clear."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for where, end, text in chain(run_calls(), run_files()):
        counts[end] += 1
        if end not in ("clear", "harmless") or "-v" in sys.argv:
            print(f"{end}: {where}: {' '.join(text.split()):.200}")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
