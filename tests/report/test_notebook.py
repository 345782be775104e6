"""What a notebook leaves behind: figures and tables by one name, claims, readings, provenance."""

import json
import re
from pathlib import Path

import matplotlib
import pandas as pd
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt

from lowrank.io.dependencies import ROOT
from lowrank.report.findings.registry import FINDINGS, Findings
from lowrank.report.findings.results import Claim
from lowrank.report.folders import outputs_folder
from lowrank.report.inference import mean_effect
from lowrank.report.notebook import TOLERANCE, Report
from lowrank.report.parameters import read_defaults
from lowrank.report.result_files import read_claims

TABLE = pd.DataFrame({"rank": [1, 2], "error": [0.1234567891, 1e-12]})


@pytest.fixture
def report(outputs: Path, without_findings: None) -> Report:
    return Report("01_whitening", read_defaults("01_whitening") | {"unrelated": 1})


def test_a_figure_and_its_table_share_a_name(report: Report) -> None:
    figure, _ = plt.subplots()
    with pytest.raises(ValueError, match="must be the name of a table written before the figure, got 'error_by_rank'"):
        report.figure(figure, "error_by_rank")
    report.table(TABLE, "error_by_rank", split="train")
    report.figure(figure, "error_by_rank")
    assert {p.name for p in report.folder.iterdir()} == {"error_by_rank.csv", "error_by_rank.png"}
    written = pd.read_csv(report.folder / "error_by_rank.csv")
    assert written.error.tolist() == [0.123457, 1e-12]
    assert list(written.columns) == ["rank", "error", "split"]
    assert set(written["split"]) == {"train"}


@pytest.mark.parametrize("name", ["../x", "a b", "claims", "run", "a/b"])
def test_names_are_plain(report: Report, name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        report.table(TABLE, name, split=None)


def plant(monkeypatch: pytest.MonkeyPatch) -> str:
    """Claims of the notebook that need no tables: one supported, one refuted, one inconclusive; returns a long text."""
    text = " and ".join(["one is one"] * 20)
    effects = {"clear/yes": [1.0, 1.1, 0.9], "clear/no": [-1.0, -1.1, -0.9], "noise": [1.0, -1.0, 0.1]}
    claims = [Claim(key, f"{key}: {text}", mean_effect(values), "nats") for key, values in effects.items()]
    readings = {"error_by_rank": lambda results: f"{len(results.table('error_by_rank'))} rows."}
    monkeypatch.setitem(FINDINGS, "01_whitening", Findings(lambda results: claims, readings))
    return text


def test_a_refuted_claim_is_a_result(report: Report, capsys, monkeypatch) -> None:
    text = plant(monkeypatch)
    shown = report.finish()
    said = capsys.readouterr().out.splitlines()
    assert said == [f"supported: clear/yes: {text}", f"refuted: clear/no: {text}", f"inconclusive: noise: {text}"]
    claims = read_claims(report.folder)
    assert list(claims.verdict) == ["supported", "refuted", "inconclusive"]
    assert claims.effect[0] == pytest.approx(1.0)
    about = json.loads((report.folder / "run.json").read_text())
    assert about["claims"] == {"supported": 1, "refuted": 1, "inconclusive": 1}
    assert text in str(shown._repr_html_())  # shown whole, in what JupyterLab draws


def test_a_reading_needs_its_table(report: Report, capsys, monkeypatch) -> None:
    plant(monkeypatch)
    with pytest.raises(ValueError, match="`name` must be the name of a table written before its reading"):
        report.reading("error_by_rank")
    report.table(TABLE, "error_by_rank", split="train")
    report.reading("error_by_rank")
    assert capsys.readouterr().out == "2 rows.\n"


def test_provenance_says_what_went_in(report: Report) -> None:
    with report.stage("training"):
        pass
    report.record(model="abc", dtype="float32")
    report.finish()
    about = json.loads((report.folder / "run.json").read_text())
    assert about["parameters"] == read_defaults("01_whitening")  # and nothing else of the namespace
    assert about["inputs"] == {"model": "abc", "dtype": "float32"}
    assert about["stages_s"].keys() == {"training"}
    assert about["versions"]["torch"]
    assert about["peak_memory_mb"]["host"] > 10
    assert {"git_commit", "git_dirty", "wall_s", "device", "cpu", "blas", "date", "lock"} <= about.keys()
    assert re.fullmatch("[0-9a-f]{16}", about["notebook_code"])
    assert any(library.startswith("torch ") for library in about["blas"])


def test_results_of_a_former_run_do_not_stay(report: Report) -> None:
    report.table(TABLE, "old", split=None)
    again = Report("01_whitening", report.parameters)
    assert list(again.folder.iterdir()) == []


def test_without_a_runner_results_are_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWRANK_OUTPUTS", raising=False)
    assert outputs_folder(draft=True) == ROOT / "outputs" / "draft"
    assert outputs_folder() == ROOT / "outputs" / "run"


def test_how_far_each_column_reproduces_is_said_in_run_json(report: Report) -> None:
    table = pd.DataFrame({"rank": [1], "loss": [0.5], "noise": [1e-9], "time_ms": [2.0]})
    report.table(table, "a", split="validation", measured=["time_ms"], unstable=["noise"], tolerance={"loss": 0.2})
    report.table(table, "b", split=None)
    report.finish()
    about = json.loads((report.folder / "run.json").read_text())
    assert about["tables"] == {
        "a": {"split": "validation", "tolerance": {"loss": 0.2}, "measured": ["time_ms"], "unstable": ["noise"]},
        "b": {"split": None, "tolerance": TOLERANCE, "measured": [], "unstable": []},
    }


@pytest.mark.parametrize("argument", ["measured", "unstable", "tolerance"])
def test_a_column_that_does_not_exist_is_an_error(report: Report, argument: str) -> None:
    value = {"time": 0.1} if argument == "tolerance" else ["time"]
    with pytest.raises(ValueError, match=r"`columns` must be columns of the table, got \['time'\]"):
        report.table(TABLE, "error_by_rank", split=None, **{argument: value})


def test_no_table_has_test_numbers_before_the_choices_are_frozen(report: Report) -> None:
    mixed = TABLE.assign(split=["validation", "test"])
    for table, split in ((TABLE, "test"), (mixed, None)):
        with pytest.raises(ValueError, match="`split` must be 'train' or 'validation' before `freeze`, got 'test'"):
            report.table(table, "quality", split=split)
    assert list(report.folder.iterdir()) == []
    frozen = report.freeze()
    report.table(mixed, "quality", split=None)
    report.finish()
    assert json.loads((report.folder / "run.json").read_text())["frozen"] == frozen
    with pytest.raises(ValueError, match="`split` must be among"):
        report.table(TABLE, "quality", split="held out")


def test_frozen_choices_are_the_parameters_and_the_code(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = read_defaults("01_whitening")
    frozen = Report("01_whitening", values).freeze()
    assert re.fullmatch("[0-9a-f]{16}", frozen)
    assert Report("01_whitening", values | {"set_name": "another"}).freeze() == frozen
    assert Report("01_whitening", values | {"seed": 7}).freeze() != frozen
    monkeypatch.setattr("lowrank.report.notebook.hash_code", lambda paths: "0" * 16)
    assert Report("01_whitening", values).freeze() != frozen
