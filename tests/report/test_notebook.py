"""The report room: figures and tables by one name, claims, provenance."""

import json
from pathlib import Path

import matplotlib
import pandas as pd
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt

from lowrank.io.dependencies import ROOT
from lowrank.report.folders import outputs_folder
from lowrank.report.notebook import Report
from lowrank.report.parameters import read_defaults

TABLE = pd.DataFrame({"rank": [1, 2], "error": [0.1234567891, 1e-12]})


@pytest.fixture
def report(outputs: Path) -> Report:
    return Report("01_whitening", read_defaults("01_whitening") | {"unrelated": 1})


def test_a_figure_and_its_table_share_a_name(report: Report) -> None:
    figure, _ = plt.subplots()
    with pytest.raises(ValueError, match="must be the name of a table written before the figure, got 'error_by_rank'"):
        report.figure(figure, "error_by_rank")
    report.table(TABLE, "error_by_rank")
    report.figure(figure, "error_by_rank")
    assert {p.name for p in report.folder.iterdir()} == {"error_by_rank.csv", "error_by_rank.png"}
    assert pd.read_csv(report.folder / "error_by_rank.csv").error.tolist() == [0.123457, 1e-12]


@pytest.mark.parametrize("name", ["../x", "a b", "claims", "run", "a/b"])
def test_names_are_plain(report: Report, name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        report.table(TABLE, name)


def test_a_failed_claim_is_a_result(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    report.claim("one is one", True)
    report.claim("one is two", False)
    assert capsys.readouterr().out == "holds: one is one\nFAILS: one is two\n"
    report.finish()
    claims = pd.read_csv(report.folder / "claims.csv")
    assert claims[["claim", "holds"]].to_dict("list") == {"claim": ["one is one", "one is two"], "holds": [True, False]}
    assert json.loads((report.folder / "run.json").read_text())["claims"] == {"held": 1, "failed": 1}


def test_claims_are_shown_whole(report: Report) -> None:
    text = " and ".join(["one is one"] * 20)
    report.claim(text, True)
    assert text in str(report.finish()._repr_html_())  # what JupyterLab draws


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
    assert {"git_commit", "git_dirty", "wall_s", "device", "python", "platform"} <= about.keys()


def test_results_of_a_former_run_do_not_stay(report: Report) -> None:
    report.table(TABLE, "old")
    again = Report("01_whitening", report.parameters)
    assert list(again.folder.iterdir()) == []


def test_without_a_runner_results_are_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWRANK_OUTPUTS", raising=False)
    assert outputs_folder(draft=True) == ROOT / "outputs" / "draft"
    assert outputs_folder() == ROOT / "outputs"


def test_what_rests_on_times_is_said_in_run_json(report: Report) -> None:
    report.table(pd.DataFrame({"rank": [1], "time_ms": [2.0]}), "times_by_rank", measured=["time_ms"])
    report.claim("quick", True, measured=True)
    report.claim("exact", True)
    report.finish()
    about = json.loads((report.folder / "run.json").read_text())
    assert about["measured_columns"] == {"times_by_rank": ["time_ms"]}
    assert about["measured_claims"] == ["quick"]
    with pytest.raises(ValueError, match=r"`measured` must be columns of the table, got \['time'\]"):
        report.table(pd.DataFrame({"rank": [1]}), "error_by_rank", measured=["time"])


def test_a_claim_has_its_number_or_says_in_how_many_cases_it_holds(report: Report) -> None:
    report.claim("a figure", True, 0.123456)
    report.claim("all of many", pd.Series([True, True, False]))
    report.claim("all of a table", pd.DataFrame({"a": [True, True], "b": [True, True]}))
    report.claim("neither", False)
    claims = pd.read_csv(report.folder / "claims.csv", dtype=str, keep_default_na=False)
    assert list(claims.holds) == ["True", "False", "True", "False"]
    assert list(claims.number) == ["0.123", "2 of 3", "4 of 4", ""]
