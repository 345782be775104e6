"""The description of a folder: counted from shapes, equal to the counts of the models themselves."""

import copy
from pathlib import Path

import pytest
import torch
import transformers

from lowrank import compress, parameter_counts, save_compressed
from lowrank.compression.description import describe_folder
from lowrank.compression.quantize import quantize

SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_the_counts_are_those_of_the_models(storage, keep, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, attention_bias=True))
    model = copy.deepcopy(dense)
    result = compress(model, keep=keep, method="svd", storage=storage, progress=False)
    save_compressed(model, tmp_path / "small")
    content = describe_folder(tmp_path / "small")
    counts = parameter_counts(model, dense, list(result.ranks))
    assert {name: content[name] for name in counts} == counts
    assert content["layers"] == 14
    assert content["ranks"] == [min(result.ranks.values()), max(result.ranks.values())]
    assert (content["base"], content["methods"]) == ("LlamaForCausalLM (transformers)", ["svd"])
    assert content["bytes"] == (tmp_path / "small" / "model.safetensors").stat().st_size
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= content["dense"].keys()
    replaced = {name for name, row in zip(result.ranks, result.layers, strict=True) if row["storage"] != "dense"}
    assert len(content["dense"]) == 2 + 14 - len(replaced)


def test_a_folder_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`folder` must be a file written by save_compressed"):
        describe_folder(tmp_path)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_counts_what_it_counted_before(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, attention_bias=True))
    compress(model, keep=0.4, method="svd", progress=False)
    floats = save_compressed(model, tmp_path / "floats")
    quantize(model, bits)
    codes = save_compressed(model, tmp_path / "codes")
    before, after = (describe_folder(tmp_path / name) for name in ("floats", "codes"))
    counts = [name for name in before if name.endswith("parameters") or name.startswith("keep")]
    assert [after[name] for name in counts] == [before[name] for name in counts]
    assert codes["bytes"] < floats["bytes"]
