"""Print results, as tables for people or as JSON for programs."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def print_result(options: argparse.Namespace, content: Any, text: str) -> None:
    """Print a result on stdout: as JSON after `--json`, as text otherwise.

    **Arguments**

    - `options`: with `json`, see `lowrank.cli.options.add_json`.
    - `content`: the result, JSON; paths become text.
    - `text`: the same for people.
    """
    print(json.dumps(content, indent=1, allow_nan=False, default=str) if options.json else text)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as a table: names to the left, numbers to the right, floats with four digits.

    **Arguments**

    - `rows`: column -> value; a column that a row lacks, and None, stay empty. Columns come in the order of their first use.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_format_cell(row.get(name)) for name in columns] for row in rows]
    numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numeric, strict=True)
        )
        for line in (columns, *cells)
    )
    return "\n".join(line.rstrip() for line in lines)


def format_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as CSV; numbers keep all their digits.

    **Arguments**

    - `rows`: column -> value; a column that a row lacks, and None, stay empty.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _format_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def show_progress(options: argparse.Namespace) -> bool:
    """Return whether to show bars: on a terminal, unless `--no-progress` was given.

    **Arguments**

    - `options`: with `no_progress`, see `lowrank.cli.options.add_progress`.
    """
    return sys.stderr.isatty() and not options.no_progress
