"""Divide samples into splits by a hash of their names, where the source has too few splits.

The division is the same on every machine and in every order, and samples of one name stay together.
"""

import hashlib
from collections.abc import Sequence

from lowrank.io.checks import require


def part_of(name: str, parts: int, salt: str = "") -> int:
    """Return the part that a name falls into, in [0, parts).

    **Arguments**

    - `name`: of a file or a sample, or its text.
    - `parts`: how many parts of about equal size.
    - `salt`: of up to 16 bytes; each gives another division, independent of the others. Empty by default.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=4, salt=salt.encode()).digest()
    return int.from_bytes(digest) % parts


def halve(names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Divide samples into two halves by a hash of their names.

    **Arguments**

    - `names`: one per sample; samples of the same name get into the same half.

    **Returns** the positions of the half that chooses, then those of the half that is reported, both in order.

    **Raises**

    - `ValueError`: a half would be empty.
    """
    halves: tuple[list[int], list[int]] = ([], [])
    for position, name in enumerate(names):
        halves[part_of(name, 2)].append(position)
    require(all(halves), "names", "fall into two halves", f"{len(halves[0])} and {len(halves[1])} samples")
    return halves
