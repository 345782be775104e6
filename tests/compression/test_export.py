"""Compressed models leave the library: multiplied out, exported, compiled and as ONNX graphs, with equal outputs."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from families import compressed, made, outputs, relative
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import LlamaForCausalLM

from lowrank.compression.replace import fold
from lowrank.nn.batches import compute_logits
from lowrank.nn.low_rank import FACTORED_LAYERS, LowRankLinear
from lowrank.nn.surgery import replace_module

CASES = [(family, storage) for family in ("llama", "bert", "vit") for storage in FACTORED_LAYERS]
ONNX_CASES = [case for case in CASES if case not in [("llama", "pivoted"), ("bert", "factors")]]  # each takes seconds
BLOCKS = {"llama": "model.layers", "bert": "bert.encoder.layer", "vit": "blocks"}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]


class Logits(nn.Module):
    """A model as a function of one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, use_cache=False).logits if hasattr(self.model, "config") else self.model(x)


@functools.cache
def first_block(family: str, storage: str) -> tuple[Logits, list[Tensor]]:
    """A compressed model cut to one block, and inputs of other sizes than those it is exported with."""
    model, batches = compressed(family, storage)
    blocks: Any = model.get_submodule(BLOCKS[family])
    del blocks[1:]
    first = batches[0]["input_ids"] if isinstance(batches[0], dict) else batches[0]
    assert isinstance(first, Tensor)
    return Logits(model), [first[:2], first[:5, :7] if first.dim() == 2 else first[:5]]


@functools.cache
def export(family: str, storage: str) -> ExportedProgram:
    model, (example, _) = first_block(family, storage)
    free = {0: Dim.DYNAMIC} if family == "vit" else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}  # an image has one size
    return torch.export.export(model, (example,), dynamic_shapes=(free,))


@pytest.mark.parametrize(("family", "storage"), CASES)
def test_an_exported_model_takes_any_batch_and_length(family: str, storage: str) -> None:
    model, inputs = first_block(family, storage)
    program = export(family, storage)
    with torch.no_grad():
        for x in inputs:
            assert relative(program.module()(x), model(x)) < 1e-5
    assert sum(t.numel() for t in program.state_dict.values()) <= sum(t.numel() for t in model.state_dict().values())


@pytest.mark.parametrize(("family", "storage"), ONNX_CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the exporter, about names of axes
def test_an_onnx_graph_takes_any_batch_and_length(family: str, storage: str, tmp_path: Path) -> None:
    model, inputs = first_block(family, storage)
    torch.onnx.export(export(family, storage), (), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for x in inputs:
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected = model(x).numpy()
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("family", "storage"), [("llama", "factors"), ("bert", "pivoted")])
def test_a_model_compiles_into_one_graph(family: str, storage: str) -> None:
    model, (x, _) = first_block(family, storage)
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative(torch.compile(model, backend="eager", fullgraph=True)(x), model(x)) < 1e-5


@pytest.mark.parametrize("storage", FACTORED_LAYERS)
def test_a_compiled_model_trains(storage: str) -> None:
    model, (x, _) = first_block("vit", storage)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    by_graph, by_call = (torch.autograd.grad(f(x).square().sum(), [*model.parameters()]) for f in (compiled, model))
    for one, other in zip(by_graph, by_call, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_model_that_asks_for_a_dtype_compiles_into_one_graph() -> None:
    """T5 reads `wo.weight.dtype` in every pass."""
    model, batches = compressed("t5")
    del model.encoder.block[1:], model.decoder.block[1:]
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(**batches[0], use_cache=False).logits
        assert relative(found, compute_logits(model, batches[0])) < 1e-5


@pytest.mark.parametrize(("family", "storage"), CASES)
def test_a_folded_model_is_one_of_plain_layers(family: str, storage: str) -> None:
    model, batches = compressed(family, storage)
    expected, wanted = outputs(model, batches), made(family)[0].state_dict()
    plain = fold(model)
    assert {name: t.shape for name, t in plain.state_dict().items()} == {name: t.shape for name, t in wanted.items()}
    assert not any(isinstance(part, tuple(FACTORED_LAYERS.values())) for part in plain.modules())
    assert relative(outputs(plain, batches), expected) < 1e-5


def test_a_folded_model_is_a_checkpoint_of_its_architecture(tmp_path: Path) -> None:
    model, batches = compressed("llama")
    expected = outputs(model, batches)
    fold(model).save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    assert relative(outputs(LlamaForCausalLM.from_pretrained(tmp_path), batches), expected) < 1e-5


def test_factors_as_two_plain_layers_compute_the_same() -> None:
    model, batches = compressed("bert", "factors")
    expected = outputs(model, batches)
    parts = {name: part for name, part in model.named_modules() if isinstance(part, LowRankLinear)}
    assert parts
    for name, part in parts.items():
        replace_module(model, name, nn.Sequential(part.right, part.left))
    assert torch.equal(outputs(model, batches), expected)
