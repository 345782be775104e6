"""The README shows every set by its headline metric, whatever the other metrics of its task are."""

import json
from pathlib import Path

import pandas as pd
import pytest

from lowrank.report import folders, readme
from lowrank.report.selection_tables import layer_selection
from lowrank.report.tables import (
    adapters,
    baselines,
    comparison,
    fixed_bases,
    preparation,
    read_test,
)

METRICS = {"cola-bert": ("matthews", "accuracy"), "mrpc-bert": ("f1", "accuracy"), "stsb-bert": ("pearson", "spearman")}
QUALITY = {"loss": [0.5, 0.7], "first": [0.91, 0.82], "second": [0.11, 0.12], "added_loss": [0.0, 0.2]}
SIZES = dict.fromkeys(("trainable", "stored", "dense", "trainable_share", "stored_share", "step_ms", "memory_mb"), 1.0)


def write(folder: Path, name: str, metrics: tuple[str, str], **columns: object) -> None:
    """Write a table of two rows of the test split, whose columns called first and second are the metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(columns, index=range(2)).assign(split="test")
    table.rename(columns=dict(zip(("first", "second"), metrics, strict=True))).to_csv(
        folder / f"{name}.csv", index=False
    )


@pytest.fixture(params=METRICS)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One set with results of six notebooks."""
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    house, metrics = tmp_path / "outputs" / request.param, METRICS[request.param]
    one, two, three, four, five, six = (
        house / stem
        for stem in (
            "01_whitening",
            "02_prehab",
            "03_svd_comparison",
            "04_stability",
            "05_rank_config",
            "06_layer_selection",
        )
    )
    write(one, "baseline", metrics, **QUALITY, model_weights=10, targeted_share=0.5)
    write(one, "theorem_by_layer", metrics, dtype="float32", difference=1e-6)
    write(two, "quality_by_keep", metrics, variant="none", method="whitened", keep=0.5, **QUALITY)
    write(two, "quality_by_refinement", metrics, variant="none", **QUALITY)
    write(three, "quality_by_keep", metrics, way=["dense", "whitened"], keep=[1.0, 0.5], **QUALITY)
    write(four, "comparison", metrics, variant=["dense", "oialr"], first=[0.91, 0.82], std=0.01, **SIZES)
    variants = ["full", "base"]
    write(five, "comparison", metrics, variant=variants, mean=[0.91, 0.82], std=0.1, loss=[0.5, 0.7], **SIZES)
    write(five, "gain_by_variant", metrics, variant=variants, gain=0.1)
    write(five, "quality_by_variant", metrics, variant=variants, seed=0, trainable=1, **QUALITY, step_ms=1.0)
    write(six, "quality_by_sparsity", metrics, method="wanda", per="row", rule="one", sparsity=[0.5, 0.6], **QUALITY)
    write(six, "quality_by_objective", metrics, objective="one", significance_share=0.5, **QUALITY)
    for folder in (one, two, three, four, five, six):
        run = {
            "inputs": {"metric": METRICS[request.param][0]},
            "parameters": {"target_keep": 0.5},
            "wall_s": 1.0,
            "device": "CPU",
        }
        (folder / "run.json").write_text(json.dumps(run))
    return request.param


@pytest.mark.parametrize(
    ("table", "cells"),
    [
        (baselines, ["{} 0.91"]),
        (preparation, ["{} at keep 0.5", "0.865 ± 0.064"]),
        (comparison, ["0.500 / 0.91", "0.700 / 0.82"]),
        (fixed_bases, ["{} 0.910 ± 0.01", "{} 0.820 ± 0.01"]),
        (adapters, ["{} 0.91 ± 0.1"]),
        (layer_selection, ["{} at 0.5", "{} at 0.6", "0.91", "0.82"]),
    ],
)
def test_a_set_is_shown_by_its_headline_metric(name: str, table, cells: list[str]) -> None:
    headline, other = METRICS[name]
    text = table()
    for cell in cells:
        assert cell.format(headline) in text
    assert other not in text


def test_only_rows_of_the_test_split_are_shown(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / name / "03_svd_comparison"
    table = pd.read_csv(folder / "quality_by_keep.csv")
    validation = table.assign(split="validation", loss=9.0)
    pd.concat([validation, table.assign(split="test")]).to_csv(folder / "quality_by_keep.csv", index=False)
    assert "0.500 / 0.91" in comparison()
    assert "9.000" not in comparison()
    validation.to_csv(folder / "quality_by_keep.csv", index=False)
    with pytest.raises(ValueError, match=r"03_svd_comparison/quality_by_keep` must have rows of the split 'test'"):
        read_test(folder, "quality_by_keep")


def test_claims_show_verdict_and_effect_by_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "notebook_names", lambda: ["01_whitening"])
    house = tmp_path / "outputs" / name / "01_whitening"
    rows = ["x,a beats b,inconclusive,0.1,-1,1.2,nats,5,0,.5", "y,a beats c,refuted,-1,-2,-0.5,points,3,0,.01"]
    (house / "claims.csv").write_text("\n".join(["id,claim,verdict,effect,low,high,unit,n,margin,p", *rows]))
    _, _, one, two = readme.claims().splitlines()
    assert "a beats b" in one
    assert "inconclusive: +0.1 nats [-1, 1.2], n = 5" in one
    assert "**refuted**: -1 points [-2, -0.5], n = 3" in two
