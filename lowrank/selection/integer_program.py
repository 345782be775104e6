"""Bound the assignment of runs of layers to devices by a mixed-integer program, solved by HiGHS.

The program chooses one of the longest affordable runs for each device. Runs may overlap, a layer counts once, and overlaps are
cut afterwards.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank.selection.dynamic_program import Interval

_Window = tuple[int, int]  # device, and the layer before which its longest run ends


def solve_integer_program(
    values: Sequence[int], starts: Sequence[Sequence[int]], seconds: float | int = 60.0
) -> tuple[float, list[Interval]]:
    """Solve the mixed-integer program, or stop after some time with the best solution so far.

    **Arguments**

    - `values`: one integer >= 0 per layer.
    - `starts`: the result of `lowrank.selection.dynamic_program.find_run_starts`, as lists.
    - `seconds`: time limit.

    **Returns** a proven upper bound of the total value, and the run of each device, without overlaps.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415

    windows = [(k, i) for k in range(len(starts)) for i in range(1, len(values) + 1) if starts[k][i] < i]
    unit = max(*values, 1)  # the program computes in floating point
    objective = np.concatenate([np.zeros(len(windows)), [-value / unit for value in values]])
    right: Any = np.concatenate([np.ones(len(starts)), np.zeros(len(values))])
    solved = milp(
        objective,
        constraints=LinearConstraint(_build_constraints(windows, starts, len(values)), ub=right),
        integrality=np.concatenate([np.ones(len(windows)), np.zeros(len(values))]),
        bounds=Bounds(0, 1),
        options={"time_limit": float(seconds), "mip_rel_gap": 0.0},
    )
    bound = solved.mip_dual_bound if solved.mip_dual_bound is not None else -sum(values) / unit
    taken = [windows[w] for w in np.flatnonzero(solved.x[: len(windows)] > 0.5)] if solved.x is not None else []
    return -bound * unit, _cut_overlaps(taken, starts)


def _build_constraints(windows: Sequence[_Window], starts: Sequence[Sequence[int]], layers: int) -> Any:
    """Return the sparse matrix A of A x <= b; x holds one entry per window, then one per layer."""
    from scipy.sparse import coo_array  # noqa: PLC0415

    one = [(k, w, 1.0) for w, (k, _) in enumerate(windows)]  # a device takes one run at most
    covered = [(len(starts) + j, w, -1.0) for w, (k, i) in enumerate(windows) for j in range(starts[k][i], i)]
    counted = [(len(starts) + j, len(windows) + j, 1.0) for j in range(layers)]
    rows, columns, entries = zip(*one, *covered, *counted, strict=True)
    return coo_array((entries, (rows, columns)), shape=(len(starts) + layers, len(windows) + layers)).tocsr()


def _cut_overlaps(windows: Sequence[_Window], starts: Sequence[Sequence[int]]) -> list[Interval]:
    runs: list[Interval] = [None] * len(starts)
    end = 0
    for k, i in sorted(windows, key=lambda window: starts[window[0]][window[1]]):
        if max(end, starts[k][i]) < i:
            runs[k], end = (max(end, starts[k][i]), i - 1), i
    return runs
