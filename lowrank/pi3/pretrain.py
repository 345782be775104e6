"""Train the small π³ of the embedded report: `python -m lowrank.pi3.pretrain [--folder FOLDER]`.

It takes about an hour on one core. If a training is killed, the next call continues from its last saved state. The files in the
folder are replaced when the training has ended.
"""

import argparse
import sys
from pathlib import Path

from lowrank.io.commands import run_command


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status.

    **Arguments**

    - `arguments`: words of the command line; default: those of this process.
    """
    parser = argparse.ArgumentParser(prog="python -m lowrank.pi3.pretrain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write; default: lowrank/pi3/pretrained, which is shipped")
    options = parser.parse_args(arguments)
    places = (options.folder, *options.folder.parents) if options.folder else ()
    if any(path.exists() and not path.is_dir() for path in places):
        parser.error(f"`--folder` must be a folder, or a name for one, got {str(options.folder)!r}.")

    def train() -> int:
        from lowrank.pi3 import checkpoint, pretraining, small  # noqa: PLC0415 (torch: help comes at once without it)

        folder = options.folder or checkpoint.PRETRAINED
        folder.mkdir(parents=True, exist_ok=True)
        pretraining.pretrain(folder, small.SMALL_RECIPE)
        return 0

    return run_command(train)


if __name__ == "__main__":
    sys.exit(main())
