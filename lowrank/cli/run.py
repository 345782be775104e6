"""Execute one notebook with one set and replace its results, as `python -m lowrank.report run` does.

Example:

    lowrank run digits-vit 01_whitening
    lowrank run digits-vit@seed=1 01_whitening
"""

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lowrank run`."""
    parser.add_argument("set", metavar="SET", help="a file of params/ without .yaml, or a variant SET@NAME=VALUE")
    parser.add_argument("notebook", metavar="NOTEBOOK", help="a file of notebooks/ without .py")


def run(options: argparse.Namespace) -> int:
    """Execute the notebook, print the folder of its results, and return the exit status."""
    from lowrank.report.__main__ import main  # noqa: PLC0415

    return main(["run", options.set, options.notebook])
