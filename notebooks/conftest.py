"""nbval compares what cells print by the rules of `make report`: numbers within a tolerance, verdicts that agree.

A cell tagged `after-training` prints numbers that training amplifies; they have a wider tolerance.
"""

from functools import partial
from typing import Any

import pytest
from nbval.plugin import IPyNbCell

from lowrank.report.agreement import AFTER_TRAINING, TRAINING_FREE, settle_text


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, IPyNbCell):
        trained = "after-training" in item.cell.metadata.get("tags", [])
        tolerance = AFTER_TRAINING if trained else TRAINING_FREE
        item.compare_outputs = partial(compare_settled, item.compare_outputs, tolerance)


def compare_settled(compare: Any, tolerance: float, test: list[Any], ref: list[Any], skip_compare: Any = None) -> bool:
    """Compare what a cell printed as nbval does, once lines that agree are written the same; tables are shown, not compared."""
    test, ref = ([output for output in side if output.output_type == "stream"] for side in (test, ref))
    for here, stored in zip(test, ref, strict=False):  # another number of outputs is nbval's to report
        here.text = settle_text(here.text, stored.text, tolerance)
    return compare(test, ref, skip_compare)
