"""What the spectra of deltas cost: `make bench`. The table goes to outputs/bench/rank_config.csv.

Memory over two sharded bfloat16 checkpoints of more than 1 GB each, read one tensor at a time; time over the linears of a Llama
block, against `torch.linalg.svdvals` of the float32 deltas, at the same ranks.
"""

from pathlib import Path
from statistics import median

import torch
from recipes import llama
from safetensors.torch import save_file
from shared import peak_megabytes, recorder

from lowrank.io.weights import INDEX
from lowrank.lora.deltas import delta_spectra
from lowrank.lora.ranks import rank_for_delta
from lowrank.nn.profiling import time_in_turns

row, table = recorder("rank_config")
GIGABYTE = 1e9


def write_shards(folder: Path, seed: int) -> float:
    """A Llama-like checkpoint of bfloat16 weights, a shard per block; returns its size in bytes."""
    import json  # noqa: PLC0415

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    change = torch.Generator().manual_seed(seed)
    shapes = {"self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (512, 2048), "self_attn.v_proj": (512, 2048)}
    shapes |= {"self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (5632, 2048), "mlp.down_proj": (2048, 5632)}
    index, size, block = {}, 0.0, 0
    while size < 1.05 * GIGABYTE:
        tensors = {}
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=generator)
            weight += 0.01 * torch.randn(shape[0], 8, generator=change) @ torch.randn(8, shape[1], generator=change)
            tensors[f"model.layers.{block}.{name}.weight"] = weight.bfloat16()
        save_file(tensors, folder / f"part-{block}.safetensors")
        index |= dict.fromkeys(tensors, f"part-{block}.safetensors")
        size += sum(tensor.nbytes for tensor in tensors.values())
        block += 1
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return size


def test_memory_of_streaming(benchmark, tmp_path: Path) -> None:
    sizes = [write_shards(tmp_path / name, seed) for seed, name in enumerate(("base", "tuned"))]
    case = f"two checkpoints of {sizes[0] / GIGABYTE:.2f} GB bfloat16 in shards"
    with peak_megabytes() as peak:
        spectra = delta_spectra(tmp_path / "base", tmp_path / "tuned")
        row("spectra of deltas, peak memory", case, "MB", peak())
    assert len(spectra) > 20
    benchmark.pedantic(lambda: None, rounds=1)


def test_time_of_spectra(benchmark) -> None:
    torch.manual_seed(0)
    base, tuned = llama(1024, 1), llama(1024, 1)
    names = list(delta_spectra(base, tuned, progress=False))
    pairs = {name: (base.get_submodule(name).weight, tuned.get_submodule(name).weight) for name in names}
    exact: dict[str, torch.Tensor] = {}

    def by_svd() -> None:
        exact.update({name: torch.linalg.svdvals((two - one).detach()) for name, (one, two) in pairs.items()})

    runs = {"ours": lambda: delta_spectra(base, tuned, progress=False), "svdvals": by_svd}
    times = {name: median(own) for name, own in time_in_turns(runs, repeats=3, warmup=1).items()}
    row(
        "spectra of deltas: svdvals in float32 over ours",
        "linears of a Llama block 1024 wide",
        "time ratio",
        times["svdvals"] / times["ours"],
    )
    for name, found in delta_spectra(base, tuned, progress=False).items():
        for threshold in (0.5, 0.9, 0.99):
            assert rank_for_delta(found.sigma, threshold, 1, 4096) == rank_for_delta(exact[name], threshold, 1, 4096)
    benchmark.pedantic(lambda: None, rounds=1)
