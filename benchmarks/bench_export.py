"""What a compressed model weighs and costs once it has left the library: `make bench`; outputs/bench/export.csv.

Half of the parameters of the linear layers in blocks are kept. `size` is bytes on disk over those of the dense safetensors file,
`time` the time of a forward pass over that of the dense model run by torch; both ratios are of one process, whose forms take
turns. A graph holds one set of weights and its own description, which weighs more the smaller the model is.
"""

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from recipes import bert, llama
from safetensors.torch import save_model
from shared import ratio, recorder
from torch import Tensor, nn

from lowrank.compression.compress import compress
from lowrank.compression.replace import fold
from lowrank.nn.profiling import time_in_turns

row, table = recorder("export", "model", "form", "bytes", "size", "time", "spread")
KEEP = 0.5
REPEATS = 5


class Outputs(nn.Module):
    """A model as a function of one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, use_cache=False)[0] if hasattr(self.model, "config") else self.model(x)


def texts() -> Tensor:
    return torch.randint(0, 1000, (4, 128))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Llama 512, 2 layers, 4 x 128 tokens": (lambda: llama(512, 2, vocabulary=1000), texts),
    "BERT 512, 2 layers, 4 x 128 tokens": (lambda: bert(512, 2), texts),
    "ViT 384, 2 layers, 8 x 65 tokens": (
        lambda: timm.models.VisionTransformer(img_size=64, patch_size=8, embed_dim=384, depth=2, num_heads=6),
        lambda: torch.randn(8, 3, 64, 64),
    ),
}


def onnx_session(model: nn.Module, x: Tensor, path: Path) -> tuple[Callable[[], Any], int]:
    """A call of the graph by onnxruntime, on as many threads as torch has, and the bytes of its files."""
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would count as CPU time
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)[0], sum(file.stat().st_size for file in path.parent.iterdir())


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_forms_of_a_compressed_model(case: str, benchmark, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, sample = MODELS[case]
    dense, x = build().eval(), sample()
    forms = {"dense": dense}
    for name, storage in (("factors", "factors"), ("pivots", "pivoted")):
        forms[name] = copy.deepcopy(dense)
        compress(forms[name], keep=KEEP, method="svd", storage=storage, allocation="uniform", progress=False)
    forms["factors, folded"] = fold(copy.deepcopy(forms["factors"]))
    calls: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}
    for name, model in forms.items():
        save_model(model, str(tmp_path / "model.safetensors"))
        calls[name], sizes[name] = partial(Outputs(model), x), (tmp_path / "model.safetensors").stat().st_size
    program = torch.export.export(Outputs(forms["factors"]), (x,))
    torch.export.save(program, tmp_path / "model.pt2")
    calls["factors, exported"] = partial(program.module(), x)
    sizes["factors, exported"] = (tmp_path / "model.pt2").stat().st_size
    for name in ("dense", "factors", "pivots"):
        (folder := tmp_path / name).mkdir()
        key = f"{name}, ONNX"
        calls[key], sizes[key] = onnx_session(Outputs(forms[name]), x, folder / "model.onnx")
        with torch.no_grad():
            np.testing.assert_allclose(calls[key](), calls[name](), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        seconds = time_in_turns(calls, repeats=REPEATS, warmup=1, clock=time.process_time)
    for name in calls:
        row(case, name, sizes[name], sizes[name] / sizes["dense"], *ratio(seconds[name], seconds["dense"]))
    benchmark.pedantic(lambda: None, rounds=1)
