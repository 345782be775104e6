"""Options that several commands share."""

import argparse


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`: print the result as JSON, and nothing else, on stdout."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Add `--no-progress`, which `show_progress` reads."""
    parser.add_argument("--no-progress", action="store_true", help="show no bars; without a terminal there are none")
