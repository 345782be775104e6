"""`lowrank info`: a table, the same as JSON, and one line for a folder of another kind."""

import json
from pathlib import Path

import pytest
import transformers

from lowrank import compress, save_compressed
from lowrank.cli.main import main
from lowrank.compression.description import describe_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    compress(model, keep=0.5, method="svd", progress=False)
    save_compressed(model, path := tmp_path_factory.mktemp("info") / "small")
    return path


def test_the_table_says_what_the_folder_holds(folder, capsys) -> None:
    assert main(["info", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM (transformers)" in said
    assert "(50." in said or "(49." in said
    assert "lm_head.weight" in said


def test_json_is_the_description(folder, capsys) -> None:
    assert main(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe_folder(folder)


@pytest.mark.parametrize("content", [None, "{", '{"format": "other/1"}'])
def test_a_folder_of_another_kind_is_one_line(content, tmp_path, capsys) -> None:
    if content is not None:
        (tmp_path / "lowrank.json").write_text(content)
    assert main(["info", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: `folder` must ")
    assert said.err.count("\n") == 1
