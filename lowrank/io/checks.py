"""Check arguments in one line, with one form of message."""

import re
from typing import Any

SPLITS = ("train", "validation", "test")  # every task has them; further ones are its own
FROZEN = re.compile("[0-9a-f]{16}")


def require(holds: bool, name: str, rule: str, value: Any) -> None:
    """Raise an error that names argument, rule and value unless the rule holds.

    **Arguments**

    - `holds`: whether the value follows the rule.
    - `name`: the argument, as the caller writes it.
    - `rule`: what follows "must", for example "be >= 1" or "be one of ['a', 'b']".
    - `value`: what the caller passed.

    **Raises**

    - `ValueError`: "`rank` must be >= 1, got 0."
    """
    if not holds:
        raise ValueError(f"`{name}` must {rule}, got {value!r}.")


def require_frozen(split: str, frozen: str | None) -> None:
    """Raise an error unless a split may be read: 'test' only after all choices are frozen.

    **Arguments**

    - `split`: the split that is read. Any but 'test' may be read at any time.
    - `frozen`: the hash of the frozen choices, 16 hex digits; None before.

    **Raises**

    - `ValueError`: the split is 'test' and `frozen` is no such hash.
    """
    remedy = "be 16 hex digits to read the split 'test', the hash of the choices that led here: pass it to `open_test`"
    holds = split != "test" or FROZEN.fullmatch(frozen or "") is not None
    require(holds, "frozen", f"{remedy}; in a notebook `Report.freeze` returns it", frozen)
