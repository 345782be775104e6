"""Assign layers to devices with budgets, so that the scores taken are as large as possible.

Each device takes one run of neighbouring layers that it can pay. A budget is a number of parameters, or a share of those of all
scored layers.

Example:

    lowrank assign scores.json --budgets 20% 10% 5%
    lowrank assign scores.json --budgets 7000000 7000000 --order fixed --json
"""

import argparse

from lowrank.cli.options import add_json


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lowrank assign`."""
    parser.add_argument("scores", metavar="SCORES", help="a file of lowrank score")
    parser.add_argument(
        "--budgets", nargs="+", required=True, metavar="NUMBER", help="parameters, or a share such as 20%%"
    )
    parser.add_argument("--order", default="free", help="fixed: the devices stand in this order; default %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of large cases; default %(default)s")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the run of layers of each device, and return the exit status."""
    from lowrank.cli.output import format_table, print_result  # noqa: PLC0415
    from lowrank.selection.assignment import assign_layers  # noqa: PLC0415
    from lowrank.selection.scores import Scores  # noqa: PLC0415

    scores = Scores.load(options.scores)
    whole = sum(scores.costs)
    budgets = [read_budget(text, whole) for text in options.budgets]
    found = assign_layers(scores.values, scores.costs, budgets, options.order, seconds=options.seconds)
    rows = []
    for device, (budget, interval) in enumerate(zip(budgets, found.intervals, strict=True), 1):
        taken = range(interval[0], interval[1] + 1) if interval else range(0)
        ends = (
            {"first": scores.names[taken[0]], "last": scores.names[taken[-1]]} if taken else {"first": "", "last": ""}
        )
        costs, values = sum(scores.costs[i] for i in taken), sum(scores.values[i] for i in taken)
        rows.append(
            {"device": device, "budget": budget, "parameters": costs, "layers": len(taken), "score": values} | ends
        )
    summary = {"score": found.total, "of": sum(scores.values), "optimal": found.optimal, "gap": found.gap}
    certain = "no assignment is better" if found.optimal else f"at most {found.gap:.2%} below the best"
    text = f"{format_table(rows)}\n\nscores taken: {found.total:.4g} of {summary['of']:.4g}; {certain}"
    print_result(options, {"devices": rows} | summary, text)
    return 0


def read_budget(text: str, whole: int) -> int:
    """Read a budget in parameters.

    **Arguments**

    - `text`: a whole number, or a share such as "20%" or "12.5%".
    - `whole`: the parameters that a share is of.

    **Returns** parameters, rounded down.

    **Raises**

    - `ValueError`: no number, one below 0, or a share above 100%.
    """
    try:
        if text.endswith("%") and 0 <= (share := float(text[:-1])) <= 100:
            return int(share / 100 * whole)
        if (number := int(text)) >= 0:
            return number
    except ValueError:
        pass
    raise ValueError(f"`--budgets` must be whole numbers >= 0 or shares such as 20%, got {text!r}.")
