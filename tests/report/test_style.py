"""Figures: an arm has one colour everywhere, and logarithmic axes have plain numbers that do not overlap."""

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest

from lowrank.report.style import COLORS, colors_of, mark_data, write_plain_logs


def test_an_arm_keeps_its_colour_beside_others() -> None:
    alone, together = colors_of(["whitened"]), colors_of(["svd", "whitened", "mine", "whitened"])
    assert alone["whitened"] == together["whitened"] == COLORS["whitened"]
    assert list(together) == ["svd", "whitened", "mine"]
    assert len(set(together.values())) == 3  # what has no colour of its own gets one that is free
    many = colors_of([f"arm {place}" for place in range(25)])
    assert len(many) == 25


def test_the_arms_that_are_shown_together_differ() -> None:
    together = [
        ["svd", "asvd", "fwsvd", "whitened", "whitened, pivots", "two_sided", "best combination"],
        ["no training", "lambda = 0", "stable_rank", "nuclear", "entropy_rank", "tail"],
        ["dense", "constant rate", "OIALR", "static low rank"],
        ["uniform", "first_dense", "linear", "relative", "spectrum", "measured", "depth"],
        ["uniform", "ESD, by block", "ESD, by layer", "reversed", "whitened spectrum"],
        ["factors", "pivoted"],
    ]
    for names in together:
        assert len({COLORS[name] for name in names}) == len(names), names


@pytest.mark.parametrize(("low", "high"), [(1e-6, 2), (0.03, 10), (1, 3), (0.1, 0.9), (40, 130)])
def test_logarithmic_axes_have_few_plain_numbers(low: float, high: float) -> None:
    figure, axis = plt.subplots(figsize=(3, 2))
    axis.loglog(np.geomspace(low, high, 9), np.geomspace(low, high, 9))
    write_plain_logs(axis)
    figure.canvas.draw()
    for side, limits in ((axis.get_xticklabels(), axis.get_xlim()), (axis.get_yticklabels(), axis.get_ylim())):
        shown = [float(label.get_text()) for label in side if limits[0] <= float(label.get_text()) <= limits[1]]
        assert 1 <= len(shown) <= 8
    assert not any(label.get_text() for label in axis.get_xticklabels(minor=True))
    plt.close(figure)


def test_linear_axes_stay_and_ticks_go_to_the_data() -> None:
    figure, axis = plt.subplots()
    axis.plot([0.1, 0.25, 0.5], [1, 2, 3])
    before = [label.get_text() for label in axis.get_yticklabels()]
    write_plain_logs(axis)
    mark_data(axis, [0.5, 0.1, 0.25, 0.1])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.1", "0.25", "0.5"]
    assert [label.get_text() for label in axis.get_yticklabels()] == before
    plt.close(figure)
