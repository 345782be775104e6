"""The measured parts at real sizes, with random weights, on one GPU: `make gpu`. It needs no Jupyter, pytest or pandas.

Tables go to outputs/gpu/, one a part, as soon as the part has ended; run.json there says on what card, driver and versions, and
how long each part took. Sizes are arguments, and the defaults are those of published models. `LIMIT` bounds the whole: a part
that would start later is left out, and run.json says so.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from recipes import layer_rows, llama, pi3_rows, svd_llm_factors, svd_llm_moments, training_step, truncated, vit
from torch import Tensor, nn

from lowrank.calibration.collect import FewTokensWarning
from lowrank.compression.compress import compress
from lowrank.factorization.rank_allocation import allocate_ranks
from lowrank.io.dependencies import ROOT
from lowrank.io.files import writing
from lowrank.io.provenance import environment
from lowrank.nn.batches import compute_logits, move_batch
from lowrank.nn.profiling import synchronize, time_in_turns
from lowrank.nn.targets import find_linears
from lowrank.pi3.model import Pi3Config
from lowrank.selection.esd import esd_metrics, esd_metrics_together
from lowrank.training.oialr import OIALR, OIALRConfig

LIMIT = 480  # seconds
KEEPS = (0.5, 0.2)
NO_GPU = "`make gpu` needs an NVIDIA GPU that torch can use, and there is none here."
Rows = Iterator[dict[str, Any]]


def measure(function: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Run a function once: its seconds, and the peak of the GPU's memory beyond what was in use, in MB."""
    synchronize(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    start = time.perf_counter()
    function()
    synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, (torch.cuda.max_memory_allocated(device) - before) / 1e6 if cuda else None


def make_block(sizes: argparse.Namespace, device: torch.device) -> nn.Module:
    """Build a Llama of one block in bfloat16, with random weights, on a device."""
    shape = dict(vocabulary=sizes.vocabulary, intermediate=sizes.intermediate, width=sizes.width)
    with torch.device("meta"):
        model = llama(sizes.hidden, 1, kv_heads=sizes.hidden // sizes.width, **shape)
    model = model.to(torch.bfloat16).to_empty(device=device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    fresh = llama(sizes.width, 1, 8, kv_heads=1, width=sizes.width)  # buffers do not depend on the other sizes
    for name, buffer in fresh.named_buffers():
        model.get_buffer(name).copy_(buffer)
    return model.eval()


def compare_compressing(sizes: argparse.Namespace, device: torch.device) -> Rows:
    """Compress one block of the shapes of Llama-2-7B by SVD-LLM's recipe and by the library, moments included."""
    generator = torch.Generator().manual_seed(0)
    shape = sizes.batch, sizes.tokens
    ids = [torch.randint(0, sizes.vocabulary, shape, generator=generator) for _ in range(sizes.batches)]
    batches = [{"input_ids": part} for part in ids]
    probe = move_batch({"input_ids": ids[0][:1]}, device)
    shapes = {name: tuple(layer.weight.shape) for name, layer in find_linears(make_block(sizes, device)).items()}
    ranks = allocate_ranks(shapes, KEEPS[0])

    def theirs(model: nn.Module) -> None:
        svd_llm_factors(model, ranks, svd_llm_moments(model, ranks, batches))

    def ours(**choices: Any) -> Callable[[nn.Module], None]:
        how = dict(centre=False, allocation="uniform", progress=False) | choices
        return lambda model: compress(model, batches, KEEPS[0], **how) and None

    ways = {
        "whitened, factors": ours(method="whitened", storage="factors"),
        "whitened, pivoted": ours(method="whitened", storage="pivoted"),
        "two_sided, pivoted": ours(method="two_sided", storage="pivoted"),
        "SVD-LLM's recipe": theirs,
    }
    with torch.no_grad():
        dense = compute_logits(make_block(sizes, device), probe).float()
    small = argparse.Namespace(**vars(sizes) | dict(hidden=2 * sizes.width, intermediate=3 * sizes.width))
    for name, way in ways.items():
        if name != "SVD-LLM's recipe":
            way(make_block(small, device))  # libraries are loaded before the clock runs
        model = make_block(sizes, device)
        seconds, peak = measure(lambda way=way, model=model: way(model), device)
        with torch.no_grad():
            change = float((compute_logits(model, probe).float() - dense).norm() / dense.norm())
        about = {"block": f"{sizes.hidden}, {sizes.intermediate}", "tokens": sum(part.numel() for part in ids)}
        yield about | {"keep": KEEPS[0], "way": name, "seconds": seconds, "peak_mb": peak, "output_change": change}


def compare_layers(sizes: argparse.Namespace, device: torch.device) -> Rows:
    """Time factored and pivoted layers in bfloat16 against the dense ones, for many tokens and for one."""
    for shape in ((sizes.hidden, sizes.hidden), (sizes.intermediate, sizes.hidden), (sizes.hidden, sizes.intermediate)):
        for keep in KEEPS:
            for tokens in (sizes.rows, 1):
                yield from layer_rows(shape, keep, tokens, device, torch.bfloat16, sizes.multiples)


def compare_pi3(sizes: argparse.Namespace, device: torch.device) -> Rows:
    """Time π³ of the published size, dense and compressed."""
    config = replace(Pi3Config(), **json.loads(sizes.pi3))
    for views in sizes.views:
        yield from pi3_rows(config, (views, sizes.height, sizes.side), "bf16", device, repeats=sizes.repeats)


def compare_exponents(sizes: argparse.Namespace, device: torch.device) -> Rows:
    """Time the spectral exponents of the weights of a block, one weight at a time and together."""
    weights = [layer.weight for layer in find_linears(make_block(sizes, device)).values()]
    esd_metrics(weights[0][: sizes.width])
    calls = {
        "one at a time": lambda: [esd_metrics(weight) for weight in weights],
        "of one size together": lambda: esd_metrics_together(weights),
    }
    for name, call in calls.items():
        seconds, peak = measure(call, device)
        yield {"weights": len(weights), "way": name, "seconds": seconds, "peak_mb": peak}


def compare_oialr(sizes: argparse.Namespace, device: torch.device) -> Rows:
    """Time a training step of a ViT with fixed bases over a dense one, and the conversion of all of its layers."""
    shape = dict(img_size=sizes.image, patch_size=16, embed_dim=sizes.dim, depth=sizes.depth)
    dense = vit(**shape, num_heads=max(1, sizes.dim // 64)).to(device)
    images = torch.randn(sizes.images, 3, sizes.image, sizes.image).to(device)
    batch: tuple[Tensor, Tensor] = images, torch.randint(0, 10, (sizes.images,)).to(device)
    models = {"dense": dense} | {f"rank ratio {r}": truncated(dense, r, False) for r in (1.0, 0.5, 0.25, 0.1)}
    steps = {name: training_step(model, batch)[0] for name, model in models.items()}
    times = time_in_turns(steps, repeats=sizes.repeats, device=device)
    first = sorted(times["dense"])[len(times["dense"]) // 2]
    for name, seconds in times.items():
        middle = sorted(seconds)[len(seconds) // 2]
        yield {"what": f"a training step, {name}", "seconds": middle, "over_dense": middle / first, "peak_mb": None}
    method, (step, optimizer) = OIALR(dense, OIALRConfig(delay=1, frequency=1)), training_step(dense, batch)
    for what in ("the conversion of all layers", "a refresh"):
        step()
        seconds, peak = measure(lambda: method.step(optimizer), device)
        yield {"what": what, "seconds": seconds, "over_dense": seconds / first, "peak_mb": peak}


PARTS: dict[str, Callable[[argparse.Namespace, torch.device], Rows]] = {
    "layers": compare_layers,
    "pi3": compare_pi3,
    "oialr": compare_oialr,
    "exponents": compare_exponents,
    "compress": compare_compressing,
}


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as CSV and return their number."""
    found = list(rows)
    with writing(path) as partial, partial.open("w", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, list(found[0]))
        table.writeheader()
        table.writerows([{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in found])
    return len(found)


def describe_card(device: torch.device) -> dict[str, Any]:
    """Return name, memory, driver and CUDA of a GPU; of another device its name alone."""
    if device.type != "cuda":
        return {"card": str(device)}
    known = torch.cuda.get_device_properties(device)
    card = {"card": known.name, "memory_mb": known.total_memory // 10**6, "cuda": torch.version.cuda}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = None
    return card | {"driver": driver, "capability": f"{known.major}.{known.minor}"}


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu", help="folder of the tables")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--views", nargs="+", type=int, default=[1, 2, 11, 30], help="of π³")
    parser.add_argument("--multiples", nargs="+", type=int, default=[1, 8, 64], help="of ranks")
    parser.add_argument("--pi3", default="{}", help="sizes of π³ that are not the published ones, as JSON")
    block = dict(hidden=4096, intermediate=11008, width=128, vocabulary=1000, batch=8, tokens=2048, batches=4)
    for name, size in (block | dict(rows=4096, height=364, side=700, repeats=5)).items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"default: {size}")
    for name, size in dict(dim=768, depth=12, image=224, images=32).items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"of the ViT; default: {size}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure the parts; 0 if all ended in time, 1 if some were left out, 2 without a GPU."""
    sizes, start = read_arguments(arguments), time.perf_counter()
    if sizes.device.startswith("cuda") and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    device, seconds, missed = torch.device(sizes.device), {}, []
    provenance = environment() | describe_card(device)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(sizes).items()}
    sizes.out.mkdir(parents=True, exist_ok=True)
    for name in sizes.parts:
        before = time.perf_counter()
        if before - start > LIMIT:
            missed.append(name)
        else:
            count = write_table(sizes.out / f"{name}.csv", PARTS[name](sizes, device))
            seconds[name] = round(time.perf_counter() - before, 1)
            print(f"{name}: {count} rows in {seconds[name]} s")
        record = provenance | {"arguments": options, "seconds": seconds, "left_out": missed}
        with writing(sizes.out / "run.json") as partial:
            partial.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf8")
    return 1 if missed else 0


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore", FewTokensWarning)
    sys.exit(main())
