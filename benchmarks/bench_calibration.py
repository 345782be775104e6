"""What each configuration costs in calibration, and what it loses: `make bench`; outputs/bench/calibration.csv.

Every row is one call of `compress` on a copy of a set's trained model, on the calibration samples of notebook 03, with the
statistics that its method reads. `forward` and `backward` count products: what all linear layers multiplied, statistics included,
in passes of the dense model over those samples. So half a pass is half of the layers, or half of the samples, or all at half of
the size. `cpu_seconds` includes the statistics too. `share` is the loss added on the validation split over that of plain
whitening with as many bytes: where pivots take bytes for indices, whitening gets them as rank. No choice here was made on that
split.
"""

import copy
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sets import load_set
from shared import recorder
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lowrank import collect_statistics, compress
from lowrank.calibration.predictive_loss import predictive_loss
from lowrank.factorization.methods import needs_gradients
from lowrank.nn.batches import compute_logits
from lowrank.nn.profiling import weight_bytes
from lowrank.nn.targets import find_linears
from lowrank.tasks.evaluation import evaluate

COLUMNS = ("set", "keep", "configuration", "forward", "backward", "cpu_seconds", "model_bytes", "added_loss", "share")
row, table = recorder("calibration", *COLUMNS)
SETS = {"digits-vit": (0.2, 0.1), "docs-llama": (0.5, 0.3), "sst2-minilm": (0.4, 0.2)}
PLAIN: dict[str, Any] = dict(storage="factors", centre=False, allocation="uniform")
WHOLE: dict[str, Any] = dict(method="two_sided")
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "whitened": PLAIN | dict(method="whitened"),
    "two_sided": PLAIN | dict(method="two_sided"),
    "whitened, centred, pivots": dict(method="whitened"),
    "two_sided, centred, pivots": WHOLE | dict(allocation="uniform"),
    "the same, ranks by spectrum": WHOLE,
    "the same, ranks by depth": WHOLE | dict(allocation="depth"),
    "the same, ranks by measured loss": WHOLE | dict(allocation="measured"),
    "by spectrum, retargeted": WHOLE | dict(retarget=True),
    "by measured loss, retargeted": WHOLE | dict(allocation="measured", retarget=True),
}


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count the multiplications of all modules that hold a matrix and no other module: `forward` and `backward`."""
    counts: Counter[str] = Counter()

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        matrices = [p for p in module.parameters(recurse=False) if p.ndim == 2]
        if isinstance(module, nn.Embedding) or not matrices or not isinstance(output, Tensor):
            return
        work = output[..., 0].numel() * sum(matrix.numel() for matrix in matrices)
        counts["forward"] += work
        counts["backward"] += work * output.requires_grad

    handle = register_module_forward_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def _collect(
    model: nn.Module, batches: list[Any], layers: tuple[str, ...], method: str
) -> tuple[Any, Counter[str], float]:
    """Return the statistics that a method reads, the products that they cost, and CPU seconds."""
    loss, start = predictive_loss() if needs_gradients(method) else None, time.process_time()
    with counting() as counts:
        statistics = collect_statistics(model, batches, layers, loss=loss, side="smaller", methods={method})
    return statistics, counts, time.process_time() - start


@pytest.mark.parametrize("name", SETS)
def test_costs(name: str, benchmark) -> None:
    p, task, model = load_set(name)
    batches = list(task.batches("train", p["batch_size"], samples=p["calibration_samples"], seed=0))
    dense = evaluate(model, task.batches("validation", p["batch_size"]), task.objective)["loss"]
    with counting() as one_pass:
        for batch in batches:
            compute_logits(model, batch)
    known = {method: _collect(model, batches, task.layers, method) for method in ("whitened", "two_sided")}
    dense_bytes = sum(4 * layer.weight.numel() for layer in find_linears(model, task.layers).values())

    def added(smaller: nn.Module) -> float:
        return evaluate(smaller, task.batches("validation", p["batch_size"]), task.objective)["loss"] - dense

    def run(keep: float, statistics: Any, **choices: Any) -> nn.Module:
        smaller = copy.deepcopy(model)
        compress(smaller, batches, keep, layers=task.layers, statistics=statistics, progress=False, **choices)
        return smaller

    for keep in SETS[name]:
        least, plain = None, {}  # bytes -> the loss that whitening adds
        for configuration, choices in CONFIGURATIONS.items():
            statistics, *before = known[choices["method"]]
            start = time.process_time()
            with counting() as counts:
                smaller = run(keep, statistics, **choices)
            seconds, size = before[1] + time.process_time() - start, weight_bytes(smaller)
            least = least or size
            if size not in plain:
                more = keep + (size - least) / dense_bytes
                plain[size] = added(run(more, known["whitened"][0], **CONFIGURATIONS["whitened"]))
            passes = [(before[0] + counts)[way] / one_pass["forward"] for way in ("forward", "backward")]
            loss = added(smaller)
            row(name, keep, configuration, *passes, seconds, size, loss, loss / plain[size])
    benchmark.pedantic(lambda: None, rounds=1)
