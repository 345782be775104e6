"""What retargeting leaves of the added loss, and what more calibration or other ranks would change: `make bench`;
outputs/bench/retarget.csv.

Two-sided, pivoted, centred where layers have biases. `share` is the added loss over that of plain whitening with factors and
uniform ranks from as many calibration samples; `share_seen` the same on the calibration samples themselves, so that the
difference is what statistics of few samples cost. `measured_depth` is no rule of the library: each layer's spectrum is scaled by
what truncating it alone is measured to cause, then by the best of the depth terms.
"""

import time
from dataclasses import replace

import pytest
from sets import load_set
from shared import recorder

from lowrank import Configuration
from lowrank.compression.allocation import DEPTH_TERMS
from lowrank.compression.configuration import Retargeting
from lowrank.compression.depth import block_positions, depth_weights
from lowrank.tasks.baseline import load_calibration
from lowrank.tasks.evaluation import evaluate
from lowrank.tasks.sweep import Sweep, SweepConfig

COLUMNS = ("set", "samples", "keep", "ranks", "retargeted", "share", "share_seen", "seconds")
row, table = recorder("retarget", *COLUMNS)
RULES = ("spectrum", "measured", "depth", "measured_depth")
SETS = {  # keeps, and multiples of the set's calibration samples; the last needs the Hub or a cache of it
    "docs-llama": ((0.5, 0.3), (1, 2)),
    "digits-vit": ((0.2, 0.1), (1,)),
    "sst2-minilm": ((0.4, 0.2), (1,)),
}
PLAIN = Configuration("whitened")
SEEN = 256  # calibration samples to evaluate on


def measured_depth(sweep: Sweep, how: Configuration, keep: float) -> dict[str, int]:
    """Ranks by spectra that both measured divergences and depth scale."""
    known, positions = sweep.allocator, block_positions(sweep.shapes)
    candidates = []
    for alpha, gamma in DEPTH_TERMS:
        by_block = depth_weights(max(positions.values()) + 1, alpha, gamma).tolist()
        weights = {name: known.scales[name] * by_block[positions[name]] for name in sweep.shapes}
        spectra = known.spectra("two_sided", how.centre)
        candidates.append(({"gamma": gamma}, known.spend(how, keep, spectra=spectra, weights=weights)))
    return known.best(how, keep, candidates)


@pytest.mark.parametrize(("name", "more"), [(name, more) for name, (_, many) in SETS.items() for more in many])
def test_what_is_left(name: str, more: int, benchmark) -> None:
    p, task, model = load_set(name)
    samples = more * p["calibration_samples"]
    drawn = dict(samples=samples, batch_size=p["batch_size"], seed=0)
    statistics = load_calibration(task, model, gradients="sampled", **drawn)
    probes = p.get("probe_samples", 128)
    sweep = Sweep(model, task, statistics, SweepConfig(samples, probe_samples=probes, batch_size=p["batch_size"]))
    seen = list(task.batches("train", p["batch_size"], samples=SEEN, seed=0))

    def added(smaller) -> tuple[float, float]:
        losses = [evaluate(one, seen, task.objective)["loss"] for one in (smaller, model)]
        return sweep.quality(smaller)["added_loss"], losses[0] - losses[1]

    for keep in SETS[name][0]:
        plain = added(sweep.compressed(PLAIN, sweep.ranks(PLAIN, keep)))
        for rule in RULES:
            how = Configuration("two_sided", "pivoted", sweep.biased, "spectrum" if rule == "measured_depth" else rule)
            start = time.perf_counter()
            ranks = measured_depth(sweep, how, keep) if rule == "measured_depth" else sweep.ranks(how, keep)
            for again in (False, True):
                one = replace(how, retarget=Retargeting()) if again else how
                found = added(sweep.compressed(one, ranks))
                seconds = time.perf_counter() - start
                row(name, samples, keep, rule, again, found[0] / plain[0], found[1] / plain[1], seconds)
    benchmark.pedantic(lambda: None, rounds=1)
