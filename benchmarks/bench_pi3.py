"""How much faster a compressed π³ of the published size is: `make bench`. The table goes to outputs/bench/pi3.csv.

Original against keep .2 of the decoder, of decoder and encoder, of all linear layers; random weights, since speed does not
depend on their values. On a GPU in bfloat16 at the published numbers of views, on a CPU one small view in float32.
"""

import pytest
import torch
from shared import recorder

from lowrank.pi3.flops import pi3_macs
from lowrank.pi3.model import Pi3, Pi3Config
from lowrank.pi3.speed import TARGETS, compare_speed, published_ranks, random_pi3

COLUMNS = ("views", "height", "width", "precision", "model", "forward_ms", "spread_ms", "frames_per_s", "speed_up")
row, table = recorder("pi3", *COLUMNS, "ceiling", "share_of_ceiling", "weights_mb", "peak_mb")
KEEP = 0.2
CASES = (
    [(views, 364, 700, "bf16") for views in (1, 2, 11, 30)] if torch.cuda.is_available() else [(1, 224, 224, "fp32")]
)


@pytest.mark.parametrize(("views", "height", "width", "precision"), CASES)
def test_speed(benchmark, views: int, height: int, width: int, precision: str) -> None:
    config, device = Pi3Config(), "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        architecture = Pi3(config)
    plans = {"original": {}} | {targets: published_ranks(architecture, targets, KEEP) for targets in TARGETS}
    made = {name: random_pi3(config, ranks, device) for name, ranks in plans.items()}
    macs = {
        name: sum(pi3_macs(config, views, height, width, saved=saved).values()) for name, (_, saved) in made.items()
    }
    models = {name: model for name, (model, _) in made.items()}
    for found in compare_speed(models, (1, views, 3, height, width), precision, warmup=1):
        ceiling = macs["original"] / macs[found["model"]]
        measured = [found[name] for name in COLUMNS[4:]]
        ratios = ceiling, found["speed_up"] / ceiling
        row(views, height, width, precision, *measured, *ratios, found["weights_mb"], found["peak_mb"])
    benchmark.pedantic(lambda: None, rounds=1)
