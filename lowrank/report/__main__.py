"""The command line of the report: `python -m lowrank.report COMMAND`, with `--help` for each command.

A command that fails prints one line. Exit status: 0 done, 1 a notebook failed or results differ, 2 bad input. Each command
imports what it needs when it is called, so that help starts at once.
"""

import argparse
import sys
from pathlib import Path

from lowrank.io.commands import run_command
from lowrank.report.errors import ReportError

PROGRAM = "python -m lowrank.report"


def _run(options: argparse.Namespace) -> int:
    from lowrank.report.run import run_notebook  # noqa: PLC0415

    try:
        print(run_notebook(options.set, options.notebook))
    except OSError as error:
        raise ReportError(f"`LOWRANK_OUTPUTS` must be a writable folder: {error}") from error
    return 0


def _pair(options: argparse.Namespace) -> int:
    from lowrank.report.pair import refresh  # noqa: PLC0415
    from lowrank.report.parameters import notebook_names, notebook_path  # noqa: PLC0415

    for name in options.notebooks:
        notebook_path(name)  # a wrong name is an error before anything runs
    for name in options.notebooks or notebook_names():
        print(refresh(name))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from lowrank.report.compare import compare_folders  # noqa: PLC0415
    from lowrank.report.folders import outputs_folder, published_folder  # noqa: PLC0415

    results, reference = options.results or outputs_folder(), options.reference or published_folder()
    found = compare_folders(results, reference, options.tolerance)
    lines = found.lines(everything=options.all)
    if found.unpublished:
        lines.append(f"{len(found.unpublished)} results are not published: {', '.join(found.unpublished)}")
    print("\n".join([*lines, found.summary()]))
    return 1 if found.lines() else 0


def _publish(options: argparse.Namespace) -> int:
    from lowrank.report.folders import outputs_folder, published_folder  # noqa: PLC0415
    from lowrank.report.publish import publish_results  # noqa: PLC0415

    for path in publish_results(options.sets, outputs_folder(), published_folder()):
        print(path)
    return 0


def _readme(options: argparse.Namespace) -> int:
    from lowrank.report.readme import fill_pages  # noqa: PLC0415

    for path in fill_pages():
        print(path)
    return 0


def _claims(options: argparse.Namespace) -> int:
    from lowrank.report.findings.recompute import recompute_claims  # noqa: PLC0415
    from lowrank.report.folders import outputs_folder, published_folder  # noqa: PLC0415

    folder = outputs_folder() if options.runs else published_folder()
    changed = recompute_claims(folder, options.sets, write=options.write)
    return 1 if changed and not options.write else 0


def _site(options: argparse.Namespace) -> int:
    from lowrank.report import site  # noqa: PLC0415
    from lowrank.report.folders import outputs_folder, published_folder  # noqa: PLC0415

    print(site.build_site(options.sets, [outputs_folder(), published_folder()], site.SITE))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `command` of its result is the function to call."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Turn notebooks into results, a README and a site.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(function.__name__.strip("_"), help=summary, description=f"{summary}.")
        command.set_defaults(command=function)
        return command

    run = add(_run, "Execute one notebook with one set and replace its results")
    run.add_argument("set", metavar="SET", help="a file of params/ without .yaml, or a variant SET@NAME=VALUE")
    run.add_argument("notebook", metavar="NOTEBOOK", help="a file of notebooks/ without .py")
    pair = add(_pair, "Store notebooks with the outputs of their default sets beside their sources")
    pair.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="files of notebooks/ without .py; default: all")
    compare = add(_compare, "Compare the tables and verdicts of a run with the published ones")
    compare.add_argument(
        "results",
        type=Path,
        nargs="?",
        metavar="RESULTS",
        help="new results, SET/NOTEBOOK/run.json; default: your runs",
    )
    compare.add_argument(
        "reference", type=Path, nargs="?", metavar="REFERENCE", help="results to compare with; default: outputs/"
    )
    compare.add_argument("--tolerance", type=float, help="relative, of numbers, instead of all declared ones; 0: equal")
    compare.add_argument("--all", action="store_true", help="name the tables within their tolerance, too")
    publish = add(_publish, "Put the results of your runs in the place of published ones in outputs/")
    publish.add_argument("sets", nargs="*", metavar="SET", help="sets or variants; default: all sets that were run")
    add(_readme, "Fill the marked blocks of README.md and docs/ from outputs/")
    claims = add(_claims, "Judge the claims anew from the published tables, and say what changed")
    claims.add_argument("sets", nargs="*", metavar="SET", help="sets or variants; default: all that have results")
    claims.add_argument("--runs", action="store_true", help="judge your own runs instead of the published results")
    claims.add_argument("--write", action="store_true", help="write claims.csv anew where it changed")
    site = add(_site, "Build the site of some sets in _site/")
    site.add_argument(
        "sets", nargs="*", metavar="SET", help="sets with results; your own runs come before published ones"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    **Arguments**

    - `arguments`: the words after `python -m lowrank.report`. Default None: those of this process.

    **Returns** the exit status: 0 done, 1 a notebook failed or results differ, 2 bad input.
    """
    options = make_parser().parse_args(arguments)
    return run_command(lambda: options.command(options), ReportError)


if __name__ == "__main__":
    sys.exit(main())
