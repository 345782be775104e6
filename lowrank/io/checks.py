"""Check arguments in one line, with one form of message."""

import math
import numbers
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


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """Return a whole number as a Python int, whatever type it has, and raise an error for any other number.

    Narrow integers of NumPy overflow in products, and those of any width are no JSON.

    **Arguments**

    - `value`: an int, an integer of NumPy, or a float without fraction.
    - `name`: the argument, as the caller writes it.
    - `least`: smallest value; default 1.

    **Raises**

    - `ValueError`: another number, or no number.
    """
    number: Any = value  # of any of the types below
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    whole = isinstance(value, numbers.Integral) or (real and math.isfinite(number) and number == int(number))
    require(real and whole and number >= least, name, f"be a whole number >= {least}", value)
    return int(number)


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
