"""Comparing results: tolerances, what does not count, verdicts, what is missing, and the one line of counts."""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from lowrank.report.__main__ import main
from lowrank.report.compare import compare_folders, relative_difference

TABLE = pd.DataFrame({"rank": [1, 2], "error": [0.5, 0.25], "noise": [1e-9, 2e-9], "time_ms": [3.0, 4.0]})
CLAIMS = pd.DataFrame(
    {
        "id": ["a/b", "a/c"],
        "claim": ["a beats b", "a beats c"],
        "verdict": "supported",
        "effect": 1.0,
        "low": 0.5,
        "high": 1.5,
    }
    | {"unit": "nats", "n": 5, "margin": 0.0, "p": 0.001}
)
DECLARED = {"split": "test", "tolerance": 0.01, "measured": ["time_ms"], "unstable": ["noise"]}
NAME = "digits/01_small/error_by_rank"


def write(folder: Path, table: pd.DataFrame = TABLE, claims: pd.DataFrame = CLAIMS, **declared) -> Path:
    """One result, whose error may differ by 1 %."""
    result = folder / "digits" / "01_small"
    result.mkdir(parents=True, exist_ok=True)
    table.to_csv(result / "error_by_rank.csv", index=False)
    claims.to_csv(result / "claims.csv", index=False)
    about = {"tables": {"error_by_rank": DECLARED | declared}}
    (result / "run.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write(tmp_path / "published")


def lines(results: Path, published: Path, tolerance: float | None = None) -> list[str]:
    return compare_folders(results, published, tolerance).lines()


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    status = main(["compare", *map(str, words)])
    return status, capsys.readouterr().out


def test_equal_results_say_so_in_one_line(published, tmp_path, capsys) -> None:
    line = (
        "1 tables equal, 0 within tolerance, 0 beyond; 2 of 2 verdicts agree with the published ones, 0 inconclusive\n"
    )
    assert said(capsys, write(tmp_path / "results"), published) == (0, line)


def test_times_and_noise_do_not_count(published, tmp_path) -> None:
    other = TABLE.assign(time_ms=9.0, noise=[5.0, -1.0])
    found = compare_folders(write(tmp_path / "results", other), published, tolerance=0)
    assert [table.status for table in found.tables] == ["equal"]
    assert found.lines() == []


def test_a_table_within_its_tolerance_passes_and_is_named_when_asked(published, tmp_path, capsys) -> None:
    results = write(tmp_path / "results", TABLE.assign(error=[0.5, 0.252]))
    status, text = said(capsys, results, published)
    assert status == 0
    assert text.startswith("0 tables equal, 1 within tolerance, 0 beyond; ")
    assert said(capsys, results, published, "--all")[1].startswith(f"{NAME}: error differs by 0.008, tolerance 0.01\n")


def test_a_table_beyond_its_tolerance_is_named_in_one_line(published, tmp_path, capsys) -> None:
    results = write(tmp_path / "results", TABLE.assign(error=[0.5, 0.26]))
    status, text = said(capsys, results, published)
    assert status == 1
    assert text.splitlines()[0] == f"{NAME}: error differs by 0.04, tolerance 0.01"
    assert text.splitlines()[1].startswith("0 tables equal, 0 within tolerance, 1 beyond; ")
    assert len(text.splitlines()) == 2


def test_one_tolerance_may_replace_all_declared_ones(published, tmp_path) -> None:
    results = write(tmp_path / "results", TABLE.assign(error=[0.5, 0.252]))
    assert lines(results, published, 0.1) == []
    assert lines(results, published, 0.001) == [f"{NAME}: error differs by 0.008, tolerance 0.001"]
    assert lines(results, published, 0) == [f"{NAME}: error differs by 0.008, tolerance 0"]


def test_columns_have_tolerances_of_their_own(published, tmp_path) -> None:
    results = write(tmp_path / "results", TABLE.assign(rank=[1, 3]), tolerance={"rank": 0.5})
    assert lines(results, published) == []
    write(results, TABLE.assign(rank=[1, 3], error=[0.5, 0.2501]), tolerance={"rank": 0.5})
    assert lines(results, published) == []  # the default is 0.001 ...
    write(results, TABLE.assign(error=[0.5, 0.251]), tolerance={"rank": 0.5})
    assert lines(results, published) == [
        f"{NAME}: error differs by 0.004, tolerance 0.001"
    ]  # ... and not that of `rank`
    write(results, TABLE.assign(rank=[1, 3], error=[0.5, 0.26]))
    assert lines(results, published) == [f"{NAME}: rank differs by 0.5, tolerance 0.01"]  # another rank is beyond


def test_text_must_be_equal(published, tmp_path) -> None:
    write(published, TABLE.assign(layer=["query", "key"]))
    results = write(tmp_path / "results", TABLE.assign(layer=["query", "value"]))
    assert lines(results, published) == [f"{NAME}: layer differs in 1 of 2 rows, and must be equal"]


def test_fractions_that_happen_to_be_whole_are_fractions(published, tmp_path) -> None:
    write(published, TABLE.assign(error=[1000, 1000]))
    for other in (999.5, 1001):
        assert lines(write(tmp_path / "results", TABLE.assign(error=[1000, other])), published) == []


@pytest.mark.parametrize(
    ("values", "reference", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.1, 2.0], [1.0, 2.0], 0.1),
        ([0.001, 100.0], [0.002, 100.0], 0.01),  # a thousandth of the largest, 0.1, instead of 0.002
        ([math.nan, math.inf, -math.inf], [math.nan, math.inf, -math.inf], 0.0),
        ([math.nan, 1.0], [1.0, 1.0], math.inf),
        ([1.0, 1.0], [math.inf, 1.0], math.inf),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.1, 0.0], [0.0, 0.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_the_difference_of_two_columns(values, reference, difference) -> None:
    found = relative_difference(pd.Series(values, dtype=float), pd.Series(reference, dtype=float))
    assert found == pytest.approx(difference)


def test_text_truth_and_gaps_must_be_equal(tmp_path) -> None:
    table = TABLE.assign(way=["svd", None], good=[True, False])
    published = write(tmp_path / "published", table)
    results = write(tmp_path / "results", table.assign(time_ms=9.0))
    assert lines(results, published) == []
    write(results, table.assign(way=["svd", "asvd"]))
    assert lines(results, published, 10.0) == [f"{NAME}: way differs in 1 of 2 rows, and must be equal"]
    write(results, table.assign(good=[True, True]))
    assert lines(results, published, 10.0) == [f"{NAME}: good differs in 1 of 2 rows, and must be equal"]


def test_other_rows_and_columns_are_named_in_one_line(published, tmp_path) -> None:
    results = write(tmp_path / "results", TABLE.head(1))
    assert lines(results, published) == [f"{NAME}: 1 rows, published 2"]
    write(results, TABLE.assign(split="test"))
    assert lines(results, published) == [
        f"{NAME}: columns or their order differ; only here: ['split'], only published: []"
    ]


def test_a_table_of_which_nothing_counts_is_equal(published, tmp_path) -> None:
    results = write(tmp_path / "results", TABLE.head(1), measured=list(TABLE))
    assert lines(results, published) == []


def test_a_verdict_that_flips_is_named_with_both_effects(published, tmp_path, capsys) -> None:
    turned = dict(verdict=["refuted", "supported"], effect=[-1.0, 1.0], low=[-1.5, 0.5], high=[-0.5, 1.5])
    results = write(tmp_path / "results", claims=CLAIMS.assign(**turned))
    status, text = said(capsys, results, published)
    assert status == 1
    there, here = "supported (+1 nats [0.5, 1.5], n = 5)", "refuted (-1 nats [-1.5, -0.5], n = 5)"
    assert text.splitlines()[0] == f"digits/01_small: a/b: published {there}, here {here}"
    assert text.endswith("; 1 of 2 verdicts agree with the published ones, 0 inconclusive\n")


@pytest.mark.parametrize("where", ["results", "published"])
def test_what_is_inconclusive_agrees_with_any_verdict(published, tmp_path, where) -> None:
    results = write(tmp_path / "results", claims=CLAIMS.assign(verdict="refuted"))
    write(tmp_path / where, claims=CLAIMS.assign(verdict="inconclusive"))
    found = compare_folders(results, published)
    assert found.lines() == []
    assert found.summary().endswith("; 2 of 2 verdicts agree with the published ones, 2 inconclusive")


def test_what_one_side_lacks_is_named(published, tmp_path, capsys) -> None:
    results = write(tmp_path / "results", claims=CLAIMS.replace("a/b", "a/d"))
    (results / "digits" / "01_small" / "error_by_rank.csv").rename(results / "digits" / "01_small" / "other.csv")
    assert lines(results, published) == [
        f"{NAME}: only published",
        "digits/01_small/other: not published",
        "digits/01_small: 1 claims are not published, 1 only published",
    ]
    assert "; 1 of 3 verdicts agree" in said(capsys, results, published)[1]


def test_results_that_are_not_published_are_counted_apart(published, tmp_path, capsys) -> None:
    results = write(tmp_path / "results")
    shutil.copytree(results / "digits", results / "letters")
    status, text = said(capsys, results, published)
    assert status == 0
    assert text.splitlines()[0] == "1 results are not published: letters/01_small"
    assert text.splitlines()[1].startswith("1 tables equal, ")


def test_your_runs_are_compared_with_the_published_results(published, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("LOWRANK_OUTPUTS", raising=False)
    monkeypatch.setattr("lowrank.report.folders.ROOT", tmp_path)
    published.rename(tmp_path / "outputs")
    write(tmp_path / "outputs" / "run", TABLE.assign(error=0.5))
    assert said(capsys)[1].startswith(f"{NAME}: error differs by 1, tolerance 0.01\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "nowhere"], "error: `results` must be a folder with SET/NOTEBOOK/run.json, got 'nowhere'."),
        (["{published}", "{published}", "--tolerance", "-1"], "error: `tolerance` must be >= 0 and finite, got -1.0."),
        (["{published}", "{published}", "--tolerance", "nan"], "error: `tolerance` must be >= 0 and finite, got nan."),
    ],
)
def test_bad_input_is_named(published, capsys, words, message) -> None:
    assert main(["compare", *(word.format(published=published) for word in words)]) == 2
    assert capsys.readouterr().err == message + "\n"


def claims_with(**changed: object) -> str:
    return CLAIMS.assign(**changed).to_csv(index=False)


TORN: dict[str, list[tuple[object, str]]] = {
    "run.json": [
        ("", "run.json` must be whole JSON"),
        ("[1]", "run.json` must be a valid"),
        (b"\xff\xfe", "run.json` must be text in UTF-8"),
        ({"tables": []}, "at 'tables', got []"),
        ({"tables": {"error_by_rank": {"measured": "time_ms"}}}, "at 'tables.error_by_rank.measured', got 'time_ms'"),
        ({"tables": {"error_by_rank": {"tolerance": "0.1"}}}, "at 'tables.error_by_rank.tolerance"),
        ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
    ],
    "claims.csv": [
        ("", "claims.csv: No columns"),
        (b"\xff\xfe\x00,", "claims.csv: "),
        ("a,b\n1,2\n", "claims.csv` must have the columns ['id', 'claim'"),
        (claims_with(verdict="perhaps"), "claims.csv` must have a verdict in each row among"),
        (claims_with(id="a/b"), "claims.csv` must have each id once"),
        (claims_with(claim=None), "claims.csv` must have a claim in each row"),
        (claims_with(effect="much"), "claims.csv` must have numbers as effect"),
        ('id,claim\n"a/b,1\n', "claims.csv: "),
    ],
    "error_by_rank.csv": [("", "error_by_rank.csv: No columns"), ("a,b\n1\n1,2,3,4\n", "error_by_rank.csv: ")],
}


@pytest.mark.parametrize(
    ("file", "content", "words"), [(file, *case) for file, cases in TORN.items() for case in cases]
)
@pytest.mark.parametrize("side", ["results", "published"])
def test_a_file_that_is_not_what_it_should_be_is_named_in_one_line(
    published, tmp_path, capsys, side, file, content, words
):
    write(tmp_path / "results")
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path = tmp_path / side / "digits" / "01_small" / file
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["compare", str(tmp_path / "results"), str(published)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert words in said.err
    assert said.err.startswith("error: `")


def test_a_reference_that_is_no_folder_is_named(published, capsys) -> None:
    assert main(["compare", str(published), "nowhere"]) == 2
    assert capsys.readouterr().err == "error: `reference` must be a folder of results, got 'nowhere'.\n"
