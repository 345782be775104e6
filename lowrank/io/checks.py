"""Check arguments in one line, with one form of message."""

from typing import Any


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
