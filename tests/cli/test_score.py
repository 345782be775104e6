"""`lowrank score` and `lowrank assign`: the results of the library as files and tables."""

import json

import pytest
import torch
import transformers

from lowrank import ScoringConfig, assign_layers, layer_scores
from lowrank.cli import score
from lowrank.cli.assign import read_budget
from lowrank.cli.main import main, make_parser
from lowrank.selection.scores import Scores

SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scores(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    layer_scores(model, progress=False).save(path)
    return str(path)


def test_the_file_is_that_of_the_library(model, scores, tmp_path, capsys) -> None:
    out = tmp_path / "scores.json"
    assert main(["score", model, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    with open(scores, "rb") as expected:
        assert out.read_bytes() == expected.read()
    assert [line.split()[0] for line in said.splitlines()[1:4]] == [f"model.layers.{i}" for i in range(3)]
    assert "21 layers, 26,112 parameters, " in said
    assert said.splitlines()[-1] == f"wrote {out}"


def test_options_reach_the_rule(model, tmp_path, capsys) -> None:
    out = tmp_path / "scores.json"
    words = ["--metric", "stable_rank", "--prunable", "smaller", "--mapping", "layer_wise", "--sparsity", "0.5"]
    assert main(["score", model, "--out", str(out), *words, "--layers", r".*\.q_proj", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 3
    config = ScoringConfig(prunable="smaller", mapping="layer_wise", sparsity=0.5)
    assert (
        Scores.load(out).layers
        == layer_scores(model, "stable_rank", config, layers=[r".*\.q_proj"], progress=False).layers
    )
    options = make_parser().parse_args(["score", "a", "--out", "b"])
    assert ScoringConfig(**{name: getattr(options, name) for name in score.CONFIG}) == ScoringConfig()


def test_the_assignment_is_that_of_the_library(scores, capsys) -> None:
    words = ["assign", scores, "--budgets", "20%", "3000", "0"]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    read = Scores.load(scores)
    budgets = [int(0.2 * 26112), 3000, 0]
    found = assign_layers(read.values, read.costs, budgets)
    assert said["score"] == pytest.approx(found.total)
    assert said["optimal"]
    for row, interval, budget in zip(said["devices"], found.intervals, budgets, strict=True):
        assert row["budget"] == budget >= row["parameters"]
        names = read.names[interval[0] : interval[1] + 1] if interval else []
        assert (row["first"], row["last"], row["layers"]) == (
            *(names or ["", ""])[:: max(len(names) - 1, 1)][:2],
            len(names),
        )
    assert main(words) == 0
    assert "; no assignment is better" in capsys.readouterr().out


def test_budgets_are_parameters_or_shares() -> None:
    assert [read_budget(text, 1000) for text in ("7", "0", "20%", "12.55%", "100%")] == [7, 0, 200, 125, 1000]
    for text in ("", "a", "-1", "1.5", "101%", "-1%", "nan%", "%"):
        with pytest.raises(ValueError, match="`--budgets` must be whole numbers >= 0 or shares such as 20%, got"):
            read_budget(text, 1000)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["score", "{model}", "--out", "{out}", "--metric", "none"], "`metric` must be one of ["),
        (["score", "{model}", "--out", "{out}", "--metric", "entropy"], "`prunable` must be 'larger' or 'smaller'"),
        (["score", "{model}", "--out", "{out}", "--sparsity", "1"], "`sparsity` must be in [0, 1), got 1.0"),
        (["score", "./none", "--out", "{out}"], "`model` must be a folder, a safetensors file or a Hub name"),
        (["assign", "{model}/config.json", "--budgets", "1"], "`path` must have format 'lowrank.scores/1'"),
        (["assign", "./none.json", "--budgets", "1"], "none.json"),
        (["assign", "{scores}", "--budgets", "a"], "`--budgets` must be"),
        (["assign", "{scores}", "--budgets", "1", "--order", "any"], "`order` must be 'free' or 'fixed'"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(model, scores, words, said, tmp_path, capsys) -> None:
    places = {"model": model, "scores": scores, "out": tmp_path / "out.json"}
    assert main([word.format(**places) for word in words]) == 2
    err = capsys.readouterr()
    assert err.out == ""
    assert err.err.startswith("error: ")
    assert said in err.err
    assert err.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
