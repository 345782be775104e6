"""Measure a model, dense or compressed, on a data set or by lm-evaluation-harness.

A causal language model has a perplexity, a classifier an accuracy, a regression its correlations. A folder of
lowrank compress is a MODEL like any other.

Example:

    lowrank evaluate small-llama --data Salesforce/wikitext:wikitext-2-v1
    lowrank evaluate small-vit --data uoft-cs/cifar10 --samples 1000 --json
    lowrank evaluate small-llama --harness hellaswag,arc_easy --out results
    lowrank evaluate small-llama --harness my_task --include-path tasks --csv
"""

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from lowrank.cli.options import add_data, add_json, add_model, add_progress, given, load_model, read_source
from lowrank.cli.output import format_csv, format_table, show_progress
from lowrank.io.checks import require
from lowrank.io.files import writing

TABLE, JSON = "results.csv", "results.json"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lowrank evaluate`."""
    add_model(parser)
    add_data(parser, splits=("test", "validation"), samples="all")
    parser.add_argument("--label", metavar="NAME", help="column of labels; default: found by name")
    group = parser.add_argument_group("lm-evaluation-harness")
    group.add_argument("--harness", metavar="TASK[,TASK]", help="tasks or groups of the harness")
    group.add_argument("--include-path", type=Path, metavar="FOLDER", help="folder with tasks of your own, in YAML")
    group.add_argument("--shots", type=int, help="examples in each prompt; default: as the task says")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"write {TABLE} and {JSON} there")
    parser.add_argument("--csv", action="store_true", help="print the result as CSV")
    add_progress(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Measure the model, print a table, and return the exit status."""
    require(bool(options.data or options.harness), "data", "be given, or --harness", None)
    require(options.out is None or not options.out.is_file(), "out", "be a folder", str(options.out))
    named = load_model(options)
    rows, results = [], {}
    if options.data:
        from lowrank.tasks.named_evaluation import evaluate_named  # noqa: PLC0415

        rows += evaluate_named(named, read_source(options), **given(options, "samples", "length", "batch_size"))
    if options.harness:
        from lowrank.tasks.harness import run_harness, tabulate_harness  # noqa: PLC0415

        names = [name for name in options.harness.split(",") if name]
        bars = contextlib.nullcontext() if show_progress(options) else contextlib.redirect_stderr(io.StringIO())
        with bars:
            results = run_harness(named, names, **given(options, "include_path", "samples", "shots", "batch_size"))
        rows += tabulate_harness(named, results)
    content = {"rows": rows, "harness": results}
    if options.out is not None:
        _write(options.out, content)
    text = _format_json(content if options.harness else {"rows": rows}) if options.json else None
    print(text or (format_csv(rows).rstrip("\n") if options.csv else format_table(rows)))
    return 0


def _write(folder: Path, content: dict[str, Any]) -> None:
    for name, text in {TABLE: format_csv(content["rows"]), JSON: f"{_format_json(content)}\n"}.items():
        with writing(folder / name) as partial:
            partial.write_text(text, encoding="utf8")


def _format_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, default=str)  # the harness has objects in the descriptions of its tasks
