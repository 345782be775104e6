"""Claims and readings: functions of tables alone, in the right direction, and equal to what is published."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lowrank.io.dependencies import ROOT
from lowrank.report.__main__ import main
from lowrank.report.findings.registry import FINDINGS, judge_results, list_readings, read_finding
from lowrank.report.findings.results import Claim, Results, compare_arms, format_claim, judge_claims, read_results
from lowrank.report.inference import mean_effect
from lowrank.report.parameters import notebook_names
from lowrank.report.result_files import CLAIM_COLUMNS, read_claims

PUBLISHED = sorted(path.parent for path in (ROOT / "outputs").glob("*/*/run.json"))


def name_of(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def test_every_notebook_has_findings() -> None:
    assert sorted(FINDINGS) == notebook_names()


@pytest.mark.parametrize("folder", PUBLISHED, ids=name_of)
def test_published_claims_are_those_of_the_published_tables(folder: Path) -> None:
    judged, published = judge_results(folder.name, read_results(folder)), read_claims(folder)
    assert judged[["id", "claim", "verdict"]].equals(published[["id", "claim", "verdict"]])
    for column in ("effect", "low", "high"):
        assert published[column].to_numpy(float) == pytest.approx(judged[column].to_numpy(float), rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("folder", PUBLISHED, ids=name_of)
def test_every_reading_fills_a_sentence(folder: Path) -> None:
    results, known = read_results(folder), FINDINGS[folder.name].readings
    assert set(list_readings(folder.name, results)) >= {name for name in known if len(results.table(name))}
    for table in list_readings(folder.name, results):
        text = read_finding(folder.name, table, results)
        assert text.endswith(".")
        assert "nan" not in text
        assert len(text) < 1200


def test_more_is_better_in_points_and_in_nats() -> None:
    rows = [
        (seed, arm, loss, 0.9 - loss / 10, np.exp(loss)) for seed in range(3) for arm, loss in (("a", 1.0), ("b", 2.0))
    ]
    table = pd.DataFrame(rows, columns=["seed", "arm", "loss", "accuracy", "perplexity"])
    for metric, unit, gap in (("accuracy", "points", 10.0), ("perplexity", "nats", 1.0)):
        results = Results(Path("nowhere"), {}, {"metric": metric})
        scores = results.scores(table, "seed", "arm")
        (claim,) = compare_arms(scores, "a", "b", name="a-b", text="a beats b", unit=results.score.unit)
        assert (claim.effect.mean, claim.unit) == (pytest.approx(gap), unit)
    assert not list(compare_arms(scores, "a", "c", name="a-c", text="", unit="nats"))  # an arm that was not run


def test_claims_of_one_run_are_judged_together() -> None:
    weak = mean_effect([0.1, 0.2, 0.35])
    assert 0.01 < weak.p < 0.1
    alone = judge_claims([Claim("a", "a", mean_effect([0.1, 0.2, 0.21, 0.3]), "nats")])
    assert list(alone.verdict) == ["supported"]
    others = [Claim(str(place), "b", weak, "nats") for place in range(20)]
    assert (
        judge_claims([Claim("a", "a", mean_effect([0.1, 0.2, 0.21, 0.3]), "nats"), *others]).verdict[0]
        == "inconclusive"
    )
    assert list(alone.columns) == list(CLAIM_COLUMNS)
    assert format_claim(alone.iloc[0]) == "supported (+0.203 nats [0.0723, 0.333], n = 4)"


def test_a_table_of_two_arms_gives_the_verdict_that_was_planted(tmp_path: Path) -> None:
    """Notebook 05 is asked, with tables in which ranks by threshold win and a full fine-tuning wins more."""
    folder, generator = tmp_path / "set" / "05_rank_config", np.random.default_rng(0)
    folder.mkdir(parents=True)
    gains = {"uniform": 0.0, "random": -0.5, "threshold": 0.4, "full": 1.0}
    rows = [
        (name, seed, 3 - gain + 0.02 * generator.normal(), "test") for seed in range(5) for name, gain in gains.items()
    ]
    pd.DataFrame(rows, columns=["variant", "seed", "loss", "split"]).to_csv(
        folder / "quality_by_variant.csv", index=False
    )
    results = Results(folder, {}, {"metric": "perplexity"})
    verdicts = judge_results("05_rank_config", results).set_index("id")
    assert verdicts.verdict["adapters/threshold-uniform"] == "supported"
    assert verdicts.verdict["adapters/threshold-random"] == "supported"
    assert verdicts.verdict["adapters/threshold-full"] == "refuted"
    assert verdicts.effect["adapters/threshold-uniform"] == pytest.approx(0.4, abs=0.05)
    assert "adapters/budget-uniform" not in verdicts.index


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One published result, as if it were all."""
    source = ROOT / "outputs" / "docs-llama" / "05_rank_config"
    target = tmp_path / "outputs" / "docs-llama" / "05_rank_config"
    shutil.copytree(source, target)
    monkeypatch.setattr("lowrank.report.folders.ROOT", tmp_path)
    return target


def test_the_command_says_what_changed_and_writes_it_when_asked(copied: Path, capsys) -> None:
    assert main(["claims"]) == 0
    assert "; was" not in capsys.readouterr().out
    table = pd.read_csv(copied / "quality_by_variant.csv")
    table.loc[table.variant == "threshold", "loss"] -= 1.0
    table.to_csv(copied / "quality_by_variant.csv", index=False)
    assert main(["claims", "docs-llama"]) == 1
    said = capsys.readouterr().out
    assert "docs-llama/05_rank_config: adapters/threshold-uniform: supported (+1" in said
    assert "; was inconclusive (" in said or "; was supported (" in said
    assert main(["claims", "--write"]) == 0
    assert main(["claims"]) == 0
    assert main(["claims", "nowhere"]) == 2
    assert "`sets` must have results in" in capsys.readouterr().err


def test_a_reading_of_a_table_that_is_not_there_is_an_error(copied: Path) -> None:
    (copied / "quality_by_variant.csv").unlink()
    results = read_results(copied)
    with pytest.raises(FileNotFoundError, match="quality_by_variant"):
        read_finding("05_rank_config", "gain_by_variant", results)
    assert json.loads((copied / "run.json").read_text())["parameters"] == results.parameters
