"""What docs/cluster.md says: how variants are gathered, and what larger models cost."""

import re
from pathlib import Path

import pandas as pd
import pytest
from bench_sizing import LARGE, LARGE_TOKENS, costs

from lowrank.io.dependencies import ROOT

PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf8")


def test_variants_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "pd.concat" in block]
    monkeypatch.chdir(tmp_path)
    variants = {f"digits-vit@seeds={seed}@control_seeds={seed}": seed for seed in (3, 4)}
    for name, value in {**variants, "digits-vit": 0, "docs-bert@seed=3": 0}.items():
        folder = Path("outputs", "run", name, "04_stability")
        folder.mkdir(parents=True)
        pd.DataFrame({"value": [value, value]}).to_csv(folder / "comparison.csv", index=False)
    found: dict = {}
    exec(compile(example, "cluster.md", "exec"), found)
    by_set = found["table"].groupby("set").value.unique().map(list).to_dict()
    assert by_set == {name: [value] for name, value in variants.items()}


@pytest.mark.parametrize("name", LARGE)
def test_the_formulas_know_the_published_sizes(name: str) -> None:
    hidden, intermediate, keys, layers = LARGE[name]
    found = costs(hidden, intermediate, keys, layers, tokens=1, width=2)
    vocabulary = 2 * 32000 * hidden
    billions = (found["forward pass"][1] + vocabulary) / 1e9
    assert billions == pytest.approx({"Llama 7B": 6.74, "Llama 70B": 68.98}[name], abs=0.01)
    assert found["second moments, block by block"][2] == 8 * (3 * hidden**2 + 2 * intermediate**2)


def test_the_table_follows_the_formulas() -> None:
    table = pd.read_csv(ROOT / "outputs" / "bench" / "sizing.csv")
    large = table[table.kind == "extrapolated"]
    assert set(large.model) == set(LARGE)
    for row in large.itertuples():
        cost = costs(*LARGE[row.model], tokens=LARGE_TOKENS, width=2)[row.stage]
        assert (row.work_of, row.work, row.bytes) == cost
        assert row.seconds == pytest.approx(1e-9 * row.ns_per_work * row.work, rel=0.02)  # three digits each
