"""Run one command of `lowrank`. `COMMANDS` is the only list of them; a new one is a module and a line here.

A command that fails prints one line. Exit status: 0 done, 1 a result is not as wanted, 2 bad input, 130 interrupted.
"""

import argparse
import importlib
import inspect
import warnings

from safetensors import SafetensorError

from lowrank import __version__
from lowrank.io.commands import run_command

# name -> its module, with `add` and `run`. The first line of its docstring is its summary, the rest comes below its options.
COMMANDS = {
    "compress": "lowrank.cli.compress",
    "evaluate": "lowrank.cli.evaluate",
    "info": "lowrank.cli.info",
    "ranks": "lowrank.cli.ranks",
    "score": "lowrank.cli.score",
    "assign": "lowrank.cli.assign",
    "prune": "lowrank.cli.prune",
    "params": "lowrank.cli.params",
    "run": "lowrank.cli.run",
}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `run` of its result is the function to call."""
    parser = argparse.ArgumentParser(prog="lowrank", description="Compress transformers, and judge what is left.")
    parser.add_argument("--version", action="version", version=f"lowrank {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, path in COMMANDS.items():
        module = importlib.import_module(path)
        summary, _, rest = _clean(inspect.getdoc(module) or "").partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary.replace("%", "%%"),
            description=summary,
            epilog=rest,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add(command)
        command.set_defaults(run=module.run)
    return parser


def _clean(docstring: str) -> str:
    """Return a docstring without marks of code."""
    return docstring.replace("`", "")


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    **Arguments**

    - `arguments`: the words after `lowrank`. Default None: those of this process.

    **Returns** the exit status: 0 done, 1 a result is not as wanted, 2 bad input, 130 interrupted.
    """
    options = make_parser().parse_args(arguments)
    usual, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:  # a full disk may be a SafetensorError, and outputs that are not finite are a FloatingPointError
        return run_command(lambda: options.run(options), SafetensorError, FloatingPointError)
    finally:
        warnings.formatwarning = usual


def _format_warning(message: Warning | str, *place: object) -> str:
    """Return a warning in one line, without the line of code that it comes from."""
    return f"warning: {' '.join(str(message).split())}\n"
