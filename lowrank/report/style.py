"""How figures look: one colour for each arm in all notebooks, and logarithmic axes with plain numbers."""

from collections.abc import Iterable

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

BLUE, ORANGE, GREEN, RED, PINK, TAN, ROSE, GREY, YELLOW, SKY = sns.color_palette("colorblind").as_hex()
COLORS = {
    "dense": "#404040",
    "original": "#404040",
    "svd": GREY,
    "asvd": TAN,
    "fwsvd": GREEN,
    "whitened": BLUE,
    "whitened, pivots": SKY,
    "pivoted": SKY,
    "two_sided": ORANGE,
    "best combination": "#000000",
    "retargeted": RED,
    "no training": GREY,
    "lambda = 0": "#404040",
    "stable_rank": GREEN,
    "nuclear": ORANGE,
    "entropy_rank": PINK,
    "tail": BLUE,
    "all steps after": RED,
    "constant rate": ORANGE,
    "OIALR": BLUE,
    "static low rank": GREEN,
    "uniform": "#404040",
    "first_dense": TAN,
    "linear": GREEN,
    "relative": GREY,
    "spectrum": BLUE,
    "measured": ORANGE,
    "depth": PINK,
    "ESD, by block": BLUE,
    "ESD, by layer": SKY,
    "reversed": RED,
    "whitened spectrum": GREEN,
    "factors": BLUE,
}


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """Return name -> colour; a name without a colour of its own gets one of those that are left.

    **Arguments**

    - `names`: of the arms of a figure.
    """
    names = list(dict.fromkeys(names))
    taken = {COLORS[name] for name in names if name in COLORS}
    free = [color for color in (BLUE, ORANGE, GREEN, RED, PINK, TAN, SKY, ROSE, YELLOW, GREY) if color not in taken]
    others = [name for name in names if name not in COLORS]
    return {name: COLORS[name] for name in names if name in COLORS} | {
        name: free[place % len(free)] if free else GREY for place, name in enumerate(others)
    }


def write_plain_logs(axis: Axes) -> None:
    """Label logarithmic axes with plain numbers: at powers of ten, on a short axis also between them.

    **Arguments**

    - `axis`: axes of matplotlib; linear ones stay as they are.
    """
    for side in (axis.xaxis, axis.yaxis):
        if side.get_scale() != "log":
            continue
        low, high = sorted(side.get_view_interval())
        wide = high / max(low, 1e-300) > 30
        side.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), numticks=6))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        side.set_minor_formatter(NullFormatter())


def mark_data(axis: Axes, values: Iterable[float]) -> None:
    """Put the ticks of the horizontal axis at the data.

    **Arguments**

    - `axis`: axes of matplotlib.
    - `values`: where something was measured.
    """
    ticks = sorted(set(values))
    axis.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
