"""Say what a folder with a compressed model holds, without building the model.

Example:

    lowrank info small
    lowrank info small --json
"""

import argparse
from collections.abc import Mapping
from typing import Any

from lowrank.cli.options import add_json


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lowrank info`."""
    parser.add_argument("folder", metavar="FOLDER", help="a folder that lowrank compress or save_compressed wrote")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the content of the folder, and return the exit status."""
    from lowrank.cli.output import format_table, print_result  # noqa: PLC0415
    from lowrank.compression.description import describe_folder  # noqa: PLC0415

    content = describe_folder(options.folder)
    dense = content["dense"]
    names = f": {', '.join(list(dense)[:3])}{' ...' if len(dense) > 3 else ''}" if dense else ""
    text = {
        "folder": content["folder"],
        "base": content["base"] or "not known: load_compressed needs the dense architecture",
        "method": ", ".join(content["methods"]) or "not known",
        "storage": ", ".join(content["storages"]),
        "layers": f"{content['layers']}, ranks {' to '.join(map(str, content['ranks']))}",
        "their weights": _share(content, "targeted"),
        "whole model": _share(content, "model"),
        "bytes": f"{content['bytes']:,}",
        "left dense": f"{len(dense)} matrices, {sum(dense.values()):,} parameters{names}",
    }
    print_result(options, content, format_table([{"property": name, "value": value} for name, value in text.items()]))
    return 0


def _share(content: Mapping[str, Any], part: str) -> str:
    before, after = content[f"dense_{part}_parameters"], content[f"{part}_parameters"]
    return f"{before:,} -> {after:,} parameters ({content[f'keep_{part}']:.1%})"
