"""What a byte buys: low rank, fewer bits, or both, on models that come with the library: `make bench`; outputs/bench/bytes.csv.

`bits` are those of the weights in blocks; with fewer than 32, all others have 16. 8 bits have one scale per row, 4 bits one per
group of `group` weights. `keep` is 1 for the dense model. Smaller models are cut from one decomposition: two-sided, pivoted,
centred where layers have biases, ranks by spectrum. `share` is the bytes of the model over those of the dense one in 16 bits,
`targeted` the same for the weights in blocks alone. `rival` is the added loss of the best dense model of at most as many bytes.
"""

import copy

import pytest
from shared import recorder
from torch import nn

from lowrank import Recipe, compress, load_task
from lowrank.compression.nested import cut_layers
from lowrank.compression.quantize import quantize
from lowrank.io.weights import distinct_tensors
from lowrank.nn.quantized import GROUPS
from lowrank.report.parameters import read_parameters
from lowrank.tasks.baseline import load_baseline, load_calibration

COLUMNS = ("set", "bits", "group", "keep", "bytes", "share", "targeted", "added_loss", "rival")
row, table = recorder("bytes", *COLUMNS)
FORMS = ((32, None), (16, None), (8, None), (4, 128), (4, 32))
KEEPS = (1.0, 0.75, 0.5, 0.25)
SETS = ("docs-llama", "digits-vit")


def stored(model: nn.Module, layers: list[str], bits: int, group: int | None) -> tuple[nn.Module, int, int]:
    """A copy of a model with weights of some bits, which computes in float32, and the bytes of its file: all, and of layers."""
    smaller = copy.deepcopy(model) if bits == 32 else copy.deepcopy(model).half()
    if bits in GROUPS:
        quantize(smaller, bits, layers, group=group)
    sizes = {name: tensor.nbytes for name, tensor in distinct_tensors(smaller)[0].items()}
    starts = tuple(f"{name}." for name in layers)
    part = sum(size for name, size in sizes.items() if name.startswith(starts) and not name.endswith("bias"))
    return smaller.float(), sum(sizes.values()), part


@pytest.mark.parametrize("name", SETS)
def test_what_a_byte_buys(name: str, benchmark) -> None:
    p = read_parameters(name, "03_svd_comparison")
    task = load_task(p["task"], **p["task_options"])
    recipe = Recipe(p["steps"], p["batch_size"], p["learning_rate"], p["weight_decay"], seed=p["seed"])
    model = load_baseline(task, recipe).model
    drawn = dict(samples=p["calibration_samples"], batch_size=p["batch_size"], seed=0)
    statistics = load_calibration(task, model, gradients="sampled", **drawn)
    nested, layers = copy.deepcopy(model), list(task.linears(model))
    compress(nested, None, "any", statistics=statistics, layers=layers, progress=False)
    dense = task.evaluate(model, "validation", p["batch_size"])["loss"]
    whole = targeted = 0
    rivals: list[tuple[int, float]] = []
    rows = []
    for keep in KEEPS:
        smaller = copy.deepcopy(model if keep == 1 else nested)
        if keep < 1:
            cut_layers(smaller, keep)
        for bits, group in FORMS:
            form, size, part = stored(smaller, layers, bits, group)
            added = task.evaluate(form, "validation", p["batch_size"])["loss"] - dense
            if (bits, keep) == (16, 1):
                whole, targeted = size, part
            if keep == 1:
                rivals.append((size, added))
            rows.append((bits, group, keep, size, part, added))
    for bits, group, keep, size, part, added in rows:
        rival = min((loss for other, loss in rivals if other <= size), default=None)
        row(name, bits, group, keep, size, size / whole, part / targeted, added, rival)
    benchmark.pedantic(lambda: None, rounds=1)
