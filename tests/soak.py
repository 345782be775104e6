"""`make soak`: the report killed at random moments, again and again, ends with the published tables.

Each time the report of one set is killed, so that kills fall on all notebooks: that of all sets would begin with the same two
again and again. Every kill hits the whole process group, by SIGKILL or SIGTERM; whatever lies in the folder of results
then must be whole. At last the report of all sets runs to its end, and tables and verdicts are compared with the published ones.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from processes import copy_project, start_report

from lowrank.report.compare import compare_folders
from lowrank.report.errors import ParameterError
from lowrank.report.folders import published_folder
from lowrank.report.parameters import jobs

KILLS, LONGEST = 20, 120  # seconds between two of them
RUN = "outputs/run"
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def half_results(outputs: Path) -> list[str]:
    """Folders of results that lack their notebook, their claims or where they came from; Snakemake makes empty ones."""
    folders = [path for path in outputs.glob("[a-z]*/[0-9]*") if path.is_dir() and any(path.iterdir())]
    needed = ("run.json", "claims.csv")
    return [str(f) for f in folders if not all((f / name).exists() for name in (*needed, f"{f.name}.ipynb"))]


def killed(house: Path, sets: str, seconds: float, sent: signal.Signals, cores: int) -> bool:
    """Whether the report was still at work when its time was up."""
    run = start_report(house, RUN, sets, cores)
    try:
        run.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, sent)
        run.wait(timeout=60)
        return True
    if run.returncode:
        raise SystemExit(f"error: the report failed by itself: {(house / f'{RUN}.log').read_text()[-3000:]}")
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sets", help="names of sets, with spaces between")
    parser.add_argument("--cores", type=int, default=2)
    given = parser.parse_args()
    try:
        number = len(jobs(given.sets.split()))
    except ParameterError as error:
        raise SystemExit(f"error: {error}") from error
    chance, start = random.Random(0), time.monotonic()
    house = copy_project(Path(tempfile.mkdtemp(prefix="soak-")))  # stays there where something fails
    (house / RUN).mkdir(parents=True)
    left, kills = given.sets.split(), 0
    while kills < KILLS:
        if not left:
            raise SystemExit(f"error: `sets` must keep the report at work for {KILLS} kills, it ended after {kills}.")
        name, seconds, sent = chance.choice(left), chance.uniform(0, LONGEST), chance.choice(SIGNALS)
        if not killed(house, name, seconds, sent, given.cores):
            left.remove(name)
            continue
        kills += 1
        if half := half_results(house / RUN):
            raise SystemExit(f"error: half-written results after kill {kills}: {half}")
        done = len(list((house / RUN / ".done").glob("*")))
        print(f"kill {kills}: {name}, {sent.name} after {seconds:.0f} s, {done} of {number} jobs done", flush=True)
    if start_report(house, RUN, given.sets, given.cores).wait():
        raise SystemExit(f"error: the report failed: {(house / f'{RUN}.log').read_text()[-3000:]}")
    found = compare_folders(house / RUN, published_folder())
    print("\n".join([*found.lines(), found.summary(), f"{time.monotonic() - start:.0f} s"]))
    if found.lines() or found.unpublished:
        return 1
    shutil.rmtree(house)
    return 0


if __name__ == "__main__":
    sys.exit(main())
