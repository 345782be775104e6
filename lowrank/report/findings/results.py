"""Read the tables of one folder of results, and judge claims about them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lowrank.report.inference import Effect, decide, mean_effect
from lowrank.report.result_files import CLAIM_COLUMNS, read_run, read_table

Table = Any  # a DataFrame, or a column of one: the types of pandas know nothing of columns


class Claim(NamedTuple):
    """Say that one arm beats another by more than a margin.

    **Arguments**

    - `id`: the same for every set, for example 'prehab/tail/truncated'.
    - `text`: the same for every set: no number of a set's parameters in it.
    - `effect`: of the arm over the other, in `unit`; it supports the claim if it exceeds `margin`.
    - `unit`: 'points', 'nats' or another noun.
    - `margin`: default 0.
    """

    id: str
    text: str
    effect: Effect
    unit: str
    margin: float = 0.0


class Score(NamedTuple):
    """Say in what quality is compared: points of the headline metric, or nats where that is a perplexity.

    **Arguments**

    - `column`: of the tables.
    - `factor`: to the unit, negative if less is better.
    - `unit`: 'points' or 'nats'.
    """

    column: str
    factor: float
    unit: str


@dataclass(frozen=True)
class Results:
    """Hold one folder of results.

    **Arguments**

    - `folder`: with tables.
    - `parameters`: parameter name -> value of the run.
    - `inputs`: what the run recorded, `metric` among it.
    """

    folder: Path
    parameters: Mapping[str, Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Return whether there is a table of this name with at least one row."""
        return (self.folder / f"{name}.csv").is_file() and len(self.table(name)) > 0

    def table(self, name: str) -> Table:
        """Read a table.

        **Raises**

        - `FileNotFoundError`: no such table.
        """
        return read_table(self.folder / f"{name}.csv")

    def test(self, name: str) -> Table:
        """Read the rows of a table that were measured on the test split.

        **Raises**

        - `FileNotFoundError`: no such table.
        """
        table = self.table(name)
        return table[table["split"] == "test"].drop(columns="split").reset_index(drop=True)

    @property
    def metric(self) -> str:
        """Return the name of the headline metric."""
        return self.inputs["metric"]

    @property
    def score(self) -> Score:
        """Return in what quality is compared."""
        if self.metric == "perplexity":
            return Score("loss", -1.0, "nats")
        return Score(self.metric, 100.0, "points")

    def scores(self, table: Table, index: str | list[str], columns: str) -> Table:
        """Tabulate the quality of arms, so that more is better and differences are in the unit of `score`.

        **Arguments**

        - `table`: with a column for the quality.
        - `index`: column or columns that name the rows of the result.
        - `columns`: the column that names the arms.
        """
        return self.score.factor * table.pivot_table(index=index, columns=columns, values=self.score.column)


def read_results(folder: Path) -> Results:
    """Read what one run left behind.

    **Arguments**

    - `folder`: with run.json and tables.

    **Raises**

    - `FileNotFoundError`: no run.json.
    """
    run = read_run(folder)
    return Results(folder, run["parameters"], run["inputs"])


def compare_arms(
    scores: Table, better: str, worse: str, *, name: str, text: str, unit: str, margin: float = 0.0
) -> Iterable[Claim]:
    """Yield the claim that one column beats another, paired by rows; nothing if a column is missing.

    **Arguments**

    - `scores`: one row per seed, model or case; more is better.
    - `better`, `worse`: columns.
    - `name`, `text`, `unit`, `margin`: of the claim.
    """
    if {better, worse} <= set(scores):
        yield Claim(name, text, mean_effect(scores[better] - scores[worse], margin), unit, margin)


def judge_claims(claims: Iterable[Claim]) -> pd.DataFrame:
    """Judge the claims of one notebook and set together.

    **Arguments**

    - `claims`: of one run.

    **Returns** one row per claim: `id`, `claim`, `verdict`, `effect` with the ends `low` and `high` of its interval, `unit`, `n`,
    the `margin` that the effect must exceed, and `p` before Holm's correction; the verdict is after it.
    """
    listed = list(claims)
    verdicts = decide([claim.effect for claim in listed], [claim.margin for claim in listed])
    rows = [
        (claim.id, claim.text, verdict, *claim.effect[:3], claim.unit, claim.effect.n, claim.margin, claim.effect.p)
        for claim, verdict in zip(listed, verdicts, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(CLAIM_COLUMNS))


def format_gain(gain: float) -> str:
    """Format a difference with its sign; what rounding left of an equal pair is 0."""
    return f"{0.0 if abs(gain) < 5e-4 else gain:+.3g}"


def format_effect(row: Any) -> str:
    """Format a row of `judge_claims`, for example '+1.2 points [0.4, 2.0], n = 5'."""
    interval = "" if np.isnan(row.low) else f" [{row.low:.3g}, {row.high:.3g}]"
    return f"{row.effect:+.3g} {row.unit}{interval}, n = {row.n:g}"


def format_claim(row: Any) -> str:
    """Format verdict and effect of a row of `judge_claims`."""
    return f"{row.verdict} ({format_effect(row)})"


Reading = Callable[[Results], str]
