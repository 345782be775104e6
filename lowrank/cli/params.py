"""Print the parameters of one notebook in one set as a flat YAML file, for papermill on its own.

The files of params/ have a section for each notebook, which `papermill -f` cannot take.

Example:

    lowrank params digits-vit 01_whitening > digits.yaml
    papermill notebooks/01_whitening.ipynb out.ipynb -f digits.yaml -p seed 1
"""

import argparse

from lowrank.cli.options import add_json


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lowrank params`."""
    parser.add_argument("set", metavar="SET", help="a file of params/ without .yaml, or a variant SET@NAME=VALUE")
    parser.add_argument("notebook", metavar="NOTEBOOK", help="a file of notebooks/ without .py")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print all parameters, and return the exit status."""
    from lowrank.cli.output import print_result  # noqa: PLC0415
    from lowrank.report.parameters import read_parameters  # noqa: PLC0415
    from lowrank.report.yaml_files import write_yaml  # noqa: PLC0415

    values = read_parameters(options.set, options.notebook)
    print_result(options, values, write_yaml(values).rstrip())
    return 0
