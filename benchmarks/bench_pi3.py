"""How much faster a compressed π³ of the published size is: `make bench`. The table goes to outputs/bench/pi3.csv.

Original against keep .2 of the decoder, of decoder and encoder, of all linear layers; random weights, since speed does not
depend on their values. On a GPU in bfloat16 at the published numbers of views, on a CPU one small view in float32.
"""

import pytest
import torch
from recipes import PI3, pi3_rows
from shared import recorder

from lowrank.pi3.model import Pi3Config

row, table = recorder("pi3", *PI3)
CASES = (
    [(views, 364, 700, "bf16") for views in (1, 2, 11, 30)] if torch.cuda.is_available() else [(1, 224, 224, "fp32")]
)


@pytest.mark.parametrize(("views", "height", "width", "precision"), CASES)
def test_speed(benchmark, views: int, height: int, width: int, precision: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for found in pi3_rows(Pi3Config(), (views, height, width), precision, device):
        row(*found.values())
    benchmark.pedantic(lambda: None, rounds=1)
