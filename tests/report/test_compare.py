"""Comparing results: bytes, measured columns and claims, tolerance, what is missing."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from lowrank.report.__main__ import main
from lowrank.report.compare import differences

TABLE = pd.DataFrame({"rank": [1, 2], "error": [0.5, 0.25], "time_ms": [3.0, 4.0]})
CLAIMS = pd.DataFrame({"claim": ["exact", "quick"], "holds": [True, True]})


def write(folder: Path, table: pd.DataFrame = TABLE, claims: pd.DataFrame = CLAIMS, **about) -> Path:
    """One result, whose time_ms and claim 'quick' are measured unless told otherwise."""
    result = folder / "digits" / "01_small"
    result.mkdir(parents=True, exist_ok=True)
    table.to_csv(result / "error_by_rank.csv", index=False)
    claims.to_csv(result / "claims.csv", index=False)
    measured = {"measured_columns": {"error_by_rank": ["time_ms"]}, "measured_claims": ["quick"]}
    (result / "run.json").write_text(json.dumps(measured | about))
    return folder


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write(tmp_path / "reference")


def test_equal_results_have_no_differences(reference, tmp_path, capsys) -> None:
    assert differences(write(tmp_path / "results"), reference) == (2, [])
    assert main(["compare", str(tmp_path / "results"), str(reference)]) == 0
    assert capsys.readouterr().out == "2 tables compared, 0 differences\n"


def test_times_and_claims_about_times_do_not_count_and_all_else_does(reference, tmp_path, capsys) -> None:
    results, slow = tmp_path / "results", CLAIMS.assign(holds=[True, False])
    assert differences(write(results, TABLE.assign(time_ms=9.0), slow), reference) == (2, [])
    wrong = TABLE.assign(error=[0.5, 0.26])
    count, lines = differences(write(results, wrong, CLAIMS.assign(holds=[False, True])), reference)
    assert count == 2
    assert [line.split(":")[0] for line in lines] == ["digits/01_small/claims", "digits/01_small/error_by_rank"]
    assert "0.26" in lines[1]
    assert main(["compare", str(results), str(reference)]) == 1
    assert capsys.readouterr().out.endswith("2 tables compared, 2 differences\n")


@pytest.mark.parametrize("where", ["results", "reference"])
def test_either_side_may_say_what_is_measured(reference, tmp_path, where) -> None:
    results = write(tmp_path / "results", TABLE.assign(time_ms=9.0))
    write(tmp_path / where, TABLE.assign(time_ms=9.0 if where == "results" else 3.0), measured_columns={})
    assert differences(results, reference) == (2, [])
    for folder in (results, reference):
        about = folder / "digits" / "01_small" / "run.json"
        about.write_text("{}")
    assert differences(results, reference)[1] == ["digits/01_small/error_by_rank: other bytes"]


def test_numbers_may_differ_by_the_tolerance_and_no_more(reference, tmp_path) -> None:
    results = write(tmp_path / "results", TABLE.assign(error=TABLE.error * (1 + 1e-4)))
    assert differences(results, reference, tolerance=2e-4) == (2, [])
    assert len(differences(results, reference, tolerance=0.5e-4)[1]) == 1
    assert len(differences(results, reference)[1]) == 1


def test_claims_must_hold_alike_under_every_tolerance(reference, tmp_path) -> None:
    results = write(tmp_path / "results", claims=CLAIMS.assign(holds=[False, True]))
    assert len(differences(results, reference, tolerance=10.0)[1]) == 1


def test_what_one_side_lacks_is_named(reference, tmp_path) -> None:
    results = write(tmp_path / "results")
    (results / "digits" / "01_small" / "error_by_rank.csv").rename(results / "digits" / "01_small" / "other.csv")
    shutil.copytree(results / "digits", results / "letters")
    assert differences(results, reference)[1] == [
        "digits/01_small/other: not in the reference",
        "digits/01_small/error_by_rank: only in the reference",
        "letters/01_small: not in the reference",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "nowhere"], "error: `results` must be a folder with SET/NOTEBOOK/run.json, got 'nowhere'."),
        (["{reference}", "{reference}", "--tolerance", "-1"], "error: `tolerance` must be >= 0, got -1.0."),
        (["{reference}", "{reference}", "--tolerance", "nan"], "error: `tolerance` must be >= 0, got nan."),
    ],
)
def test_bad_input_is_named(reference, capsys, words, message) -> None:
    assert main(["compare", *(word.format(reference=reference) for word in words)]) == 2
    assert capsys.readouterr().err == message + "\n"
