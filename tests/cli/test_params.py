"""`lowrank params` and `lowrank run`: a flat file that papermill reads as the set says, and the runner of the report."""

import json
from pathlib import Path

import pytest
import yaml

from lowrank.cli.main import main
from lowrank.report.parameters import jobs, read_parameters
from lowrank.report.yaml_files import read_yaml


@pytest.mark.parametrize("name", ["digits-vit", "docs-llama", "imagenet-vit", "pi3", "wikitext2-qwenvl7b"])
def test_the_flat_file_has_the_values_of_the_set_in_both_readers(name: str, tmp_path: Path, capsys) -> None:
    for job in jobs([name]):
        assert main(["params", *job]) == 0
        (file := tmp_path / "flat.yaml").write_text(capsys.readouterr().out, encoding="utf8")
        values = read_parameters(*job)
        assert yaml.safe_load(file.read_text(encoding="utf8")) == values  # as papermill does
        assert read_yaml(file) == values


def test_json_and_variants(capsys) -> None:
    assert main(["params", "digits-vit@seed=1", "01_whitening", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_parameters("digits-vit@seed=1", "01_whitening")


@pytest.mark.parametrize("command", ["params", "run"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none", "01_whitening"], "`set` must be one of ['cifar10-dinov2', "),
        (["digits-vit", "99_none"], "`notebook` must be one of ['01_whitening', "),
        (["digits-vit@seed=a", "01_whitening"], "`seed` of '01_whitening' must be of type int"),
    ],
)
def test_wrong_names_are_one_line(command, words, said, outputs, capsys) -> None:
    assert main([command, *words]) == 2
    err = capsys.readouterr()
    assert err.out == ""
    assert err.err.startswith("error: ")
    assert said in err.err
    assert err.err.count("\n") == 1
    assert not outputs.exists()


def test_a_run_is_that_of_the_report(outputs, monkeypatch, capsys) -> None:
    monkeypatch.setattr("lowrank.report.run.run_notebook", lambda *job: outputs.joinpath(*job))
    assert main(["run", "digits-vit", "01_whitening"]) == 0
    assert capsys.readouterr().out == f"{outputs / 'digits-vit' / '01_whitening'}\n"
