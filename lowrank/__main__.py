"""The `lowrank` command as `python -m lowrank`."""

import sys

from lowrank.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
