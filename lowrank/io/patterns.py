"""Match names of modules with the entries of a list of layers: names, or regular expressions that match a whole name."""

import re


def matches(name: str, entry: str, argument: str = "layers") -> bool:
    """Return True if an entry is a name or a regular expression that matches all of it.

    **Arguments**

    - `name`: dotted name of a module.
    - `entry`: a name, or a regular expression.
    - `argument`: the argument that holds the entry, for errors; default 'layers'.

    **Raises**

    - `ValueError`: an entry that is no string, or no regular expression.
    """
    if not isinstance(entry, str):
        raise ValueError(f"`{argument}` must hold names or regular expressions, got {entry!r}.")
    if name == entry:
        return True
    try:
        return bool(re.fullmatch(entry, name))
    except re.error as error:
        hint = "; write '.*' for any text" if "*" in entry else ""
        raise ValueError(
            f"`{argument}` must hold names or regular expressions, got {entry!r}: {error}{hint}."
        ) from error
