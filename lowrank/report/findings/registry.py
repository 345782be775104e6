"""Say which module has the findings of which notebook, and judge the results of one run."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pandas as pd

from lowrank.report.findings import adapters, compression, geometry, preparation, selection, stability, whitening
from lowrank.report.findings.results import Claim, Reading, Results, judge_claims


class Findings(NamedTuple):
    """Hold the findings of one notebook.

    **Arguments**

    - `claims`: results -> claims.
    - `readings`: name of a table -> a function of the results that says in a sentence what the table shows.
    """

    claims: Callable[[Results], Iterable[Claim]]
    readings: dict[str, Reading]


FINDINGS = {
    "01_whitening": Findings(whitening.claims, whitening.READINGS),
    "02_prehab": Findings(preparation.claims, preparation.READINGS),
    "03_svd_comparison": Findings(compression.claims, compression.READINGS),
    "04_stability": Findings(stability.claims, stability.READINGS),
    "05_rank_config": Findings(adapters.claims, adapters.READINGS),
    "06_layer_selection": Findings(selection.claims, selection.READINGS),
    "07_pi3_efficiency": Findings(geometry.claims, geometry.READINGS),
}


def judge_results(notebook: str, results: Results) -> pd.DataFrame:
    """Judge the claims of a notebook on one folder of results.

    **Arguments**

    - `notebook`: its stem; one without findings has no claims.
    - `results`: its tables.

    **Returns** a table, see `judge_claims`.
    """
    found = FINDINGS.get(notebook)
    return judge_claims(() if found is None else found.claims(results))


def list_readings(notebook: str, results: Results) -> list[str]:
    """List the tables that a notebook says a sentence about, without those that are empty: a set may leave out a section.

    **Arguments**

    - `notebook`: its stem.
    - `results`: its tables.
    """
    return [table for table in FINDINGS[notebook].readings if results.has(table)]


def read_finding(notebook: str, table: str, results: Results) -> str:
    """Say in a sentence what a table shows.

    **Arguments**

    - `notebook`: its stem.
    - `table`: a key of its readings.
    - `results`: its tables.

    **Raises**

    - `KeyError`: no such reading.
    """
    return FINDINGS[notebook].readings[table](results)
