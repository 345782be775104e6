"""Which rule for ranks wins where, on the small models that come with the library: `make bench`; outputs/bench/ranks.csv.

Two-sided, pivoted, centred where layers have biases. Rules choose on training samples that the statistics have not seen; the
added loss is that of the validation split. A budget below the first block has no row for 'first_dense'. `seconds` are those of
the choice alone, decompositions apart, beside whatever else the machine does.
"""

import time

import pytest
from sets import load_set
from shared import recorder

from lowrank import Configuration
from lowrank.tasks.baseline import load_calibration
from lowrank.tasks.sweep import Sweep, SweepConfig

COLUMNS = ("set", "draw", "keep", "rule", "keep_targeted", "added_loss", "chosen", "models", "seconds")
row, table = recorder("ranks", *COLUMNS)
RULES = ("uniform", "first_dense", "linear", "spectrum", "measured", "depth")
SETS = {  # keeps that cost something, and probe samples: a text has a target per token, an image or a class only one
    "digits-vit": ((0.5, 0.3, 0.2, 0.1), 128),
    "docs-llama": ((0.5, 0.3, 0.2), 32),
    "docs-bert": ((0.1, 0.05, 0.03), 64),
}


def sweeps(name: str, probes: int, draws: tuple[int, ...]):
    """A sweep for each draw of calibration samples of a set's model."""
    p, task, model = load_set(name)
    drawn = dict(samples=p["calibration_samples"], batch_size=p["batch_size"])
    for draw in draws:
        statistics = load_calibration(task, model, seed=draw, gradients="sampled", **drawn)
        config = SweepConfig(drawn["samples"], probe_samples=probes, batch_size=min(probes, p["batch_size"]), seed=draw)
        yield draw, Sweep(model, task, statistics, config)


@pytest.mark.parametrize("name", SETS)
def test_rules(name: str, benchmark) -> None:
    keeps, probes = SETS[name]
    for draw, sweep in sweeps(name, probes, (0, 1)):
        sweep.spectra("two_sided", sweep.biased)  # decomposes
        for rule in RULES:
            how = Configuration("two_sided", "pivoted", sweep.biased, rule)
            for keep in keeps:
                if not sweep.affords(how, keep):
                    continue
                tried, start = len(sweep.allocator.trials), time.perf_counter()
                ranks = sweep.ranks(how, keep)
                seconds = time.perf_counter() - start
                found, trials = sweep.quality(sweep.compressed(how, ranks)), sweep.allocator.trials[tried:]
                best = min(trials, key=lambda trial: trial["divergence"], default={})
                chosen = " ".join(f"{key}={best[key]:g}" for key in ("alpha", "gamma", "steepness") if key in best)
                row(name, draw, keep, rule, found["keep_targeted"], found["added_loss"], chosen, len(trials), seconds)
    benchmark.pedantic(lambda: None, rounds=1)
