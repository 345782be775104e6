"""nbval compares by the rule of `make compare`: a verdict that is too close to call agrees with any other."""

from functools import partial
from typing import Any

import pytest
from nbval.plugin import IPyNbCell

from lowrank.report.claims import settle_verdicts


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, IPyNbCell):
        item.compare_outputs = partial(compare_settled, item.compare_outputs)


def compare_settled(compare: Any, test: list[Any], ref: list[Any], skip_compare: Any = None) -> bool:
    """Compare the outputs of a cell as nbval does, once verdicts that agree are written the same."""
    for here, stored in zip(test, ref, strict=False):  # another number of outputs is nbval's to report
        if here.output_type == stored.output_type == "stream":
            here.text = settle_verdicts(here.text, stored.text)
    return compare(test, ref, skip_compare)
