"""`lowrank prune`: the zeros of the library, in a folder that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from lowrank import layer_scores, prune
from lowrank.calibration.collect import collect_statistics
from lowrank.cli.main import main
from lowrank.nn.targets import find_linears
from lowrank.selection.scores import Scores
from lowrank.tasks.calibration_data import calibration_batches
from lowrank.tasks.named_data import DataSource
from lowrank.tasks.named_model import load_named
from lowrank.tasks.text import train_tokenizer

TEXTS = [f"row {i} of {i * i} words that a model may read, {i % 7} times over" for i in range(40)]
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
DRAW = ["--samples", "8", "--length", "24", "--batch-size", "4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a Llama and its tokenizer, texts, and scores of the model."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 280, sentence=False)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    (home / "texts.txt").write_text("\n".join(TEXTS), encoding="utf8")
    layer_scores(home / "model", progress=False).save(home / "scores.json")
    return home


def pruned(home: Path, ratios, method: str = "magnitude", **options) -> dict[str, torch.Tensor]:
    """The weights after `prune` of the library."""
    named = load_named(str(home / "model"))
    statistics = None
    if method == "wanda":
        source = DataSource(str(home / "texts.txt"))
        statistics = collect_statistics(named.model, calibration_batches(named, source, 8, length=24, batch_size=4))
    prune(named.model, ratios, method, statistics, **options)
    return named.model.state_dict()


@pytest.mark.filterwarnings("ignore::lowrank.calibration.collect.FewTokensWarning")
def test_a_model_is_pruned_as_by_the_library_and_anyone_loads_it(home, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    words = [
        "prune",
        str(home / "model"),
        "--data",
        str(home / "texts.txt"),
        *DRAW,
        "--scores",
        str(home / "scores.json"),
    ]
    assert main([*words, "--sparsity", "0.5", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "of 17,408 weights are zero (50.0%)" in said
    assert said.splitlines()[-1] == f"wrote {out}"
    again = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    expected = pruned(home, Scores.load(home / "scores.json").ratios_at(0.5), "wanda")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in again)
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == len(load_named(str(home / "model")).processor)


@pytest.mark.parametrize(
    ("words", "ratios", "options"),
    [
        (
            ["--sparsity", "0.25", "--per", "matrix", "--include", r".*\.q_proj"],
            0.25,
            {"per": "matrix", "layers": [r".*\.q_proj"]},
        ),
        (["--pattern", "2:4"], None, {"pattern": (2, 4)}),
        (["--scores", "{home}/scores.json"], {}, {}),
    ],
)
def test_shares_and_patterns_without_data(words, ratios, options, home, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    words = [word.format(home=home) for word in words]
    assert main(["prune", str(home / "model"), "--method", "magnitude", *words, "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    ratios = Scores.load(home / "scores.json").ratios if ratios == {} else ratios
    expected = pruned(home, ratios, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    zeros = {name: int((layer.weight == 0).sum()) for name, layer in find_linears(model).items()}
    assert {row["layer"]: row["pruned"] for row in said["layers"]} == {name: n for name, n in zeros.items() if n}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sparsity", "0.5"], "`data` must be given for this method, got 'wanda'"),
        (["--method", "magnitude"], "`sparsity` must be given, or --scores"),
        (
            ["--method", "magnitude", "--sparsity", "0.5", "--pattern", "2:4"],
            "or --pattern alone, got ['pattern', 'sparsity']",
        ),
        (["--method", "magnitude", "--pattern", "2/4"], "`pattern` must be N:M, such as 2:4, got '2/4'"),
        (["--method", "magnitude", "--pattern", "4:2"], "`pattern` must be (n, m) with 1 <= n < m"),
        (["--method", "magnitude", "--sparsity", "1"], "`ratios` must be in [0, 1), got 1.0"),
        (
            ["--method", "none", "--sparsity", "0.5", "--data", "{home}/texts.txt"],
            "`method` must be one of ['magnitude', 'wanda']",
        ),
        (
            ["--method", "magnitude", "--scores", "{home}/scores.json", "--include", "a"],
            "`include` must be left out with --scores",
        ),
        (["--method", "magnitude", "--scores", "{home}/texts.txt"], "texts.txt"),
        (["--method", "magnitude", "--sparsity", "0.5", "--include", "none"], "'none'"),
    ],
)
def test_wrong_options_are_one_line_and_write_nothing(words, said, home, tmp_path, capsys) -> None:
    words = [word.format(home=home) for word in words]
    assert main(["prune", str(home / "model"), "--out", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr()
    assert err.out == ""
    assert err.err.startswith("error: ")
    assert said in err.err
    assert err.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_named_before_the_model_is_loaded(tmp_path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["prune", "none", "--method", "magnitude", "--sparsity", "0.5", "--out", str(tmp_path)]) == 2
    assert f"`--out` must be a new or empty folder, got '{tmp_path}'" in capsys.readouterr().err
