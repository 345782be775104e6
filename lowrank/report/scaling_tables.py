"""The tables of docs/scaling.md: what real models took, and what larger ones would take by the same lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from lowrank.report.bench_tables import format_seconds
from lowrank.report.folders import published_folder
from lowrank.report.model_tables import PRETRAINED, records
from lowrank.report.result_files import read_run, read_table
from lowrank.report.tables import read_test, result_folders

NARROW = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]  # a block of MiniLM, and of ViT-S
GEMMA = [(1024, 640), (256, 640), (256, 640), (640, 1024), (2048, 640), (2048, 640), (640, 2048)]
# set -> (out, in) of its targeted layers, by the architecture's description
SHAPES: dict[str, list[tuple[int, int]]] = dict(zip(PRETRAINED, (GEMMA * 18, NARROW * 12, NARROW * 6), strict=True))
WAYS = {
    "whitened": "truncate all layers",
    "ranks by measured loss": "the same, ranks measured",
    "retargeted": "retarget",
}
# assumed, not measured: operations per second that one GPU keeps up in a stage, in the dtype that it runs in
ASSUMED_RATES = {"forward pass": 2e14, "second moments": 5e13}
GPUS = (1, 8, 64)


def real_costs() -> str:
    """Tabulate what notebook 03 took on each pretrained model."""
    rows = []
    for name, folder in _pretrained().items():
        run, table = read_run(folder), read_test(folder, "quality_by_keep")
        most, shapes = table.groupby("way").seconds.max(), SHAPES[name]
        rows.append(
            {
                "set": name,
                "weights in targeted layers": f"{sum(m * n for m, n in shapes):,}",
                "calibration samples": run["parameters"]["calibration_samples"],
                "dense model": f"{table.weights_mb.iloc[0]:,.0f} MB",
                "statistics": f"{spent:,.0f} s" if (spent := run["stages_s"]["calibration"]) >= 1 else "cached",
            }
            | {label: f"{most[way]:,.0f} s" for way, label in WAYS.items() if way in most}
            | {
                "whole notebook": f"{run['wall_s'] / 60:,.0f} min",
                "peak": f"{run['peak_memory_mb']['host']:,} MB",
                "device": run["device"],
            }
        )
    return pd.DataFrame(rows).fillna("").to_markdown(index=False) if rows else "No such set is published yet."


def checked_lines() -> str:
    """Compare the seconds of truncating a real model with what small Llamas of random weights predict for its shapes."""
    costs = _read_costs()
    lines = costs.query("kind == 'predicted'").set_index("stage").ns_per_work.to_dict()
    rows = []
    for name, folder in _pretrained().items():
        run, table = read_run(folder), read_test(folder, "quality_by_keep")
        if run["parameters"]["in_memory"]:
            continue  # one decomposition served all budgets, so no row has the seconds of its own
        predicted = _compress_seconds(SHAPES[name], lines)
        for row in records(table[table.way == "whitened"]):
            took = row["seconds"]
            rows.append((name, f"{row['keep']:g}", f"{predicted:,.1f} s", f"{took:,.1f} s", f"{predicted / took:.2f}"))
    columns = ["set", "keep", "predicted", "measured", "predicted / measured"]
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False) if rows else "No such set is published yet."


def several_gpus() -> str:
    """Tabulate operations of the stages that grow with the tokens, and how long at assumed rates on one GPU and on several."""
    large, rows = _read_costs().query("kind == 'extrapolated'"), []
    for row in records(large[large.stage.isin(list(ASSUMED_RATES))]):
        operations, rate = 2 * row["work"], ASSUMED_RATES[row["stage"]]
        hours = {f"{n} GPU{'s' * (n > 1)}": format_seconds(operations / rate / n) for n in GPUS}
        about = {"model": row["model"], "stage": row["stage"], "operations": f"{operations / 1e15:,.0f} × 10¹⁵"}
        rows.append(about | {"assumed rate of a GPU": f"{rate / 1e12:.0f} × 10¹² / s"} | hours)
    return pd.DataFrame(rows).to_markdown(index=False)


def _compress_seconds(shapes: Sequence[tuple[int, int]], ns_per_work: Mapping[str, float]) -> float:
    """Return the seconds of decomposing and truncating layers by the measured lines."""
    work = {
        "eigendecompositions": sum(min(shape) ** 3 for shape in shapes),
        "the rest of compress": sum(m * n * (m + n) for m, n in shapes),
    }
    return sum(ns_per_work[stage] * amount for stage, amount in work.items()) / 1e9


def _pretrained() -> dict[str, Path]:
    folders = result_folders("03_svd_comparison")
    return {name: folders[name] for name in PRETRAINED if name in folders}


def _read_costs() -> pd.DataFrame:
    return read_table(published_folder() / "bench" / "sizing.csv")
