"""The tables of notebook 06 in docs/results.md, made from published results."""

import pandas as pd

from lowrank.report.tables import headline_metric, read_test, result_folders

NOTEBOOK = "06_layer_selection"


def layer_selection() -> str:
    """Tabulate what selected layers are worth, by set and objective; then pruning by the rule that sets the ratios.

    A cell of the first table has the share of the score that the objective takes, and the added loss when its layers are kept.
    """
    return f"{_worth_by_objective()}\n\n{_quality_by_rule()}"


def _read_objectives() -> pd.DataFrame:
    """Return the judged cases of every set, one set under the other."""
    tables = [
        read_test(folder, "quality_by_objective").assign(set=name) for name, folder in result_folders(NOTEBOOK).items()
    ]
    return pd.concat(tables).query("objective != 'none kept'")


def _worth_by_objective() -> str:
    cells: dict[str, dict[str, str]] = {}
    for name, of_set in _read_objectives().groupby("set", sort=False):
        for objective, cases in of_set.groupby("objective", sort=False):
            added = f"{cases.added_loss.mean():+.3f} ± {cases.added_loss.std():.3f}"
            cells.setdefault(str(objective), {})[str(name)] = f"{cases.significance_share.mean():.2f} / {added}"
    table = pd.DataFrame(cells).T.rename_axis("maximised: taken / added loss")
    return table.reset_index().to_markdown(index=False)


def _quality_by_rule() -> str:
    """Tabulate the headline metric at the two highest sparsities, pruned by Wanda within each row."""
    cells: dict[str, dict[str, str]] = {}
    for name, folder in result_folders(NOTEBOOK).items():
        table = read_test(folder, "quality_by_sparsity")
        metric = headline_metric(folder)
        table = table.query("method == 'wanda' and per == 'row'")
        for share in sorted(set(table.sparsity))[-2:]:
            for rule, rows in table.query("sparsity == @share").groupby("rule", sort=False):
                values = rows[metric]
                spread = f" ± {values.std():.2g}" if len(values) > 1 else ""
                cells.setdefault(str(rule), {})[f"{name}, {metric} at {share}"] = f"{values.mean():.3g}{spread}"
    return pd.DataFrame(cells).T.rename_axis("ratios").reset_index().to_markdown(index=False)
