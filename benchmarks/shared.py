"""What the benchmarks share: models of given sizes, the table of results, the peak memory of a part of a process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from torch import nn

from lowrank.io.dependencies import ROOT
from lowrank.io.provenance import environment


def recorder(name: str, *columns: str) -> tuple[Callable[..., None], object]:
    """`row(...)`, which takes the values of the columns, by default `what`, `case`, `figure` and `value`, and a fixture that
    writes the rows to outputs/bench/`name`.csv at the end."""
    rows: list[dict[str, object]] = []

    def row(*values: object) -> None:
        rows.append(dict(zip(columns or ("what", "case", "figure", "value"), values, strict=True)))

    @pytest.fixture(scope="module", autouse=True)
    def table() -> Iterator[None]:
        yield
        if rows:
            folder = ROOT / "outputs" / "bench"
            folder.mkdir(parents=True, exist_ok=True)
            made = pd.DataFrame(rows).assign(device=environment()["device"])
            made.to_csv(folder / f"{name}.csv", index=False, float_format="%.3g")

    return row, table


@contextmanager
def peak_megabytes() -> Iterator[Callable[[], float]]:
    """Resident memory of this process, at its most since the start of the block, over what it was then. Linux."""

    def read(key: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024 / 1e6

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = read("VmRSS")
    yield lambda: read("VmHWM") - before


def bert(hidden: int, layers: int) -> nn.Module:
    import transformers  # noqa: PLC0415

    config = transformers.BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, intermediate_size=4 * hidden
    )
    return transformers.BertModel(config)


def llama(hidden: int, layers: int, vocabulary: int = 8000) -> nn.Module:
    import transformers  # noqa: PLC0415

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        intermediate_size=11 * hidden // 4,
        vocab_size=vocabulary,
    )
    return transformers.LlamaForCausalLM(config)
