"""Train the dense models of the embedded sets: `python -m lowrank.tasks.pretrain [NAME ...] [--ship]`.

Each takes minutes on one core and goes into the cache, where `load_baseline(..., retrain=True)` finds it. A training that is
killed goes on from its last saved state. With `--ship` the models replace those that come with this package.
"""

import argparse
import sys

from lowrank.io.checks import require
from lowrank.io.commands import run_command


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status.

    **Arguments**

    - `arguments`: words of the command line; default: those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lowrank.tasks.pretrain", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "name",
        nargs="*",
        metavar="NAME",
        help="such as digits-vit-0, a wrong one lists all; default: all that are shipped",
    )
    parser.add_argument("--ship", action="store_true", help="replace the models that come with this package")
    options = parser.parse_args(arguments)

    def train() -> int:
        from lowrank.tasks import pretraining  # noqa: PLC0415 (torch: help comes at once without it)

        shipped = [name for name, model in pretraining.MODELS.items() if model.shipped]
        known = shipped if options.ship else list(pretraining.MODELS)
        unknown = [name for name in options.name if name not in known]
        require(not unknown, "NAME", f"be among {known}{' with --ship' if options.ship else ''}", unknown)
        pretraining.pretrain(list(dict.fromkeys(options.name or shipped)), options.ship)
        return 0

    return run_command(train)


if __name__ == "__main__":
    sys.exit(main())
