"""`lowrank ranks`: the file is that of the library, and wrong input writes nothing."""

import copy
import json

import pytest
import torch
import transformers

from lowrank import RankConfig, RankRule, delta_spectra
from lowrank.cli import ranks
from lowrank.cli.main import main, make_parser
from lowrank.io.weights import hash_source

SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    """Folders of a model, and of the same with all attention weights changed by rank 3."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "self_attn" in name:
                weight += torch.randn(16, 3) @ torch.randn(3, 16) / 10
    home = tmp_path_factory.mktemp("pair")
    base.save_pretrained(home / "base")
    tuned.save_pretrained(home / "tuned")
    return str(home / "base"), str(home / "tuned")


def test_the_file_is_that_of_the_library_and_gives_the_adapters(pair, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "ranks.json"
    assert main(["ranks", *pair, "--out", str(out), "--threshold", "0.99", "--min-rank", "1", "--smoothing", "0"]) == 0
    said = capsys.readouterr().out
    assert "q_proj" in said
    assert "8 modules, 768 parameters of adapters, 37.50% of the weights that changed; 6 weights did not change" in said
    rule = RankRule(threshold=0.99, min_rank=1, smoothing=0.0)
    hashes = {"base": hash_source(pair[0]), "tuned": hash_source(pair[1])}
    found = RankConfig.load(out)
    assert found == RankConfig.from_spectra(delta_spectra(*pair, progress=False), rule, model=pair[0], hashes=hashes)
    assert set(found.module_ranks.values()) == {3}  # as was put in
    model = transformers.LlamaForCausalLM.from_pretrained(pair[0])
    assert found.lora_config(model).r == 3


def test_json_has_the_totals(pair, tmp_path, capsys) -> None:
    out = tmp_path / "ranks.json"
    assert main(["ranks", *pair, "--out", str(out), "--parameters", "500", "--layers", r".*\.q_proj", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    config = RankConfig.load(out)
    assert (said["modules"], said["parameters"], said["file"]) == (2, config.parameters, str(out))
    assert said["parameters"] <= 500
    assert [row["type"] for row in said["types"]] == ["q_proj"]


def test_options_have_the_defaults_of_the_rule() -> None:
    options = make_parser().parse_args(["ranks", "a", "b", "--out", "c"])
    assert RankRule(**{name: getattr(options, name) for name in ranks.RULE}) == RankRule()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", "2"], "`threshold` must be in (0, 1], got 2.0"),
        (["--per", "layer"], "`per` must be 'module' or 'type', got 'layer'"),
        (["--layers", "none"], "must have weights in common that `layers` names"),
    ],
)
def test_wrong_options_are_named_and_write_nothing(pair, words, said, tmp_path, capsys) -> None:
    assert main(["ranks", *pair, "--out", str(tmp_path / "out.json"), *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_equal_checkpoints_and_missing_ones_are_named(pair, tmp_path, capsys) -> None:
    assert main(["ranks", pair[0], pair[0], "--out", str(tmp_path / "out.json")]) == 2
    assert "must have a layer that changed, got none" in capsys.readouterr().err
    assert main(["ranks", pair[0], str(tmp_path / "none"), "--out", str(tmp_path / "out.json")]) == 2
    assert "`tuned` must be a folder, a safetensors file or a Hub name" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_named_before_anything_is_read(pair, tmp_path, capsys) -> None:
    assert main(["ranks", "none", "none", "--out", str(tmp_path)]) == 2
    assert f"`--out` must be a file, not a folder, got '{tmp_path}'" in capsys.readouterr().err
    (file := tmp_path / "file").write_text("")
    assert main(["ranks", "none", "none", "--out", str(file / "ranks.json")]) == 2
    assert "`--out` must be in a folder that can be written" in capsys.readouterr().err
